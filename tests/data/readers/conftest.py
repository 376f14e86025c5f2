"""Small fake data for the readers of zarr, tables and images by region, and a local web server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
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


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        self.server.paths.append((self.command, self.path))


@pytest.fixture
def web(tmp_path) -> Iterator[ThreadingHTTPServer]:
    """Serve ``tmp_path`` on 127.0.0.1; the server has ``url`` and ``paths``, the requests seen."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
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
