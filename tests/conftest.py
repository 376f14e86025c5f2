"""Small fake data for every reader, and the folder of shared real data where there is one."""

from __future__ import annotations

import json
import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from scipy import sparse
from torchvision.models import VisionTransformer

from phenoseq.data.source import FieldImage, Level, Source
from phenoseq.models.features import FeatureConfig

#: Real data, which not every machine has.
SHARED = Path(
    os.environ.get("PHENOSEQ_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data")
)

#: Stains as the instrument names them, in the order of its files.
XENIUM_STAINS = ("DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "AlphaSMA/Vimentin")
CONTROLS = {
    "NegControlProbe_00042": "Negative Control Probe",
    "NegControlCodeword_0500": "Negative Control Codeword",
    "BLANK_0006": "Blank Codeword",
    "UnassignedCodeword_0037": "Unassigned Codeword",
    "Intergenic_Region_3": "Genomic Control",
}


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """No test passes or fails by chance."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real data absent: no folder {SHARED}; PHENOSEQ_DATA names another")
    return SHARED


@pytest.fixture(scope="session")
def fork() -> Iterator[Callable[..., BaseProcess]]:
    """Give a function that runs code, with some names, in a process of its own.

    It is forked from one that has imported the package, which takes longer than most tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["phenoseq.api", "phenoseq.training.train"])
    running = []

    def start(code: str, **names: object) -> BaseProcess:
        process = context.Process(target=exec, args=(code, names))
        process.start()
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.join()


# --------------------------------------------------------------------------- Xenium output folders


@dataclass(frozen=True)
class FakeXenium:
    """A Xenium output folder and what is in it.

    Around each cell stands a square of 9 x 9 full-resolution pixels, of the value
    ``blob(cell, channel)``; all other pixels are 0.
    """

    path: Path
    stains: tuple[str, ...]
    pixel_size: float
    cells: pd.DataFrame  # x_centroid and y_centroid in micrometres, indexed by id
    pixels: np.ndarray  # (n, 2) y and x of the centre pixel of each cell
    counts: pd.DataFrame  # genes only, cells in the order of the table
    images: list[Path]

    def blob(self, cell: int | np.ndarray, channel: int) -> int | np.ndarray:
        return 4 * (cell + 1) + channel


def _ids(n: int) -> list[str]:
    letters = "abcdefghijklmnop"
    return [f"{''.join(letters[(i * 7919 >> (4 * k)) % 16] for k in range(8))}-1" for i in range(n)]


def write_pyramid(path: Path, image: np.ndarray, *, levels: int = 3, **options) -> None:
    """Write ``image`` (Y, X) or (C, Y, X) with its lower levels as SubIFDs."""
    ome = options.pop("ome", True)
    description = options.pop("description", None)
    metadata = options.pop("metadata", None)
    with tifffile.TiffWriter(path, ome=ome) as tif:
        common = {"photometric": "minisblack", "tile": (128, 128), **options}
        first = {"description": description, "metadata": None} if description else {}
        first = first or {"metadata": metadata}
        tif.write(image, subifds=levels - 1, **first, **common)
        for _ in range(levels - 1):
            height, width = (side // 2 * 2 for side in image.shape[-2:])
            image = image[..., :height:2, :width:2]
            tif.write(image, subfiletype=1, metadata=None, **common)


def write_ome_set(
    folder: Path, images: np.ndarray, stains: tuple[str, ...], pixel_size: float, **options
) -> list[Path]:
    """Write a multi-file OME-TIFF set: one file a stain, each describing the whole set."""
    paths = [folder / f"morphology_focus_{c:04d}.ome.tif" for c in range(len(stains))]
    uuids = [f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, path.name)}" for path in paths]
    height, width = images.shape[-2:]
    channels = "".join(
        f'<Channel ID="Channel:0:{c}" Name="{name}" SamplesPerPixel="1"/>'
        for c, name in enumerate(stains)
    )
    planes = "".join(
        f'<TiffData FirstC="{c}" FirstT="0" FirstZ="0" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{path.name}">{own}</UUID></TiffData>'
        for c, (path, own) in enumerate(zip(paths, uuids, strict=True))
    )
    for path, own, image in zip(paths, uuids, images, strict=True):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{own}" Creator="Xenium">'
            '<Image ID="Image:0" Name="Image0">'
            f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="{images.dtype.name}" '
            f'SizeX="{width}" SizeY="{height}" SizeC="{len(stains)}" SizeZ="1" SizeT="1" '
            f'PhysicalSizeX="{pixel_size}" PhysicalSizeY="{pixel_size}" '
            'PhysicalSizeXUnit="&#181;m" PhysicalSizeYUnit="&#181;m">'
            f"{channels}{planes}</Pixels></Image></OME>"
        )
        write_pyramid(path, image, ome=False, description=xml, **options)
    return paths


