"""Small fake data for the readers: MERSCOPE, plain folders, Zarr, tables, a local web server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

STAINS = ("Hoechst 33342", "ConA", "MitoTracker")


def draw_field(seed: int, size: tuple[int, int] = (120, 150), n: int = 9, channels: int = 3):
    """Draw squares of 7 x 7 pixels on a grid; return pixels ``(C, Y, X)``, labels, centres (y, x).

    Label ``l`` has the value ``10 * l + c`` in channel ``c``; all else is 0.
    """
    rng = np.random.default_rng(seed)
    columns = 3
    rows = -(-n // columns)
    labels = np.zeros(size, dtype=np.uint32)
    pixels = np.zeros((channels, *size), dtype=np.uint16)
    centres = np.empty((n, 2))
    for k in range(n):
        cell = np.array([k // columns, k % columns]) * np.array(size) // [rows, columns]
        y, x = cell + np.array(size) // [2 * rows, 2 * columns] + rng.integers(-6, 7, 2)
        labels[y - 3 : y + 4, x - 3 : x + 4] = k + 1
        pixels[:, y - 3 : y + 4, x - 3 : x + 4] = (10 * (k + 1) + np.arange(channels))[
            :, None, None
        ]
        centres[k] = y + 0.5, x + 0.5
    return pixels, labels, centres


def set_attributes(path: Path, attributes: dict, version: str) -> None:
    """Write the attributes of a group as NGFF ``version`` does, making the group."""
    group = zarr.open_group(path, mode="a", zarr_format=2 if version == "0.4" else 3)
    if version == "0.4":
        group.attrs.put(attributes)
    else:
        group.attrs.put({"ome": {"version": version, **attributes}})


def write_multiscale(
    path: Path,
    pixels: np.ndarray,
    *,
    version: str = "0.4",
    axes: str = "cyx",
    pixel_size: float | None = 0.5,
    unit: str | None = "micrometer",
    levels: int = 2,
    chunk: int = 64,
    names: tuple[str, ...] | None = STAINS,
    **extra,
) -> None:
    """Write one multiscale image, ``pixels`` in the order of ``axes``, its levels by striding."""
    datasets = []
    path.mkdir(parents=True, exist_ok=True)
    for k in range(levels):
        step = 2**k
        level = pixels[..., ::step, ::step]
        zarr.create_array(
            path / str(k),
            data=level,
            chunks=(1,) * (pixels.ndim - 2) + (chunk, chunk),
            zarr_format=2 if version == "0.4" else 3,
            chunk_key_encoding={"name": "v2", "separator": "/"} if version == "0.4" else None,
        )
        scale = [1.0] * (pixels.ndim - 2) + [step * (pixel_size or 1.0)] * 2
        datasets.append(
            {"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        )
    kinds = {"t": "time", "c": "channel"}
    stated = [
        {"name": a, "type": kinds.get(a, "space")} | ({"unit": unit} if a in "zyx" and unit else {})
        for a in axes
    ]
    image = {"axes": stated, "datasets": datasets}
    if version == "0.4":
        image["version"] = version
    attributes = {"multiscales": [image], **extra}
    if names is not None:
        attributes["omero"] = {"channels": [{"label": name} for name in names]}
    set_attributes(path, attributes, version)


def write_labels(image: Path, labels: np.ndarray, *, name: str = "cells", version: str, **options):
    """Write a label image under ``labels/`` of an image, adding to its list."""
    axes = options.pop("axes", "yx")
    write_multiscale(
        image / "labels" / name, labels, version=version, axes=axes, names=None, **options
    )
    listed = sorted(p.name for p in (image / "labels").iterdir() if p.is_dir())
    set_attributes(image / "labels", {"labels": listed}, version)


def write_plate(
    path: Path,
    *,
    wells: tuple[str, ...] = ("A/1", "B/02"),
    sites: tuple[str, ...] = ("0", "1"),
    version: str = "0.4",
    name: str = "plate 1",
    labels: bool = True,
    **options,
) -> dict[str, np.ndarray]:
    """Write a plate; return the centres ``(n, 2)`` (y, x; pixels) of the cells of each field."""
    centres = {}
    rows, columns = (sorted({w.split("/")[k] for w in wells}) for k in (0, 1))
    plate = {
        "name": name,
        "rows": [{"name": row} for row in rows],
        "columns": [{"name": column} for column in columns],
        "wells": [
            {
                "path": well,
                "rowIndex": rows.index(well.split("/")[0]),
                "columnIndex": columns.index(well.split("/")[1]),
            }
            for well in wells
        ],
    }
    set_attributes(path, {"plate": plate}, version)
    for i, well in enumerate(wells):
        set_attributes(path / well, {"well": {"images": [{"path": s} for s in sites]}}, version)
        for j, site in enumerate(sites):
            pixels, masks, where = draw_field(10 * i + j)
            write_multiscale(path / well / site, pixels, version=version, **options)
            if labels:
                write_labels(path / well / site, masks, version=version, levels=1)
            centres[f"{well}/{site}"] = where
    return centres


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, a client that asks for many chunks at once waits for a second


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        self.server.paths.append((self.command, self.path))


@pytest.fixture
def web(tmp_path) -> Iterator[ThreadingHTTPServer]:
    """Serve ``tmp_path`` on 127.0.0.1; the server has ``url`` and ``paths``, the requests seen."""
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    server.paths, server.daemon_threads = [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.fixture(scope="session")
def fake():
    """Give the functions of this module that write fake data."""
    import types

    return types.SimpleNamespace(
        field=draw_field,
        multiscale=write_multiscale,
        labels=write_labels,
        plate=write_plate,
        attributes=set_attributes,
        edit=edit_json,
    )


# ------------------------------------------------------------------------------------- MERSCOPE

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
