"""``phenoseq segment``: the nuclei of images."""

from __future__ import annotations

import argparse

from phenoseq.cli.options import FORMAT, Commands


def add_segment(commands: Commands) -> None:
    """Add ``phenoseq segment``."""
    segment = commands.add_parser("segment", help="find the nuclei in images")
    segment.add_argument("source", help="folder, file or URL of images, one stain of them DNA")
    segment.add_argument("-o", "--out", required=True, help="folder for masks, cells.csv, overlays")
    segment.add_argument("--format", help=FORMAT)
    segment.add_argument("--pixel-size", type=float, help="um a pixel, where no file says")
    segment.add_argument("--method", default="watershed", choices=["watershed", "cellpose"])
    segment.set_defaults(run=_segment)


def _segment(options: argparse.Namespace) -> int:
    from phenoseq.data.nuclei import segment_folder
    from phenoseq.progress import bar

    with bar("finding nuclei") as progress:
        counts = segment_folder(
            options.source,
            options.out,
            format=options.format,
            pixel_size=options.pixel_size,
            method=options.method,
            progress=progress,
        )
    for field, n in counts.items():
        print(f"{field}: {n:,} nuclei")
    print(f"{options.out}: {counts.sum():,} nuclei in {len(counts):,} fields; look at overlays/")
    return 0
