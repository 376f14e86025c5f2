"""Small MERSCOPE output folders and plain folders of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

#: Neighbouring 64-bit ids, which fall together when they pass through a float.
FIRST_ID = 112824700230101249


@dataclass(frozen=True)
class FakeMerscope:
    """A MERSCOPE output folder and what is in it.

    The pixel in the middle of each cell is ``10 * (cell + 1) + index of the stain``.
    """

    path: Path
    pixel_size: float
    corner: tuple[float, float]
    pixels: np.ndarray  # (n, 2) y and x of the centre pixel of each cell
    cells: pd.DataFrame  # center_x and center_y as in the table, indexed by id
    counts: pd.DataFrame  # genes only, in the order of the cells
    stains: dict[int, tuple[str, ...]]

    def manifest(self, **changes) -> None:
        """Rewrite the manifest; a value of None removes the key."""
        path = self.path / "images" / "manifest.json"
        stated = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))


def make_merscope(
    path: Path,
    *,
    stains: Mapping[int, tuple[str, ...]] | None = None,
    n_cells: int = 12,
    size: tuple[int, int] = (90, 120),
    transform: bool = False,
    dtype: str = "uint16",
    **options,
) -> FakeMerscope:
    """Write a MERSCOPE output folder; ``options`` are tifffile's."""
    (path / "images").mkdir(parents=True)
    stains = dict(stains or {3: ("Cellbound1", "DAPI", "PolyT")})
    rng = np.random.default_rng(3)
    pixel_size, corner, (height, width) = 0.108, (6499.9, -120.4), size
    spots = rng.permutation((height // 9) * (width // 9))[:n_cells]
    pixels = np.stack(np.divmod(spots, width // 9), axis=1) * 9 + 4
    for z, names in stains.items():
        for c, stain in enumerate(names):
            image = np.zeros(size, dtype=dtype)
            image[tuple(pixels.T)] = 10 * (np.arange(n_cells) + 1) + c
            file = path / "images" / f"mosaic_{stain}_z{z}.tif"
            tifffile.imwrite(file, image, photometric="minisblack", metadata=None, **options)
    x0, y0 = corner
    box = [x0, y0, x0 + width * pixel_size, y0 + height * pixel_size]
    manifest = {
        "microns_per_pixel": pixel_size,
        "mosaic_width_pixels": width,
        "mosaic_height_pixels": height,
        "bbox_microns": box,
    }
    (path / "images" / "manifest.json").write_text(json.dumps(manifest))
    if transform:
        write_transform(path, 1 / pixel_size, corner)
    ids = pd.Index([str(FIRST_ID + i) for i in range(n_cells)], name="EntityID", dtype=object)
    centre = (pixels + 0.5) * pixel_size
    cells = pd.DataFrame(
        {
            "fov": np.nan,
            "volume": 500.5,
            "center_x": centre[:, 1] + x0,
            "center_y": centre[:, 0] + y0,
        },
        index=ids,
    )
    cells.to_csv(path / "cell_metadata.csv")
    counts = pd.DataFrame(rng.poisson(3, (n_cells, 5)), ids, [f"GENE{g}" for g in range(5)])
    blank = pd.DataFrame(99, ids, ["Blank-1", "Blank-20"])
    table = pd.concat([counts.iloc[:, :3], blank, counts.iloc[:, 3:]], axis=1)
    table.iloc[rng.permutation(n_cells)].rename_axis("cell").to_csv(path / "cell_by_gene.csv")
    return FakeMerscope(path, pixel_size, corner, pixels, cells, counts, stains)


def write_transform(path: Path, scale: float, corner: tuple[float, float]) -> None:
    rows = [[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale], [0, 0, 1]]
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    (path / "images" / "micron_to_mosaic_pixel_transform.csv").write_text(text + "\n")


@pytest.fixture
def merscope_folder(tmp_path) -> Callable[..., FakeMerscope]:
    """Give a function that writes a MERSCOPE output folder, see :func:`make_merscope`."""

    def make(name: str = "merscope", **options) -> FakeMerscope:
        return make_merscope(tmp_path / name, **options)

    return make


# ---------------------------------------------------------------------------- folders of images


def write_field(folder: Path, names: Mapping[str, int], **options) -> None:
    """Write a file for each name, of 40 x 50 pixels of one value."""
    for name, value in names.items():
        image = np.full((40, 50), value, dtype=np.uint16)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, image, photometric="minisblack", metadata=None, **options)


def nuclei(n: int = 3, shape: tuple[int, int] = (60, 200)) -> np.ndarray:
    """Return an image of ``n`` discs of 12 pixels, at y 30 and x 20, 50, 80 and so on."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = 100 + np.random.default_rng(0).integers(0, 9, shape)
    for k in range(n):
        image[np.hypot(y - 30, x - 20 - 30 * k) < 6] = 2000
    return image.astype(np.uint16)


@pytest.fixture
def image_folder(tmp_path) -> Callable[..., Path]:
    """Give a function that writes a folder of files, each of one value, see :func:`write_field`."""

    def make(names: Mapping[str, int], name: str = "images", **options) -> Path:
        write_field(tmp_path / name, names, **options)
        return tmp_path / name

    return make


@pytest.fixture
def plate(tmp_path) -> Callable[..., Path]:
    """Give a function that writes ``n`` fields ``A01`` and so on, of DNA (with nuclei) and ER."""

    def make(n: int, name: str = "plate", **options) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for k in range(n):
            for stain, image in (("DAPI", nuclei(k + 1)), ("ER", np.full((60, 200), k))):
                path = folder / f"A{k + 1:02d}_{stain}.tif"
                tifffile.imwrite(path, image.astype(np.uint16), metadata=None, **options)
        return folder

    return make
