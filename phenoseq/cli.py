"""The ``phenoseq`` command: parses, calls the library, prints. Nothing heavy is imported before."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phenoseq._version import __version__
from phenoseq.errors import PhenoseqError, PhenoseqWarning

if TYPE_CHECKING:
    from phenoseq.data.source import Source

EIGHT_BIT = (
    "for features: how pixels become 8 bits, where they are not: by the full range of their type, "
    "or each stain by its 99.9th percentile"
)
EXTRACTOR = "for features: file of torchvision's vit_l_16 (.pth, .safetensors)"
FORMAT = "layout of the source (found out by itself)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for an error it explains, 2 for bad usage."""
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    try:
        if args[:1] == ["train"]:
            return _train(args[1:])
        options = _parser().parse_args(args)
        return int(options.run(options))
    except PhenoseqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phenoseq", description="Single-cell gene expression from microscope images."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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

    commands.add_parser("train", help="train a model: phenoseq train --config CONFIG.yaml")

    predict = commands.add_parser("predict", help="predict the expression of every cell")
    predict.add_argument(
        "source",
        help="folder, file or URL of images, store, crops (n, C, H, W) as .npy, or features as "
        ".h5ad",
    )
    predict.add_argument("--model", required=True, help="name in the zoo, or folder")
    predict.add_argument("-o", "--out", required=True, help="OUT.h5ad or OUT.zarr")
    predict.add_argument("--cells", help="CSV of cell_id,x_centroid,y_centroid (um) to predict at")
    predict.add_argument("--channels", help="stains of an array, in order, comma-separated")
    predict.add_argument("--pixel-size", type=float, help="um a pixel, of an array or a folder")
    predict.add_argument("--keep-draws", action="store_true", help="keep every draw, as a layer")
    predict.add_argument("--sample", help="column of obs that tells samples apart (for embeddings)")
    predict.add_argument("--eight-bit", choices=["full", "percentile"], help=EIGHT_BIT)
    predict.add_argument("--extractor", help=EXTRACTOR)
    predict.add_argument(
        "--published-steps",
        action="store_true",
        help="sample features' embeddings as the published project does (50 DDIM steps)",
    )
    predict.add_argument(
        "--yes", action="store_true", help="download the model without asking, where needed"
    )
    _add_sampling(predict)
    predict.set_defaults(run=_predict)

    features = commands.add_parser(
        "features", help="make the image features that the published PhenoSeq weights take"
    )
    features.add_argument("source", help="folder of images and CellProfiler's single-cell table")
    features.add_argument("-o", "--out", required=True, help="FEATURES.h5ad or FEATURES.zarr")
    features.add_argument("--format", help=FORMAT)
    features.add_argument("--pixel-size", type=float, help="um a pixel of the images")
    features.add_argument(
        "--crop-pixel-size", type=float, help="um a pixel of the crops (as the images)"
    )
    features.add_argument("--eight-bit", choices=["full", "percentile"], help=EIGHT_BIT)
    features.add_argument("--extractor", help=EXTRACTOR)
    features.add_argument("--yes", action="store_true", help="download these weights if need be")
    features.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    features.set_defaults(run=_features)

    evaluate = commands.add_parser("evaluate", help="score a model beside the baselines")
    evaluate.add_argument("--model", required=True, help="name in the zoo, or folder")
    evaluate.add_argument("--store", required=True, help="prepared store")
    evaluate.add_argument("--split", default="test", help="test, cal, val, test_NAME (%(default)s)")
    evaluate.add_argument("-o", "--out", help="folder for metrics.json, metrics.md, genes.csv")
    _add_sampling(evaluate)
    evaluate.set_defaults(run=_evaluate)

    decode = commands.add_parser("decode", help="turn predicted embeddings into expression")
    decode.add_argument("prediction", help="predicted embeddings, PRED.h5ad or PRED.zarr")
    decode.add_argument(
        "--reference", required=True, help="real cells, embedded and with expression: .h5ad, .zarr"
    )
    decode.add_argument("--key", default="scGPT", help="of their embedding in obsm (%(default)s)")
    decode.add_argument("-o", "--out", required=True, help="OUT.h5ad or OUT.zarr")
    decode.add_argument("-k", type=int, default=10, help="neighbours averaged (%(default)s)")
    decode.add_argument("--weighting", default="distance", choices=["distance", "uniform"])
    decode.add_argument("--backend", default="exact", choices=["exact", "faiss"])
    decode.set_defaults(run=_decode)

    segment = commands.add_parser("segment", help="find the nuclei in a folder of images")
    segment.add_argument("source", help="folder of TIFF images, one stain of them DNA")
    segment.add_argument("-o", "--out", required=True, help="folder for masks, cells.csv, overlays")
    segment.add_argument("--pixel-size", type=float, help="um a pixel, where no file says")
    segment.add_argument("--method", default="watershed", choices=["watershed", "cellpose"])
    segment.set_defaults(run=_segment)

    models = commands.add_parser("models", help="list the models that can be loaded by name")
    models.set_defaults(run=_models)
    actions = models.add_subparsers(metavar="ACTION")
    convert = actions.add_parser(
        "import", help="convert a checkpoint of the published PhenoSeq project, safely"
    )
    convert.add_argument("checkpoint", help="CHECKPOINT.pt; nothing in it is run")
    convert.add_argument("out", help="folder to write")
    convert.add_argument(
        "--features-mean-std",
        required=True,
        metavar="FILE.npz",
        help="mean and std of the image features, which the checkpoint lacks",
    )
    convert.add_argument(
        "--weights",
        default="ema",
        choices=["ema", "raw"],
        help="their average over training, or the last ones (%(default)s)",
    )
    convert.set_defaults(run=_import)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n-samples", type=int, default=16, help="draws a cell (%(default)s)")
    parser.add_argument("--steps", type=int, help="network evaluations a draw (the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")


