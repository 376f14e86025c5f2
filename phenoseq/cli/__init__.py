"""The ``phenoseq`` command: parses, calls the library, prints. Nothing heavy is imported before."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from phenoseq._version import __version__
from phenoseq.cli import (
    benchmark,
    doctor,
    evaluate,
    models,
    predict,
    prepare,
    screen,
    segment,
    train,
)
from phenoseq.errors import PhenoseqError, PhenoseqWarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for an error it explains, 2 for bad usage."""
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    try:
        if args[:1] == ["train"]:
            from phenoseq.cli.train import run_train

            return run_train(args[1:])
        options = _parser().parse_args(args)
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except PhenoseqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads it has enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        print(f"interrupted; {stop or 'nothing half-written is left'}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phenoseq", description="Single-cell gene expression from microscope images."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare.add_prepare(commands)
    train.add_train(commands)
    train.add_finetune(commands)
    train.add_calibrate(commands)
    predict.add_predict(commands)
    predict.add_embed(commands)
    evaluate.add_evaluate(commands)
    predict.add_decode(commands)
    benchmark.add_benchmark(commands)
    screen.add_screen(commands)
    segment.add_segment(commands)
    models.add_models(commands)
    doctor.add_doctor(commands)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Print phenoseq's own warnings plainly, and those of libraries not at all."""
    if issubclass(category, PhenoseqWarning):
        print(f"warning: {message}", file=sys.stderr)
