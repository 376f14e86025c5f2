"""``phenoseq prepare``: training stores from images and counts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from phenoseq.cli.options import FORMAT, Commands, open_told, tell_problems

if TYPE_CHECKING:
    from phenoseq.data.source import Source


def add_prepare(commands: Commands) -> None:
    """Add ``phenoseq prepare``."""
    prepare = commands.add_parser("prepare", help="make a training store from images and counts")
    prepare.add_argument("source", help="folder or file of images, cells and counts")
    prepare.add_argument("store", help="store to write, STORE.zarr")
    prepare.add_argument("--format", help=FORMAT)
    prepare.add_argument(
        "--pixel-size", type=float, help="um a full-resolution pixel of the source"
    )
    prepare.add_argument("--crop-pixel-size", type=float, default=0.425, help="um (%(default)s)")
    prepare.add_argument("--crop-px", type=int, default=64, help="side of a crop (%(default)s)")
    prepare.add_argument("--min-counts", type=int, default=20, help="of a cell (%(default)s)")
    prepare.add_argument(
        "--metadata",
        help="table of the cells (cell_id) or wells (Metadata_Well) to keep, whose columns are "
        "added: .csv, .parquet, or the obs of .h5ad",
    )
    prepare.add_argument("--rna", nargs="+", help="RNA of the cells or samples: .h5ad files")
    prepare.add_argument(
        "--pair-by",
        choices=["id", "centroid", "sample"],
        default="id",
        help="how images and --rna belong together (%(default)s)",
    )
    prepare.add_argument("--sample-columns", help="columns of obs that name a sample, A,B")
    prepare.add_argument("--max-distance", type=float, help="um between centroids at most")
    prepare.add_argument("--embedding", help="take obsm[EMBEDDING] of the RNA, not its genes")
    prepare.add_argument("--layer", help="where the raw counts of the RNA are, if not in X")
    prepare.add_argument(
        "--rna-values",
        choices=["counts", "expression"],
        default="counts",
        help="raw counts, or measured genes as they are (%(default)s)",
    )
    prepare.add_argument("--genes", help="text file of the genes to keep, one a line")
    prepare.add_argument("--report", help="CSV to write, of which cells or samples are paired")
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing store")
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from phenoseq.data.storewriter import write_store
    from phenoseq.progress import bar

    if options.pair_by == "sample":
        return _prepare_samples(options)
    source = _open(options)
    if options.rna:
        source = _join_counts(source, options)
    with bar("cutting crops") as progress:
        store = write_store(
            source,
            options.store,
            pixel_size=options.crop_pixel_size,
            crop_px=options.crop_px,
            min_counts=options.min_counts,
            overwrite=options.overwrite,
            progress=progress,
        )
    manifest = store.manifest
    print(
        f"{store.path}: {len(store):,} cells, {len(manifest.genes)} genes, "
        f"crops of {manifest.crop_px} px at {manifest.pixel_size} um ({manifest.crop_width:.1f} um)"
    )
    for reason, n in manifest.excluded.items():
        print(f"  left out, {reason}: {n:,}")
    tell_problems(manifest.problems)
    return 0


def _open(options: argparse.Namespace) -> Source:
    from phenoseq.data.metadata import add_metadata, read_metadata

    source = open_told(options)
    if options.metadata:
        source = add_metadata(source, read_metadata(options.metadata), options.metadata)
        print(f"{len(source.obs):,} cells of {options.metadata}")
    return source


def _join_counts(source: Source, options: argparse.Namespace) -> Source:
    from phenoseq.data.backed import Cells
    from phenoseq.data.pairing import join_counts
    from phenoseq.genes import read_gene_list

    joined, pairing, matches = join_counts(
        source,
        Cells(options.rna),
        by=options.pair_by,
        max_distance=options.max_distance,
        key=f"layers/{options.layer}" if options.layer else "X",
        genes=read_gene_list(options.genes) if options.genes else None,
    )
    for line in (pairing, *matches):
        print(line)
    if options.report:
        pairing.table().to_csv(options.report)
    return joined


def _prepare_samples(options: argparse.Namespace) -> int:
    from phenoseq.data.backed import Cells, is_anndata
    from phenoseq.data.samplewriter import RnaConfig, write_sample_store
    from phenoseq.errors import DataError
    from phenoseq.genes import read_gene_list
    from phenoseq.progress import bar

    if not options.rna:
        raise DataError("pairing by sample needs the RNA: --rna RNA.h5ad")
    if options.format is None and is_anndata(options.source):
        if options.metadata:
            raise DataError("--metadata goes with images; AnnData tells of its cells in obs")
        images: Source | Cells = Cells(options.source)
    else:
        images = _open(options)
    with bar("writing cells") as progress:
        store, pairing = write_sample_store(
            images,
            Cells(options.rna),
            options.store,
            columns=options.sample_columns.split(",") if options.sample_columns else [],
            config=RnaConfig(
                embedding=options.embedding,
                layer=options.layer,
                values=options.rna_values,
                min_counts=options.min_counts,
            ),
            genes=read_gene_list(options.genes) if options.genes else None,
            pixel_size=options.crop_pixel_size,
            crop_px=options.crop_px,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(pairing)
    if options.report:
        pairing.table.to_csv(options.report)
    manifest = store.manifest
    print(
        f"{store.path}: {len(store.samples):,} samples, {len(store.images):,} image cells "
        f"({manifest.images}), {store.rna.shape[0]:,} RNA cells ({manifest.rna} of width "
        f"{store.rna.shape[1]})"
    )
    for of, reasons in manifest.excluded.items():
        for reason, n in reasons.items():
            print(f"  {of} left out, {reason}: {n:,}")
    tell_problems(manifest.problems)
    return 0