def write_matrix(path: Path, counts: pd.DataFrame, ids: list[str], *, controls: bool = True):
    """Write a 10x matrix; its features are ``ids`` and, between them, control features."""
    features = [(i, symbol, "Gene Expression") for i, symbol in zip(ids, counts, strict=True)]
    dense = counts.to_numpy()
    if controls:
        at = len(features) // 2
        features[at:at] = [(name, name, kind) for name, kind in CONTROLS.items()]
        noise = np.full((len(counts), len(CONTROLS)), 99)
        dense = np.hstack([dense[:, :at], noise, dense[:, at:]])
    matrix = sparse.csc_matrix(dense.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(list(counts.index), dtype="S")
        group["data"] = matrix.data.astype(np.int32)
        group["indices"] = matrix.indices.astype(np.int64)
        group["indptr"] = matrix.indptr.astype(np.int64)
        group["shape"] = np.array(matrix.shape, dtype=np.int32)
        table = group.create_group("features")
        for k, name in enumerate(("id", "name", "feature_type")):
            table[name] = np.array([feature[k] for feature in features], dtype="S")


def write_cells(folder: Path, cells: pd.DataFrame, table: str) -> None:
    if table == "parquet":
        cells.reset_index().to_parquet(folder / "cells.parquet")
    elif table == "csv":
        cells.reset_index().to_csv(folder / "cells.csv.gz", index=False)


def make_xenium(
    path: Path,
    *,
    layout: str = "stains",
    table: str = "parquet",
    dtype: str = "uint8",
    levels: int = 3,
    compression: str | None = None,
    pixel_size: float = 0.2125,
    image_pixel_size: float | None = None,
    matrix: bool = True,
    n_cells: int = 48,
    size: tuple[int, int] = (420, 530),
    names: bool = True,
) -> FakeXenium:
    """Write a Xenium output folder.

    ``layout``: ``"one"`` is a single ``morphology_focus.ome.tif`` of DAPI, ``"stains"`` a folder of
    single-channel files, ``"set"`` a folder that is one multi-file OME-TIFF. ``table``:
    ``"parquet"`` or ``"csv"`` (gzipped). The first cell has no counts, the second 5, all others
    more than 20.
    """
    path.mkdir(parents=True)
    rng = np.random.default_rng(7)
    stains = XENIUM_STAINS[:1] if layout == "one" else XENIUM_STAINS
    height, width = size
    columns = 8
    grid = np.stack(np.divmod(np.arange(n_cells), columns), axis=1)
    step = np.array([height, width]) // [-(-n_cells // columns), columns]
    pixels = grid * step + step // 2 + rng.integers(-8, 9, (n_cells, 2))
    images = np.zeros((len(stains), height, width), dtype=dtype)
    for cell, (y, x) in enumerate(pixels):
        for c in range(len(stains)):
            images[c, y - 4 : y + 5, x - 4 : x + 5] = 4 * (cell + 1) + c
    centre = (pixels + 0.5) * pixel_size
    cells = pd.DataFrame(
        {
            "x_centroid": centre[:, 1],
            "y_centroid": centre[:, 0],
            "transcript_counts": 60,
            "cell_area": 40.5,
        },
        index=pd.Index(_ids(n_cells), name="cell_id"),
    )
    write_cells(path, cells, table)
    options = {"levels": levels, "compression": compression}
    if layout == "set":
        (path / "morphology_focus").mkdir()
        files = write_ome_set(
            path / "morphology_focus", images, stains, image_pixel_size or pixel_size, **options
        )
    else:
        if layout == "one":
            files = [path / "morphology_focus.ome.tif"]
        else:
            (path / "morphology_focus").mkdir()
            files = [
                path / "morphology_focus" / f"morphology_focus_{c:04d}.ome.tif"
                for c in range(len(stains))
            ]
        for file, image, stain in zip(files, images, stains, strict=True):
            metadata = {"axes": "YX", "Channel": {"Name": stain}} if names else {"axes": "YX"}
            if image_pixel_size:
                metadata |= {"PhysicalSizeX": image_pixel_size, "PhysicalSizeXUnit": "µm"}
            write_pyramid(file, image, metadata=metadata, **options)
    symbols = [f"GENE{g}" for g in range(11)] + ["NOID"]
    counts = pd.DataFrame(rng.poisson(6, (n_cells, 12)) + 1, index=cells.index, columns=symbols)
    counts.iloc[0] = 0
    counts.iloc[1] = [5] + [0] * 11
    if matrix:
        ids = [f"ENSG{g:011d}.3" if g < 2 else f"ENSG{g:011d}" for g in range(11)] + ["NOID"]
        shuffled = counts.iloc[rng.permutation(n_cells)]
        write_matrix(path / "cell_feature_matrix.h5", shuffled, ids)
    (path / "experiment.xenium").write_text(json.dumps({"pixel_size": pixel_size}))
    return FakeXenium(path, stains, pixel_size, cells, pixels, counts, files)


@pytest.fixture
def xenium_folder(tmp_path) -> Callable[..., FakeXenium]:
    """Give a function that writes a Xenium output folder, see :func:`make_xenium`."""

    def make(name: str = "xenium", **options) -> FakeXenium:
        return make_xenium(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def xenium_set(tmp_path_factory) -> FakeXenium:
    """Give a multi-file set of four stains, 16 bit, that no test may change."""
    return make_xenium(tmp_path_factory.mktemp("set") / "xenium", layout="set", dtype="uint16")


@pytest.fixture
def cut_file() -> Callable[[Path, float], None]:
    """Give a function that keeps only the first share of a file."""

    def cut(path: Path, share: float) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return cut


@pytest.fixture
def rewrite_cells() -> Callable[[FakeXenium, pd.DataFrame], None]:
    """Give a function that replaces the parquet table of a folder."""
    return lambda folder, cells: write_cells(folder.path, cells, "parquet")


@pytest.fixture
def rewrite_matrix() -> Callable[..., None]:
    """Give a function that replaces the count matrix of a folder."""

    def rewrite(folder: FakeXenium, counts: pd.DataFrame, ids: list[str], **options) -> None:
        write_matrix(folder.path / "cell_feature_matrix.h5", counts, ids, **options)

    return rewrite


# ---------------------------------------------------------------------------- CellProfiler folders

#: Stains as the pipeline names them, in the order of the instrument's channel numbers, which say
#: nothing: they differ between plates.
PAINTING = ("RNA", "DNA", "Brightfield", "Mito", "ER", "AGP")


@dataclass(frozen=True)
class FakeCellProfiler:
    """A folder with a single-cell table and its images, and what is in it.

    Around each nucleus stands a square of 9 x 9 pixels of the value ``blob(cell, stain)``; all
    other pixels are 0.
    """

    path: Path
    table: Path
    frame: pd.DataFrame  # as written
    pixels: np.ndarray  # (n, 2) y and x of the centre pixel of each nucleus
    images: dict[tuple[str, str], Path]  # by field and stain

    def blob(self, cell: int | np.ndarray, stain: str) -> int | np.ndarray:
        return 7 * (cell + 1) + PAINTING.index(stain)

    def rewrite(self, frame: pd.DataFrame) -> None:
        """Replace the table."""
        write_table(self.table, frame)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)


def make_cellprofiler(
    path: Path,
    *,
    fields: tuple[tuple[str, str, int], ...] = (("P1", "B03", 1), ("P1", "B03", 2)),
    cells: int = 4,
    stains: tuple[str, ...] = PAINTING,
    dtype: str = "uint16",
    table: str = "cells.parquet",
    size: tuple[int, int] = (90, 120),
    style: str = "cytotable",
    **tiff,
) -> FakeCellProfiler:
    """Write a folder of fields ``(plate, well, site)``.

    ``style``: ``"cytotable"`` names columns as CytoTable does, ``"prefixed"`` those of metadata
    after ``Metadata_``. Every plate's images bear the same names, in a folder named as at the
    microscope.
    """
    rng = np.random.default_rng(11)
    rows, images, pixels = [], {}, []
    for f, (plate, well, site) in enumerate(fields):
        measurement = f"{plate}__2020-11-02T19_54_45-Measurement1"
        folder = path / "images" / measurement / "Images"
        folder.mkdir(parents=True, exist_ok=True)
        step = size[1] // cells
        at = np.stack(
            [
                rng.integers(5, size[0] - 5, cells),
                step * np.arange(cells) + rng.integers(5, step - 4, cells),
            ],
            axis=1,
        )
        planes = np.zeros((len(stains), *size), dtype=dtype)
        names = {}
        for c, stain in enumerate(stains):
            for k, (y, x) in enumerate(at):
                value = 7 * (f * cells + k + 1) + PAINTING.index(stain)
                planes[c, y - 4 : y + 5, x - 4 : x + 5] = value
            name = f"{well}f{site:02d}p01-ch{c + 1}.tiff"
            names[stain] = name
            images[f"{plate}_{well}_{site}", stain] = folder / name
            tifffile.imwrite(folder / name, planes[c], **{"rowsperstrip": 32, **tiff})
        for k, (y, x) in enumerate(at):
            number = 2 * k + 3  # some nuclei have no cell
            image = "Image_Metadata_" if style == "cytotable" else "Metadata_"
            nuclei = "" if style == "cytotable" else "Metadata_"
            rows.append(
                {
                    "Metadata_ImageNumber": f + 1,
                    f"{image}Plate": plate,
                    f"{image}Well": well,
                    f"{image}Site": site,
                    f"{nuclei}Nuclei_Number_Object_Number": number,
                    **{f"Image_FileName_Orig{s}": names[s] for s in stains},
                    **{
                        f"Image_PathName_Orig{s}": f"D:\\data\\{measurement}\\Images"
                        for s in stains
                    },
                    f"Image_FileName_Illum{stains[0]}": f"{plate}_Illum{stains[0]}.npy",
                    "Cells_AreaShape_Area": 300.5 + k,
                    "Cells_Location_Center_X": 0.0,
                    "Cells_Location_Center_Y": 0.0,
                    f"{nuclei}Nuclei_Location_Center_X": float(x),
                    f"{nuclei}Nuclei_Location_Center_Y": float(y),
                }
            )
            pixels.append((y, x))
    frame = pd.DataFrame(rows)
    write_table(path / table, frame)
    return FakeCellProfiler(path, path / table, frame, np.array(pixels), images)


@pytest.fixture
def cellprofiler_folder(tmp_path) -> Callable[..., FakeCellProfiler]:
    """Give a function that writes a CellProfiler folder, see :func:`make_cellprofiler`."""

    def make(name: str = "painting", **options) -> FakeCellProfiler:
        return make_cellprofiler(tmp_path / name, **options)

    return make


# ----------------------------------------------------------------------------- sources in memory


def ramp(height: int, width: int) -> np.ndarray:
    """Image of two channels, in which every pixel holds its own row and column, plus 1000."""
    return np.stack(np.mgrid[:height, :width]).astype(np.uint16) + 1000


def in_memory(pixels: np.ndarray, pixel_size: float, factors: tuple[int, ...] = (1,)) -> FieldImage:
    """Make a field image of ``pixels`` (C, H, W) and lower levels by averaging."""

    def reader(image: np.ndarray):
        def read(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
            height, width = image.shape[1:]
            assert 0 <= y0 < y1 <= height, (y0, y1, height)
            assert 0 <= x0 < x1 <= width, (x0, x1, width)
            return image[:, y0:y1, x0:x1].copy()

        return read

    levels = []
    for f in factors:
        c, height, width = pixels.shape
        h, w = height // f, width // f
        image = pixels[:, : h * f, : w * f].reshape(c, h, f, w, f).mean(axis=(2, 4))
        image = np.rint(image).astype(pixels.dtype)
        levels.append(Level(pixel_size * f, (h, w), reader(image)))
    return FieldImage(tuple(levels), pixels.dtype)


def make_source(
    positions: np.ndarray | int = 300,
    *,
    size: tuple[int, int] = (600, 800),
    pixel_size: float = 0.5,
    factors: tuple[int, ...] = (1, 2, 4),
    fields: int = 1,
    counts: np.ndarray | None = None,
    n_genes: int = 6,
    seed: int = 0,
) -> Source:
    """Make a source in memory of ramp images (see :func:`ramp`).

    ``positions`` are micrometres ``(n, 2)``, x first, or a number of cells drawn anywhere in the
    image. Cells are dealt to the fields in turn. Counts are 30 or more a cell unless given.
    """
    rng = np.random.default_rng(seed)
    if isinstance(positions, int):
        positions = rng.random((positions, 2)) * [size[1], size[0]] * pixel_size
    positions = np.asarray(positions, dtype=np.float64)
    n = len(positions)
    if counts is None:
        counts = rng.poisson(10, (n, n_genes)) + 5
    counts = np.asarray(counts)
    obs = pd.DataFrame(
        {
            "field": [f"f{i % fields}" for i in range(n)],
            "x_centroid": positions[:, 0],
            "y_centroid": positions[:, 1],
            "Metadata_Well": [f"W{i % 12:02d}" for i in range(n)],
        },
        index=pd.Index([f"cell{i}" for i in range(n)], dtype=object, name="cell_id"),
    )
    genes = pd.Index([f"ENSG{g:011d}" for g in range(counts.shape[1])], name="gene_id")
    return Source(
        kind="test",
        name="ramp",
        channels=("DNA", "RNA"),
        fields={
            f"f{k}": in_memory(ramp(*size) + np.uint16(10000 * k), pixel_size, factors)
            for k in range(fields)
        },
        obs=obs,
        counts=sparse.csr_matrix(counts.astype(np.float32)),
        var=pd.DataFrame({"symbol": [f"S{g}" for g in range(len(genes))]}, index=genes),
        identity="0" * 64,
    )


@pytest.fixture(scope="session")
def ramp_source() -> Callable[..., Source]:
    """Give a function that makes a source in memory, see :func:`make_source`."""
    return make_source


# ------------------------------------------------------------------------------- frozen features


@pytest.fixture(scope="session")
def draw_vit() -> Callable[[FeatureConfig], VisionTransformer]:
    """Give a function that makes torchvision's model with random weights, none of them zero."""

    def draw(config: FeatureConfig) -> VisionTransformer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vit = VisionTransformer(
                config.image_size,
                config.patch_size,
                config.num_layers,
                config.num_heads,
                config.hidden_dim,
                config.mlp_dim,
                num_classes=7,
            ).eval()
            for parameter in vit.parameters():
                torch.nn.init.normal_(parameter)
        return vit

    return draw
