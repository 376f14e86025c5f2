"""Simulated plates: Cell Painting-like fields of cells whose latent state sets looks and counts.

Four dimensions of the state show in the images; the fifth, ``hidden``, acts on genes only, so
that no model can predict a cell's expression perfectly and expression given the image has a real
(and for some genes bimodal) spread. The biology, how state becomes looks and genes and what each
treatment does, is fixed: plates differ by ``seed`` in their cells, wells and noise alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.special import softmax

from phenoseq.data.source import FieldImage, Level, Source
from phenoseq.errors import DataError

#: Stains of the images, in order.
CHANNELS = ("DNA", "RNA", "AGP", "Mito", "ER")
#: Dimensions of the latent state, each about standard normal in untreated cells and within
#: [-3, 3]: nucleus size and DNA content (two peaks, as of a cell cycle), cell area and
#: elongation, brightness and networking of mitochondria, brightness of ER, RNA and nucleoli, and
#: one (on or off) that no image shows.
STATE_NAMES = ("nuclear_size", "spread", "mito", "rna_er", "hidden")
#: Micrometres a pixel, and pixels a side of a field.
PIXEL_SIZE, FIELD_PX = 0.65, 384
#: Most cells that find room in a field, and most wells on a plate (16 x 24).
MAX_CELLS, MAX_WELLS = 60, 384

_BIOLOGY = 20240612  # the one seed of everything that all simulated plates share
_LIBRARY = 300.0  # expected counts of an average cell
_SHIFT = 1.5  # how far a treatment moves the mean state at effect 1, in standard deviations
_WELL_SD = 0.1
_OFFSET, _GAIN, _READ_SD = 200.0, 10.0, 15.0  # camera: counts, counts a photon, counts

Map = NDArray[np.float32]


@dataclass(frozen=True)
class SimulatedPlate:
    """A simulated plate with the truth behind it.

    Attributes
    ----------
    source
        Images, cells and counts, as a reader yields them (kind ``"simulated"``).
    rates
        True share of each gene in a cell's expression, ``(n_obs, n_genes)`` float32; rows sum to 1.
    library
        True expected total counts, ``(n_obs,)`` float32.
    state
        Latent state, ``(n_obs, len(STATE_NAMES))`` float32.
    """

    source: Source
    rates: NDArray[np.float32]
    library: NDArray[np.float32]
    state: NDArray[np.float32]


def simulate_plate(
    *,
    seed: int = 0,
    treatments: Sequence[str] = ("DMSO", "drugA", "drugB", "drugC"),
    wells_per_treatment: int = 3,
    sites_per_well: int = 2,
    cells_per_site: int = 20,
    n_genes: int = 60,
    effect: float = 1.0,
    inactive: Sequence[str] = (),
) -> SimulatedPlate:
    """Simulate a plate; images are drawn when read, so memory does not grow with their number.

    Counts are negative binomial around ``rates * library``, with about 300 expected in a cell,
    more in larger ones. Equal arguments give equal plates, and a plate with more wells per
    treatment, sites or genes keeps the states of the cells that it had.

    Parameters
    ----------
    seed
        Which plate: its cells, well effects and noise.
    treatments
        Names, the control first. Any other name moves the mean of the four visible dimensions of
        the state in a direction of its own, the same on every plate.
    wells_per_treatment, sites_per_well, cells_per_site
        Size of the plate: at most 384 wells and 60 cells in a site (a field of 250 x 250 um).
    n_genes
        Number of genes; the first ones react to the state in the same way whatever their number.
    effect
        Strength of the treatments; at 0 none does anything.
    inactive
        Treatments that do nothing, at any strength.

    Returns
    -------
    The plate, whose ``obs`` has ``field``, ``x_centroid``, ``y_centroid`` (micrometres) and
    ``Metadata_Plate``, ``_Well``, ``_Site``, ``_Treatment`` and ``_Replicate``.

    Raises
    ------
    DataError
        Where a number is too small or too large, or treatments are missing, empty or repeated.

    Examples
    --------
    >>> plate = simulate_plate(seed=1, wells_per_treatment=1, sites_per_well=1, cells_per_site=4)
    >>> len(plate.source.obs), plate.source.channels, plate.rates.shape
    (16, ('DNA', 'RNA', 'AGP', 'Mito', 'ER'), (16, 60))
    """
    names = (treatments,) if isinstance(treatments, str) else tuple(treatments)
    numbers = {
        "seed": (seed, 0, 2**32 - 1),
        "wells_per_treatment": (wells_per_treatment, 1, MAX_WELLS // max(len(names), 1)),
        "sites_per_well": (sites_per_well, 1, 999),
        "cells_per_site": (cells_per_site, 1, MAX_CELLS),
        "n_genes": (n_genes, 1, 99_999),
        "effect": (effect, 0, 10),
    }
    _check(names, numbers)
    if unknown := set(inactive) - set(names[1:]):
        raise DataError(f"simulated plate: inactive {sorted(unknown)} are none of the treatments")

    plate, drawn = f"plate{seed}", []
    for well in range(len(names) * wells_per_treatment):  # replicate by replicate
        treatment, replicate = names[well % len(names)], well // len(names) + 1
        well_name = f"{'ABCDEFGHIJKLMNOP'[well // 24]}{well % 24 + 1:02d}"
        well_rng = np.random.default_rng([seed, well])
        mean = _WELL_SD * well_rng.standard_normal(len(STATE_NAMES))
        if treatment not in (names[0], *inactive):
            mean += effect * _treatment_shift(treatment)
        for site in range(1, sites_per_well + 1):
            rng = np.random.default_rng([seed, well, site])
            state = _draw_state(rng, mean, cells_per_site)
            centres = _place(rng, state)
            rate = expression_rates(state, n_genes)
            library = _draw_library(rng, state)
            field = f"{plate}-{well_name}-s{site}"
            ids = [f"{field}-{i:03d}" for i in range(cells_per_site)]
            columns = {
                "field": field,
                "x_centroid": centres[:, 1],
                "y_centroid": centres[:, 0],
                "Metadata_Plate": plate,
                "Metadata_Well": well_name,
                "Metadata_Site": site,
                "Metadata_Treatment": treatment,
                "Metadata_Replicate": replicate,
            }
            cells = pd.DataFrame(columns, index=pd.Index(ids, name="cell_id", dtype=object))
            counts = sparse.csr_matrix(_draw_counts(rng, rate * library[:, None]))
            drawn.append((cells, state, rate, library, counts))

    tables, *arrays, matrices = zip(*drawn, strict=True)
    obs, matrix = pd.concat(tables), sparse.vstack(matrices, format="csr")
    state, rates, library = (np.concatenate(array) for array in arrays)
    arguments: dict[str, Any] = {name: value for name, (value, _, _) in numbers.items()}
    if inactive:
        arguments["inactive"] = sorted(inactive)
    described = json.dumps({"treatments": names, **arguments}, default=float, sort_keys=True)
    digest = hashlib.sha256(f"{_BIOLOGY} {PIXEL_SIZE} {FIELD_PX} {described}".encode())
    for part, dtype in ((matrix.indptr, "<i8"), (matrix.indices, "<i8"), (matrix.data, "<f4")):
        digest.update(part.astype(dtype).tobytes())
    renderer = _Renderer(seed, obs, state)
    source = Source(
        kind="simulated",
        name=f"simulated {plate}",
        channels=CHANNELS,
        fields={str(field): renderer.image(str(field)) for field in obs["field"].unique()},
        obs=obs,
        counts=matrix,
        var=pd.DataFrame(
            {"symbol": [f"SIM{g:04d}" for g in range(1, n_genes + 1)]},
            index=pd.Index([f"SIMG{g:011d}" for g in range(1, n_genes + 1)], name="gene_id"),
        ),
        identity=digest.hexdigest(),
    )
    return SimulatedPlate(source, rates, library, state)


def expression_rates(state: NDArray[np.floating], n_genes: int) -> NDArray[np.float32]:
    """Return the true rates of ``n_genes`` genes for states, the same map on every plate.

    A softmax over genes of a base level plus linear, saturating (tanh) and pairwise terms of the
    state. Genes are in turn markers of one of the dimensions, or of none.

    Parameters
    ----------
    state
        ``(n, len(STATE_NAMES))``.
    n_genes
        Number of genes.

    Returns
    -------
    ``(n, n_genes)`` float32, rows sum to 1.
    """
    n_dims = len(STATE_NAMES)
    pairs = np.triu_indices(n_dims, 1)
    mixing = np.random.default_rng([_BIOLOGY, 0]).standard_normal((n_dims, 4))
    z = np.asarray(state, dtype=np.float64)
    terms = np.concatenate([z, np.tanh(z @ mixing), z[:, pairs[0]] * z[:, pairs[1]]], axis=1)
    draws = np.random.default_rng([_BIOLOGY, 1]).standard_normal((n_genes, 1 + terms.shape[1]))
    scale = np.repeat([0.12, 0.3, 0.04], [n_dims, mixing.shape[1], len(pairs[0])])
    weights = draws[:, 1:] * scale
    marker = np.arange(n_genes) % (n_dims + 1)
    has = np.flatnonzero(marker < n_dims)
    weights[has, marker[has]] += 0.55 * np.where(weights[has, marker[has]] < 0, -1, 1)
    logits = 0.8 * draws[:, 0] + terms @ weights.T
    rates: Map = softmax(logits, axis=1).astype(np.float32)
    return rates


def _check(names: tuple[str, ...], numbers: Mapping[str, tuple[float, float, float]]) -> None:
    if not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise DataError(f"simulated plate: give treatments by name, control first (have {names})")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"simulated plate: treatments named twice: {twice}; name each once")
    if len(names) > MAX_WELLS:
        raise DataError(f"simulated plate: {len(names)} treatments, but {MAX_WELLS} wells")
    for name, (value, low, high) in numbers.items():
        whole = isinstance(value, int | np.integer) or name == "effect"
        if not whole or not low <= value <= high:
            kind = "number" if name == "effect" else "whole number"
            raise DataError(f"simulated plate: {name} is {value}; give a {kind}, {low} to {high}")


def _treatment_shift(name: str) -> NDArray[np.float64]:
    """Mean state under a treatment at effect 1, from its name alone; ``hidden`` stays."""
    direction = np.random.default_rng([_BIOLOGY, 2, *name.encode()]).standard_normal(4)
    return np.append(_SHIFT * direction / np.linalg.norm(direction), 0.0)


def _draw_state(rng: np.random.Generator, mean: NDArray[np.float64], n: int) -> Map:
    state = rng.standard_normal((n, len(STATE_NAMES)))
    peaks = rng.random((n, 2))
    state[:, 0] = 0.55 * state[:, 0] + np.where(peaks[:, 0] < 0.65, -0.6, 1.1)
    state[:, 4] = 0.4 * state[:, 4] + np.where(peaks[:, 1] < 0.5, -0.9, 0.9)
    return np.clip(state + mean, -3, 3).astype(np.float32)


def _nuclear_radius(state: Map) -> Map:
    out: Map = 7.2 * np.exp(0.13 * state[:, 0])  # micrometres
    return out


def _place(rng: np.random.Generator, state: Map) -> NDArray[np.float64]:
    """Throw darts for ``(n, 2)`` centres (y, x; micrometres) of nuclei that do not overlap."""
    reach = 1.3 * _nuclear_radius(state) + 0.7
    centres = np.empty((len(state), 2))
    for i in range(len(state)):
        darts = rng.uniform(0.5, FIELD_PX - 0.5, (400, 2)) * PIXEL_SIZE
        apart = np.linalg.norm(darts[:, None] - centres[None, :i], axis=2) - reach[:i] - reach[i]
        gap = apart.min(axis=1, initial=np.inf)
        fits = gap > 0
        centres[i] = darts[np.argmax(fits) if fits.any() else np.argmax(gap)]
    return centres


def _draw_library(rng: np.random.Generator, state: Map) -> NDArray[np.float32]:
    log = 0.12 * state[:, 0] + 0.18 * state[:, 1] + 0.15 * rng.standard_normal(len(state))
    return (_LIBRARY * np.exp(log - 0.035)).astype(np.float32)


def _draw_counts(rng: np.random.Generator, mean: Map) -> NDArray[np.float32]:
    """Negative binomial as gamma-Poisson, dispersion (2 to 20) fixed for each gene."""
    draws = np.random.default_rng([_BIOLOGY, 3]).random(mean.shape[1])
    shape = 2.0 * 10.0**draws
    counts: NDArray[np.int64] = rng.poisson(rng.gamma(shape, mean / shape))
    return counts.astype(np.float32)


class _Renderer:
    """Draws the fields of one plate, each from (seed, field name), keeping the last four."""

    def __init__(self, seed: int, obs: pd.DataFrame, state: Map) -> None:
        self._seed = seed
        self._rows = obs.reset_index(drop=True).groupby("field", sort=False).indices
        self._centres = obs[["y_centroid", "x_centroid"]].to_numpy()
        self._state = state
        self._draw = functools.lru_cache(maxsize=4)(self._draw_field)
        # The microscope's stains and lamp: one gain and one centre of illumination a channel.
        rng = np.random.default_rng([seed, _BIOLOGY])
        self._gain = np.exp(0.04 * rng.standard_normal(len(CHANNELS), dtype=np.float32))
        self._lamp = rng.uniform(0.4, 0.6, (len(CHANNELS), 2)).astype(np.float32) * FIELD_PX

    def image(self, field: str) -> FieldImage:
        def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
            return self._draw(field)[:, y0:y1, x0:x1].copy()

        level = Level(PIXEL_SIZE, (FIELD_PX, FIELD_PX), read)
        return FieldImage(levels=(level,), dtype=np.dtype(np.uint16))

    def _draw_field(self, field: str) -> NDArray[np.uint16]:
        rng = np.random.default_rng([self._seed, *field.encode()])
        rows = self._rows[field]
        light = _stain(rng, self._centres[rows], self._state[rows])
        out = np.empty(light.shape, dtype=np.uint16)
        y, x = np.mgrid[:FIELD_PX, :FIELD_PX].astype(np.float32)
        for c, (gain, lamp) in enumerate(zip(self._gain, self._lamp, strict=True)):
            falloff = 1 - 0.25 * ((y - lamp[0]) ** 2 + (x - lamp[1]) ** 2) / (FIELD_PX**2 / 2)
            photons = gain * falloff * gaussian_filter(light[c], 0.8)
            noise = rng.standard_normal(photons.shape, dtype=np.float32)  # shot (normal) and read
            noise *= np.sqrt(_GAIN**2 * photons + _READ_SD**2)
            out[c] = np.clip(_OFFSET + _GAIN * photons + noise, 0, 65535)
        return out


def _texture(rng: np.random.Generator, sigma: float) -> Map:
    """Smooth noise of standard deviation 1 over a field."""
    noise: Map = rng.standard_normal((FIELD_PX, FIELD_PX), dtype=np.float32)
    noise = gaussian_filter(noise, sigma, mode="wrap", truncate=3)
    noise /= noise.std()
    return noise


def _stain(rng: np.random.Generator, centres: NDArray[np.float64], state: Map) -> Map:
    """Draw cells: expected photons ``(C, H, W)`` before optics.

    Each pixel belongs to the cell to which it is nearest, measured from the edge of the nucleus
    (0) to that of the cell (1), so that neighbours meet along a seam. ``wobble`` and ``phase``
    are looks that no gene explains.
    """
    n = len(state)
    z = state[:, :4].T
    wobble = np.exp(0.08 * rng.standard_normal((8, n), dtype=np.float32))
    phase = rng.uniform(0, 2 * np.pi, (10, n)).astype(np.float32)
    radius = _nuclear_radius(state) * np.sqrt(wobble[0])
    aspect = np.exp(0.3 + 0.18 * z[1]) * wobble[1]
    body = 20 * np.exp(0.17 * z[1] + 0.05 * z[0]) * wobble[2]
    depth, edge, owner = _territories(centres, radius, body, aspect, phase[:6])

    y, x = np.mgrid[:FIELD_PX, :FIELD_PX].astype(np.float32) + np.float32(0.5)
    cy, cx = centres.astype(np.float32).T
    dy, dx = y * PIXEL_SIZE - cy[owner], x * PIXEL_SIZE - cx[owner]
    inside = np.clip((1 - depth) * 4, 0, 1)
    nucleus = np.clip(0.5 - edge / 0.9, 0, 1)
    cytoplasm = inside * (1 - nucleus)
    thick = cytoplasm * np.exp(-1.3 * np.clip(depth, 0, 1))
    rim = np.exp(-(((depth - 0.9) / 0.12) ** 2)) * inside

    def spot(angle: Map, distance: Map, size: float) -> Map:
        """One bright spot in each cell, ``distance`` and ``size`` in micrometres."""
        sy, sx = distance * np.sin(angle), distance * np.cos(angle)
        out: Map = np.exp(-((dy - sy[owner]) ** 2 + (dx - sx[owner]) ** 2) / (2 * size**2))
        return out

    fine, mid, coarse = (_texture(rng, sigma) for sigma in (1.0, 2.2, 7.0))
    mesh = 1 + 0.25 * fine + 0.25 * mid
    nucleoli = nucleus * sum(spot(phase[6 + k], 0.5 * radius, 1.1 + 0.2 * k) for k in range(3))
    golgi = cytoplasm * spot(phase[9], radius + 2, 3.2) * np.clip(1 + 0.6 * mid, 0.2, 3)
    strands = gaussian_filter1d(rng.standard_normal(8192), 3.0)
    across = dx * np.sin(phase[0])[owner] - dy * np.cos(phase[0])[owner] + 1.2 * coarse
    fibres = np.clip(strands / strands.std(), 0, 3)[(across * 8).astype(np.int64) % 8192]
    fibres = fibres * cytoplasm * (0.6 + 0.4 * np.tanh(2 * _texture(rng, 6.0)))
    network = 1.9 * np.exp(-((_texture(rng, 1.7) / 0.35) ** 2))
    grains = 2.6 * np.clip(_texture(rng, 1.3) - 0.6, 0, 2)
    fused = (1 / (1 + np.exp(-1.5 * z[2])))[owner]
    mitochondria = thick * (fused * network + (1 - fused) * grains + 0.15)

    dna = (90 * np.exp(0.14 * z[0]) * wobble[3])[owner]
    rna = (45 * np.exp(0.3 * z[3]) * wobble[4])[owner]
    agp = (40 * wobble[5])[owner]
    pull = (0.7 * np.exp(0.35 * z[1]))[owner]  # spread cells have more stress fibres
    mito = (75 * np.exp(0.35 * z[2]) * wobble[6])[owner]
    er = (65 * np.exp(0.3 * z[3]) * wobble[7])[owner]
    chromatin = nucleus * (1 + 0.12 * mid + 0.12 * fine - 0.3 * np.clip(nucleoli, 0, 1))
    light = [
        3 + dna * chromatin + 3 * cytoplasm,
        5 + rna * (thick * mesh + 0.45 * nucleus + 1.8 * nucleoli),
        6 + agp * (0.4 * inside + rim * (0.7 + 0.3 * mid) + 2.2 * golgi + pull * fibres),
        4 + mito * mitochondria,
        6 + er * (1.5 * thick * mesh + 0.25 * nucleus),
    ]
    return np.maximum(np.array(light, dtype=np.float32), np.float32(0.5))


def _territories(
    centres: NDArray[np.float64], radius: Map, body: Map, aspect: Map, phase: Map
) -> tuple[Map, Map, NDArray[np.int64]]:
    """Share a field among cells with lumpy elliptic outlines.

    Returns, for each pixel, how deep into its cell it lies (0 edge of the nucleus, 1 edge of the
    cell), how far from the edge of the nucleus (micrometres), and whose it is.
    """
    depth = np.full((FIELD_PX, FIELD_PX), 4, dtype=np.float32)
    edge, owner = depth + 50, np.zeros(depth.shape, dtype=np.int64)
    y, x = np.mgrid[:FIELD_PX, :FIELD_PX].astype(np.float32) + np.float32(0.5)
    angles = np.linspace(0, 2 * np.pi, 512, endpoint=False, dtype=np.float32)
    for i, centre in enumerate(centres.astype(np.float32)):
        bumps = sum(0.3 / k * np.cos(k * angles + phase[k, i]) for k in range(1, 6))
        nucleus = _ellipse(radius[i], 1 + 0.35 * (aspect[i] - 1), angles - phase[0, i])
        cell = _ellipse(body[i], aspect[i], angles - phase[0, i]) * (1 + bumps)
        cell = np.maximum(cell, nucleus + 2.5)
        reach = cell.max()
        box = tuple(
            slice(max(int((m - reach) / PIXEL_SIZE), 0), int((m + reach) / PIXEL_SIZE) + 1)
            for m in centre
        )
        dy, dx = y[box] * PIXEL_SIZE - centre[0], x[box] * PIXEL_SIZE - centre[1]
        toward = (np.arctan2(dy, dx) * (512 / (2 * np.pi))).astype(np.int64) % 512
        beyond = np.hypot(dy, dx) - nucleus[toward]
        here = beyond / (cell - nucleus)[toward]
        mine = here < depth[box]
        depth[box][mine], edge[box][mine], owner[box][mine] = here[mine], beyond[mine], i
    return depth, edge, owner


def _ellipse(radius: float, aspect: float, angle: Map) -> Map:
    """Distance to the edge of an ellipse of the area of a circle of ``radius``, by direction."""
    long, short = radius * math.sqrt(aspect), radius / math.sqrt(aspect)
    return np.asarray(1 / np.hypot(np.cos(angle) / long, np.sin(angle) / short), np.float32)