def _open(options: argparse.Namespace) -> Source:
    """Open a source, and say as what."""
    from phenoseq.data.readers import find_reader, open_source

    reader, reason = find_reader(options.source, options.format)
    print(f"read as {reader.name}: {reason}")
    source = open_source(options.source, format=reader.name, pixel_size=options.pixel_size)
    print(f"{len(source.obs):,} cells, stains {', '.join(source.channels)}")
    return source


def _prepare(options: argparse.Namespace) -> int:
    from phenoseq.data.store import write_store
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
    _tell(manifest.problems)
    return 0


def _tell(problems: Iterable[dict[str, Any]]) -> None:
    for problem in problems:
        print(f"  left out, {problem['where']} ({problem['cells']:,} cells): {problem['reason']}")


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
    images = Cells(options.source) if is_anndata(options.source) else _open(options)
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
    _tell(manifest.problems)
    return 0


def _train(args: Sequence[str]) -> int:
    from phenoseq.training.train import train

    out = train(args)
    print(f"model in {out}; try: phenoseq evaluate --model {out} --store STORE")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from phenoseq.api import predict

    source, channels = options.source, None
    if Path(source).suffix == ".npy":
        source = _load_array(Path(source))
        channels = options.channels.split(",") if options.channels else None
    _fetch(options.model, yes=options.yes)
    extractor = options.extractor
    if options.yes and options.sample and not extractor and Path(source).suffix != ".h5ad":
        from phenoseq.models.features import load_extractor

        extractor = load_extractor(yes=True)
    result = predict(
        source,
        model=options.model,
        n_samples=options.n_samples,
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        out=options.out,
        channels=channels,
        pixel_size=options.pixel_size,
        cells=options.cells,
        keep_draws=options.keep_draws,
        sample=options.sample,
        published_steps=options.published_steps,
        eight_bit=options.eight_bit,
        extractor=extractor,
    )
    if result.uns["phenoseq"]["pairing"] == "sample":
        kind = result.uns["phenoseq"]["embedding"]
        print(f"{options.out}: {result.n_obs:,} bags, {kind} embeddings of {result.n_vars} numbers")
    else:
        print(f"{options.out}: {result.n_obs:,} cells, {result.n_vars} genes")
    return 0


