"""The calls that most people need: predict, and score what was predicted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from phenoseq._version import __version__
from phenoseq.data.datamodule import split_of
from phenoseq.data.source import Source
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.errors import DataError
from phenoseq.evaluation.report import (
    MIN_COUNTS,
    Scores,
    as_json,
    markdown,
    normalised,
    score_all,
    scored_genes,
)
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import run
from phenoseq.inference.writer import check_out, write_whole
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.progress import bar
from phenoseq.training.baselines import fit_baselines
from phenoseq.zoo.registry import load_model


def predict(
    source: str | Path | Source | Store | NDArray[Any],
    *,
    model: str | Path | PhenoSeq,
    n_samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    channels: Sequence[str] | None = None,
    pixel_size: float | None = None,
    cells: str | Path | pd.DataFrame | None = None,
    keep_draws: bool = False,
) -> ad.AnnData:
    """Predict the gene expression of every cell of some images.

    Parameters
    ----------
    source
        A Xenium output folder (with or without its count matrix), a store made by
        ``phenoseq prepare``, an array of crops ``(n, C, H, W)`` with one cell in the middle of
        each, or an opened source or store. Where the pixel type is not that of the training
        images, each stain is scaled by percentiles of the whole source.
    model
        A name of the zoo, a folder, or a loaded model.
    n_samples
        Draws a cell.
    steps
        Evaluations of the denoiser a draw; by default the model's own number.
    seed
        Of the draws. They depend on (seed, cell id) alone, and not on batches or order.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    out
        ``.h5ad`` or ``.zarr`` to write as well, whole or not at all.
    channels
        For an array: the stain of each channel.
    pixel_size
        Micrometres a pixel: for an array, or a folder that does not say.
    cells
        For a folder: CSV (or table indexed by ``cell_id``) of ``cell_id``, ``x_centroid``,
        ``y_centroid`` in micrometres, the positions to predict at in place of the folder's own.
    keep_draws
        Keep every draw, as ``layers["draw_0"]`` and so on.

    Returns
    -------
    AnnData ``(n_obs, n_vars)``, every value on the scale of log1p of counts at the median library
    size of the training cells:

    - ``X`` expected expression, without counting noise, float32;
    - ``layers["std"]``, ``["q05"]``, ``["q95"]`` of the predictive distribution of a measured
      value, counting noise included, at the cell's predicted library size;
    - ``layers["draw"]`` one draw of a measured profile (CSR), counts divided by their own sum;
    - ``obsm["X_phenoseq"]`` mean latent; ``obsm["spatial"]`` micrometres;
    - ``obs`` positions, ``Metadata_*``, ``ood_score`` (about 1 for images like the training ones),
      ``missing_channels``, ``saturated``, ``cut_by_border``;
    - ``var`` indexed by Ensembl id, with ``symbol`` and ``reliability`` (held-out correlation);
    - ``uns["phenoseq"]`` how it was made.

    Raises
    ------
    DataError
        Where the source cannot be used as it is.
    ModelError
        Where there is no such model, or it does not fit.
    """
    path = check_out(out) if out is not None else None
    name = "" if isinstance(model, PhenoSeq) else str(model)
    loaded = model if isinstance(model, PhenoSeq) else load_model(model)
    inputs = open_inputs(
        source, loaded.config.image, channels=channels, pixel_size=pixel_size, cells=cells
    )
    with bar("predicting") as progress:
        result = run(
            loaded,
            inputs,
            n_samples=n_samples,
            steps=steps,
            seed=seed,
            device=device,
            keep_draws=keep_draws,
            progress=progress,
        )
    result.uns["phenoseq"]["model"] = name
    if path is not None:
        write_whole(result, path)
    return result


def evaluate(
    model: str | Path | PhenoSeq,
    store: str | Path,
    *,
    part: str = "test",
    n_samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
) -> list[Scores]:
    """Score a model and the baselines on a part of a store, by the split it was trained with.

    Parameters
    ----------
    model
        A name of the zoo, a folder, or a loaded model.
    store
        The store; where it is of the model's training data, the split must come out the same.
    part
        ``"test"``, ``"cal"``, ``"val"``, or a declared ``"test_NAME"``.
    n_samples, steps, seed, device
        As for :func:`phenoseq.predict`.
    out
        Folder for ``metrics.json``, ``metrics.md`` and ``genes.csv``.

    Returns
    -------
    Scores, the model's first.

    Raises
    ------
    DataError, ModelError
        Where the store has other genes, or its split differs from the one trained with.
    """
    name = "this model" if isinstance(model, PhenoSeq) else Path(model).name
    loaded = model if isinstance(model, PhenoSeq) else load_model(model)
    opened = Store(store)
    table = opened.table()
    config = loaded.config
    if tuple(table.var_names) != config.expression.genes:
        raise DataError(f"{store}: its genes are not those of {name}, in the same order")
    split = split_of(opened, table, SplitConfig(**config.training.split))  # type: ignore[arg-type]
    same = opened.manifest.identity == config.training.identity
    if same and split.digest != config.training.split_digest:
        raise DataError(
            f"{store}: divides its cells otherwise than {name} was trained with, so that its "
            "training cells would be scored; prepare the store with the same options"
        )
    median = config.expression.median_library
    train, rows = split.rows("train"), split.rows(part)
    rows = rows[table.obs["total_counts"].to_numpy()[rows] >= MIN_COUNTS]
    fitted = fit_baselines(opened, table, train, rows, median=median, seed=seed)
    inputs = open_inputs(opened, config.image, rows=rows)
    how = {"n_samples": n_samples, "steps": steps, "seed": seed, "device": device}
    with bar(f"predicting the {part} part") as progress:
        predicted = run(loaded, inputs, **how, progress=progress)  # type: ignore[arg-type]
    truth = normalised(table.X[rows], median)
    genes = scored_genes(table.X[train])
    scores, each = score_all(truth, {name: predicted, **fitted}, genes)
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "model": name,
            "data": opened.manifest.source,
            "data_identity": opened.manifest.identity,
            "split_digest": split.digest,
            "trained_on_this_data": same,
            "part": part,
            "n_cells": len(rows),
            "n_groups": len(np.unique(split.group[rows])),
            "n_genes": int(genes.sum()),
            "n_samples": n_samples,
            "steps": config.diffusion.steps if steps is None else steps,
            "seed": seed,
            "phenoseq_version": __version__,
        }
        (folder / "metrics.json").write_text(json.dumps(as_json(scores, facts), indent=1) + "\n")
        (folder / "metrics.md").write_text(markdown(scores) + "\n")
        symbols = {"symbol": table.var["symbol"].to_numpy()}
        pd.DataFrame({**symbols, **each}, index=table.var_names).to_csv(folder / "genes.csv")
    return scores
