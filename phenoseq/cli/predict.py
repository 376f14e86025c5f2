"""``phenoseq predict``, ``embed`` and ``decode``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from phenoseq.cli.options import (
    EIGHT_BIT,
    EXTRACTOR,
    FORMAT,
    Commands,
    add_sampling,
    open_told,
    tell_left_out,
)


def add_predict(commands: Commands) -> None:
    """Add ``phenoseq predict``."""
    predict = commands.add_parser("predict", help="predict the expression of every cell")
    predict.add_argument(
        "source",
        help="folder, file or URL of images, store, crops (n, C, H, W) as .npy, or features as "
        ".h5ad or .zarr",
    )
    predict.add_argument("--model", required=True, help="name in the zoo, or folder")
    predict.add_argument("-o", "--out", required=True, help="OUT.h5ad or OUT.zarr")
    predict.add_argument(
        "--cells", help="CSV of cell_id,x_centroid,y_centroid (um) and field to predict at"
    )
    predict.add_argument("--format", help=FORMAT)
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
    add_sampling(predict)
    predict.set_defaults(run=_predict)


def add_embed(commands: Commands) -> None:
    """Add ``phenoseq embed``."""
    embed = commands.add_parser(
        "embed", help="make image features by a frozen network, one token a cell and channel"
    )
    embed.add_argument("source", help="folder, file or URL of images and cells")
    embed.add_argument(
        "--backbone",
        required=True,
        help="a network of timm, or vit_l_16 (torchvision's, as the published PhenoSeq takes it)",
    )
    embed.add_argument("-o", "--out", required=True, help="FEATURES.h5ad or FEATURES.zarr")
    embed.add_argument("--weights", help="file of its weights (.pth, .safetensors)")
    embed.add_argument("--crop-px", type=int, help="side of a crop (the network's own)")
    embed.add_argument(
        "--crop-pixel-size", type=float, help="um a pixel of the crops (as the images)"
    )
    embed.add_argument("--eight-bit", choices=["full", "percentile"], help=EIGHT_BIT)
    embed.add_argument("--sample", help="column of obs to keep that tells samples apart")
    embed.add_argument("--format", help=FORMAT)
    embed.add_argument("--pixel-size", type=float, help="um a pixel of the images")
    embed.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    embed.add_argument("--yes", action="store_true", help="download these weights if need be")
    embed.set_defaults(run=_embed)


def add_decode(commands: Commands) -> None:
    """Add ``phenoseq decode``."""
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


def _predict(options: argparse.Namespace) -> int:
    from phenoseq.api import is_table, predict

    source, channels = options.source, None
    if Path(source).suffix == ".npy":
        source = _load_array(Path(source))
        channels = options.channels.split(",") if options.channels else None
    _fetch(options.model, yes=options.yes)
    extractor = options.extractor
    if options.yes and options.sample and not extractor and not is_table(source):
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
        format=options.format,
        cells=options.cells,
        keep_draws=options.keep_draws,
        sample=options.sample,
        published_steps=options.published_steps,
        eight_bit=options.eight_bit,
        extractor=extractor,
    )
    if result.uns["phenoseq"]["pairing"] == "sample":
        kind = result.uns["phenoseq"].get("embedding")
        what = f"{kind} embeddings of {result.n_vars} numbers" if kind else f"{result.n_vars} genes"
        print(f"{options.out}: {result.n_obs:,} bags, {what}")
    else:
        print(f"{options.out}: {result.n_obs:,} cells, {result.n_vars} genes")
    tell_left_out(result.uns["phenoseq"])
    return 0


def _fetch(model: str, *, yes: bool) -> None:
    """Download a model that has to be, after asking."""
    from phenoseq.errors import ModelError
    from phenoseq.zoo.registry import load_model, to_download

    entry = to_download(model)
    if entry is None:
        return
    size = f"{entry.size / 1e9:.1f} GB"
    print(f"{entry.name}: {size} from the Hugging Face hub, kept for later")
    if not yes:
        if not sys.stdin.isatty():
            raise ModelError(f"{entry.name}: say --yes to download {size}")
        if input("download? [y/N] ").strip().lower() not in ("y", "yes"):
            raise ModelError(f"{entry.name}: not downloaded")
    load_model(entry.name, download=True)


def _load_array(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - numpy is not imported yet
    import numpy as np

    from phenoseq.errors import DataError

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable array ({error})") from error


def _embed(options: argparse.Namespace) -> int:
    from phenoseq.inference.extract import embed

    made = embed(
        open_told(options),
        backbone=options.backbone,
        weights=options.weights,
        image_size=options.crop_px,
        crop_pixel_size=options.crop_pixel_size,
        eight_bit=options.eight_bit,
        sample=options.sample,
        device=options.device,
        out=options.out,
        yes=options.yes,
    )
    n = len(made.uns["phenoseq"]["channels"])
    print(f"{options.out}: {made.n_obs:,} cells, {n} channels, {made.n_vars // n:,} numbers each")
    tell_left_out(made.uns["phenoseq"])
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