def _fetch(model: str, *, yes: bool) -> None:
    """Download a model that has to be, after asking."""
    from phenoseq.errors import ModelError
    from phenoseq.zoo.registry import load_model, to_download

    entry = to_download(model)
    if entry is None:
        return
    files = entry.files
    print(f"{entry.name}: {files.download} from {files.repo} on the Hugging Face hub", end=", ")
    print(f"converted to {files.kept} and kept for later")
    if not yes:
        if not sys.stdin.isatty():
            raise ModelError(f"{entry.name}: say --yes to download {files.download}")
        if input("download? [y/N] ").strip().lower() not in ("y", "yes"):
            raise ModelError(f"{entry.name}: not downloaded")
    load_model(entry.name, download=True)


def _features(options: argparse.Namespace) -> int:
    from phenoseq.inference.extract import check_source, image_features
    from phenoseq.inference.writer import check_out, write_whole
    from phenoseq.models.features import VIT_L_16, load_extractor
    from phenoseq.progress import bar

    out = check_out(options.out)
    source = _open(options)
    check_source(source, VIT_L_16.channels, eight_bit=options.eight_bit)
    extractor = load_extractor(weights=options.extractor, yes=options.yes)
    with bar("making features") as progress:
        result = image_features(
            source,
            extractor,
            pixel_size=options.crop_pixel_size,
            eight_bit=options.eight_bit,
            device=options.device,
            progress=progress,
        )
    write_whole(result, out)
    print(f"{out}: {result.n_obs:,} cells, {result.n_vars:,} features")
    return 0


def _load_array(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - numpy is not imported yet
    import numpy as np

    from phenoseq.errors import DataError

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable array ({error})") from error


def _evaluate(options: argparse.Namespace) -> int:
    from phenoseq.api import evaluate
    from phenoseq.evaluation.report import markdown

    scores = evaluate(
        options.model,
        options.store,
        part=options.split,
        n_samples=options.n_samples,
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        out=options.out,
    )
    print(markdown(scores))
    return 0


def _decode(options: argparse.Namespace) -> int:
    from phenoseq.inference.decode import decode

    result = decode(
        options.prediction,
        options.reference,
        key=options.key,
        k=options.k,
        weighting=options.weighting,
        backend=options.backend,
        out=options.out,
    )
    print(f"{options.out}: {result.n_obs:,} rows, {result.n_vars} genes")
    ratio = result.obs["reference_distance_ratio"].median()
    print(f"  distance to the reference over that among its own cells, median: {ratio:.2f}")
    return 0


def _segment(options: argparse.Namespace) -> int:
    from phenoseq.data.nuclei import segment_folder
    from phenoseq.progress import bar

    with bar("finding nuclei") as progress:
        counts = segment_folder(
            options.source,
            options.out,
            pixel_size=options.pixel_size,
            method=options.method,
            progress=progress,
        )
    for field, n in counts.items():
        print(f"{field}: {n:,} nuclei")
    print(f"{options.out}: {counts.sum():,} nuclei in {len(counts):,} fields; look at overlays/")
    return 0


def _models(options: argparse.Namespace) -> int:
    from phenoseq.zoo.registry import list_models

    for entry in list_models():
        print(f"{entry.name:20} {entry.summary}\n{'':20} {entry.data}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from phenoseq.zoo.convert import convert_checkpoint

    folder = convert_checkpoint(
        options.checkpoint,
        options.out,
        features=options.features_mean_std,
        weights=options.weights,
    )
    print(
        f"model in {folder}; try: phenoseq predict FEATURES.h5ad --model {folder} --sample COLUMN"
    )
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
