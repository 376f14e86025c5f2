"""Centroids of shapes in well-known binary (OGC 06-103r4), as GeoParquet holds them."""

from __future__ import annotations

import struct

import numpy as np

_POINT, _POLYGON, _MULTIPOLYGON = 1, 3, 6


def centroid(geometry: bytes) -> tuple[float, float]:
    """Return x and y of the centroid of a point, polygon (holes left out) or multipolygon.

    Raises
    ------
    ValueError
        Where the bytes are truncated, or of another kind of shape.
    """
    try:
        area, x, y, end = _moments(bytes(geometry), 0)
    except struct.error as error:
        raise ValueError(f"truncated shape of {len(geometry)} bytes") from error
    if end != len(geometry):
        raise ValueError(f"shape of {len(geometry)} bytes ends at {end}")
    if area == 0:
        raise ValueError("shape without an area")
    return x / area, y / area


def _moments(data: bytes, at: int) -> tuple[float, float, float, int]:
    """Return area, its moments in x and y, and the end of the shape that begins at ``at``."""
    order = "<" if data[at : at + 1] == b"\x01" else ">"
    (code,) = struct.unpack_from(f"{order}I", data, at + 1)
    at += 5
    if code & 0x20000000:  # a reference system, as PostGIS adds it
        at += 4
    iso, kind = divmod(code & 0xFFFF, 1000)  # z, m or both: in thousands, or as PostGIS flags them
    width = 2 + (iso in (1, 3)) + (iso in (2, 3)) + bool(code & 1 << 31) + bool(code & 1 << 30)
    if kind == _POINT:
        x, y = struct.unpack_from(f"{order}2d", data, at)
        return 1.0, x, y, at + 8 * width
    if kind not in (_POLYGON, _MULTIPOLYGON):
        raise ValueError(f"shape of kind {kind}; points, polygons and multipolygons are read")
    (n,) = struct.unpack_from(f"{order}I", data, at)
    at += 4
    total = np.zeros(3)
    for k in range(n):
        if kind == _MULTIPOLYGON:
            *moments, at = _moments(data, at)
            total += moments
            continue
        (m,) = struct.unpack_from(f"{order}I", data, at)
        stop = at + 4 + 8 * width * m
        if stop > len(data):
            raise ValueError("truncated polygon")
        ring = np.frombuffer(data, f"{order}f8", width * m, at + 4).reshape(m, width)
        total += _ring(ring[:, 0], ring[:, 1]) * (1 if k == 0 else -1)
        at = stop
    return float(total[0]), float(total[1]), float(total[2]), at


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return area and its moments, from the first point so that large coordinates stay exact."""
    if not len(x):
        return np.zeros(3)
    u, v = x - x[0], y - y[0]
    cross = u[:-1] * v[1:] - u[1:] * v[:-1]
    area = cross.sum() / 2
    mx = ((u[:-1] + u[1:]) * cross).sum() / 6 + area * x[0]
    my = ((v[:-1] + v[1:]) * cross).sum() / 6 + area * y[0]
    return np.array([area, mx, my]) * (1 if area >= 0 else -1)
