"""``phenoseq prepare``: training stores from images and counts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from phenoseq.cli.options import FORMAT, Commands, open_told, tell_problems

if TYPE_CHECKING:
    from phenoseq.data.backed import Cells
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


#: Options that say something of the RNA, of pairing by sample, and of pairing cells only.
_OF_RNA = ("layer", "genes", "report", "max_distance", "pair_by")
_OF_SAMPLES = ("sample_columns", "embedding", "rna_values")
_OF_CELLS = ("max_distance",)


def _prepare(options: argparse.Namespace) -> int:
    from phenoseq.data.backed import Cells
    from phenoseq.data.storewriter import check_target, write_store
    from phenoseq.errors import DataError
    from phenoseq.progress import bar

    check_target(Path(options.store), overwrite=options.overwrite)
    if options.pair_by == "sample":
        _refuse(options, _OF_CELLS, "without pairing by id or centroid")
        return _prepare_samples(options)
    _refuse(options, _OF_SAMPLES, "without --pair-by sample")
    if not options.rna:
        _refuse(options, _OF_RNA, "without --rna RNA.h5ad")
    if _is_features(options):
        raise DataError(
            f"{options.source}: a table of features, which is paired by sample: --pair-by sample "
            "--sample-columns A,B --rna RNA.h5ad"
        )
    rna = Cells(options.rna) if options.rna else None
    source = _open(options)
    if rna is not None:
        source = _join_counts(source, rna, options)
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


def _refuse(options: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Refuse options that would be passed over."""
    from phenoseq.errors import DataError

    usual = {"rna_values": "counts", "pair_by": "id"}
    for name in names:
        if getattr(options, name) != usual.get(name):
            raise DataError(f"--{name.replace('_', '-')} means nothing {where}; leave it out")


def _is_features(options: argparse.Namespace) -> bool:
    """Tell whether the source is AnnData, and no folder of images that has some beside them."""
    from phenoseq.data.backed import is_anndata
    from phenoseq.data.readers import find_reader
    from phenoseq.errors import DataError

    if options.format is not None or not is_anndata(options.source):
        return False
    try:
        find_reader(options.source)
    except DataError:
        return True
    return False


def _open(options: argparse.Namespace) -> Source:
    from phenoseq.data.metadata import add_metadata, read_metadata

    source = open_told(options)
    if options.metadata:
        source = add_metadata(source, read_metadata(options.metadata), options.metadata)
        print(f"{len(source.obs):,} cells of {options.metadata}")
    return source


def _join_counts(source: Source, rna: Cells, options: argparse.Namespace) -> Source:
    from phenoseq.data.pairing import join_counts
    from phenoseq.genes import read_gene_list

    joined, pairing, matches = join_counts(
        source,
        rna,
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
    from phenoseq.data.backed import Cells
    from phenoseq.data.samplewriter import RnaConfig, write_sample_store
    from phenoseq.errors import DataError
    from phenoseq.genes import read_gene_list
    from phenoseq.progress import bar

    if not options.rna:
        raise DataError("pairing by sample needs the RNA: --rna RNA.h5ad")
    rna = Cells(options.rna)
    if _is_features(options):
        if options.metadata:
            raise DataError("--metadata goes with images; AnnData tells of its cells in obs")
        images: Source | Cells = Cells(options.source)
    else:
        images = _open(options)
    with bar("writing cells") as progress:
        store, pairing = write_sample_store(
            images,
            rna,
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
