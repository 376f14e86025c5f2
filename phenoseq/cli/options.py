"""Options and printing that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from phenoseq.data.source import Source

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EIGHT_BIT = (
    "for features: how pixels become 8 bits, where they are not: by the full range of their type, "
    "or each stain by its 99.9th percentile"
)
EXTRACTOR = "for features: file of torchvision's vit_l_16 (.pth, .safetensors)"
FORMAT = "layout of the source (found out by itself)"


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of drawing."""
    parser.add_argument("--n-samples", type=int, default=16, help="draws a cell (%(default)s)")
    parser.add_argument("--steps", type=int, help="network evaluations a draw (the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")


def open_told(options: argparse.Namespace) -> Source:
    """Open a source, and say as what."""
    from phenoseq.data.readers import find_reader, open_source

    reader, reason = find_reader(options.source, options.format)
    print(f"read as {reader.name}: {reason}")
    source = open_source(options.source, format=reader.name, pixel_size=options.pixel_size)
    print(f"{len(source.obs):,} cells, stains {', '.join(source.channels)}")
    return source


def tell_left_out(record: Mapping[str, Any]) -> None:
    """Print what a prediction lacks; ``record`` is its ``uns["phenoseq"]``."""
    skipped = len(record.get("skipped_cells", ()))
    if skipped:
        print(f"  cells left out, outside their image or not readable: {skipped:,}")
    for problem in record.get("problems", ()):
        print(f"  left out, {problem}")


def tell_problems(problems: Iterable[dict[str, Any]]) -> None:
    """Print what was left out."""
    for problem in problems:
        print(f"  left out, {problem['where']} ({problem['cells']:,} cells): {problem['reason']}")
