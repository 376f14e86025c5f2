"""The report: one page that opens offline, with everything it shows inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from sklearn.decomposition import PCA

from phenoseq.data.store import Store
from phenoseq.evaluation import pairs
from phenoseq.evaluation.html import write_html
from phenoseq.evaluation.report import COLUMNS, Scores, as_json
from phenoseq.evaluation.scoring import Result
from phenoseq.evaluation.tables import Prediction, Truth

#: Most cells in a scatter, most numbers in it, and most genes; so that the page stays small.
_CELLS, _NUMBERS, _GENES = 1500, 500_000, 2000
_EMBEDDED, _COMPONENTS, _MATRIX = 1500, 30, 40
#: Cells in each row of the gallery, and their side on the page in pixels.
_GALLERY, _SIDE = 4, 128

Rows = NDArray[np.int64]


def write_page(
    path: Path,
    truth: Truth,
    model: Prediction,
    scores: Sequence[Scores],
    results: Sequence[Result],
    facts: dict[str, Any],
    store: Store | None,
    *,
    seed: int = 0,
) -> None:
    """Write the report, whole or not at all.

    Parameters
    ----------
    path
        ``report.html``.
    truth, model
        What is drawn.
    scores, results
        Of the model and the baselines, the model first.
    facts
        What the scores rest on.
    store
        With the crops of the cells, for the gallery; without it there is none.
    seed
        Of the cells that are drawn.
    """
    genes = _shown_genes(truth)
    most = min(_CELLS, max(_NUMBERS // len(genes), 100))
    cells = pairs.subsample(len(truth), seed, most).numpy()
    true, mean, draw = truth.take(cells), model.take_mean(cells), model.take_draw(cells)
    names = truth.var["symbol"].astype(str).to_numpy()[truth.genes]
    data = {
        "facts": facts,
        "columns": [
            [name, heading.replace("`", ""), digits]
            for name, heading, digits in COLUMNS
            if name not in ("pcc_gene_mean", "pcc_gene_top50")  # which are in the tables
        ],
        "scores": as_json(list(scores), {})["scores"],
        "genes": _gene_table(names, results),
        "shown": genes.tolist(),
        "scatter": {"true": _packed(true[:, genes]), "mean": _packed(mean[:, genes])},
        "embedding": _embedding(true, draw, seed),
        "coexpression": _coexpression(truth, names, results[0]),
        "calibration": {
            r.name: {"pit": r.calibration.pit, "pit_common": r.calibration.pit_common}
            for r in results
            if r.calibration is not None
        },
        "map": _places(truth, cells),
        "gallery": [] if store is None else _gallery(truth, model, results[0], names, store),
    }
    write_html(path, "page", f"{facts.get('model', model.name)}: evaluation", data)


def _shown_genes(truth: Truth) -> Rows:
    """Return the scored genes whose cells are drawn: all, or those seen most."""
    n = int(truth.genes.sum())
    if n <= _GENES:
        return np.arange(n)
    some = truth.take(pairs.subsample(len(truth), 0, _CELLS).numpy())
    return np.sort(np.argsort(-(some > 0).sum(axis=0), kind="stable")[:_GENES])


def _gene_table(names: NDArray[Any], results: Sequence[Result]) -> dict[str, Any]:
    return {
        "symbol": names.tolist(),
        "methods": [r.name for r in results],
        "pcc": [np.round(r.pcc_gene, 3).tolist() for r in results],
    }


def _packed(values: NDArray[np.float32]) -> dict[str, Any]:
    """Pack values at or above zero, by gene, as bytes in base64."""
    top = max(float(values.max()), 1e-6)
    steps = np.rint(np.clip(values, 0, None).T / top * 255).astype(np.uint8)
    return {"top": top, "bytes": base64.b64encode(steps.tobytes()).decode(), "n": len(values)}


def _embedding(true: NDArray[np.float32], draw: NDArray[np.float32], seed: int) -> dict[str, Any]:
    """Place true and drawn cells together: by UMAP where it is installed, else by PCA."""
    both = np.concatenate([true[:_EMBEDDED], draw[:_EMBEDDED]])
    k = min(_COMPONENTS, *true.shape)
    axes = PCA(k, random_state=seed, svd_solver="randomized").fit(true).transform(both)
    how = "PCA"
    try:
        from umap import UMAP
    except ImportError:
        axes = axes[:, :2]
    else:
        how = "UMAP"
        axes = UMAP(random_state=seed, n_jobs=1).fit_transform(axes)
    axes = np.round(np.column_stack([axes, np.zeros(len(axes))])[:, :2].astype(float), 3)
    n = min(len(true), _EMBEDDED)
    return {"how": how, "true": axes[:n].T.tolist(), "draw": axes[n:].T.tolist()}


def _coexpression(truth: Truth, names: NDArray[Any], result: Result) -> dict[str, Any]:
    """Return the correlations of those genes that are correlated most, like beside like."""
    true, predicted = result.coexpression
    strength = np.abs(true - np.eye(len(true))).mean(axis=0)
    some = np.argsort(-strength, kind="stable")[:_MATRIX]
    if len(some) > 2:
        some = some[leaves_list(linkage(true[np.ix_(some, some)], "average"))]
    block = np.ix_(some, some)
    return {
        "genes": names[some].tolist(),
        "true": np.round(true[block], 3).tolist(),
        "predicted": np.round(predicted[block], 3).tolist(),
    }


def _places(truth: Truth, cells: Rows) -> dict[str, Any] | None:
    """Return where the drawn cells are: their wells on a plate, or their place in the tissue."""
    obs = truth.obs.iloc[cells]
    if "Metadata_Well" in obs:
        plates = obs["Metadata_Plate"] if "Metadata_Plate" in obs else pd.Series("", obs.index)
        well = obs["Metadata_Well"].astype(str).tolist()
        return {"kind": "plate", "plate": plates.astype(str).tolist(), "well": well}
    if "x_centroid" in obs and "y_centroid" in obs:
        x, y = (
            np.round(obs[c].to_numpy(dtype=float), 1).tolist() for c in ("x_centroid", "y_centroid")
        )
        return {"kind": "tissue", "x": x, "y": y}
    return None


def _gallery(
    truth: Truth, model: Prediction, result: Result, names: NDArray[Any], store: Store
) -> list[dict[str, Any]]:
    """Return the cells that are predicted best, in the middle and worst, with their crops."""
    order = np.argsort(result.cell_scores, kind="stable")
    order = order[np.isfinite(result.cell_scores[order])]
    if len(order) < 3 * _GALLERY:
        return []
    middle = (len(order) - _GALLERY) // 2
    rows = {
        "best": order[:_GALLERY],
        "median": order[middle : middle + _GALLERY],
        "worst": order[-_GALLERY:],
    }
    cells = np.concatenate(list(rows.values()))
    found = store.obs().index.get_indexer(truth.obs.index[cells])
    if (found < 0).any():
        return []
    images = _composites(store.take(found.astype(np.int64)))
    true, mean = truth.take(cells), model.take_mean(cells)
    out = []
    for k, cell in enumerate(cells):
        top = np.argsort(-true[k], kind="stable")[:5]
        out.append(
            {
                "kind": list(rows)[k // _GALLERY],
                "cell": str(truth.obs.index[cell]),
                "score": round(float(result.cell_scores[cell]), 3),
                "counts": int(truth.total[cell]),
                "image": images[k],
                "genes": [
                    [str(names[g]), round(float(true[k, g]), 2), round(float(mean[k, g]), 2)]
                    for g in top
                ],
                "stains": list(store.manifest.channels[:3]),
            }
        )
    return out


def _composites(crops: NDArray[Any]) -> list[str]:
    """Return crops as PNG in base64: the first stains in blue, green and red."""
    shown = crops[:, :3].astype(np.float32)
    low, high = np.percentile(shown, [1, 99.8], axis=(0, 2, 3))
    scale = (high - low).clip(1e-6)[:, None, None]
    colours = np.zeros((len(crops), 3, *crops.shape[2:]), dtype=np.float32)
    colours[:, : shown.shape[1]] = ((shown - low[:, None, None]) / scale).clip(0, 1)
    out = []
    for image in np.rint(255 * colours[:, ::-1].transpose(0, 2, 3, 1)).astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(image).resize((_SIDE, _SIDE)).save(file, "PNG")
        out.append(base64.b64encode(file.getvalue()).decode())
    return out
