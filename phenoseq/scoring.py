"""Scores a model beside the baselines: predicts, fits what is missing, compares, and reports."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr

from phenoseq._version import __version__
from phenoseq.data.backed import Given
from phenoseq.data.selection import SelectedStore, split_of_selected
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.evaluation.compare import compare
from phenoseq.evaluation.page import write_page
from phenoseq.evaluation.report import MIN_COUNTS, Scores, as_json, markdown
from phenoseq.evaluation.scoring import Result
from phenoseq.evaluation.tables import (
    Truth,
    facts_of,
    open_baselines,
    open_prediction,
    open_truth,
)
from phenoseq.inference.bagged import plain
from phenoseq.inference.inputs import open_inputs
from phenoseq.inference.predictor import image_job
from phenoseq.inference.table import predict_file
from phenoseq.inference.writer import write_whole
from phenoseq.models.files import digest_of_model
from phenoseq.models.load import Model
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.pretrained import Pretrained, read_pretrained
from phenoseq.progress import bar
from phenoseq.training.baselines import fit_baselines
from phenoseq.training.regressor import RegressorConfig, regressor_folder
from phenoseq.zoo.registry import load_model

_TRUTH, _PREDICTION, _BASELINES = "truth.zarr", "prediction.zarr", "baselines.zarr"


def evaluate(
    model: str | Path | Model,
    store: str | Path,
    *,
    part: str = "test",
    n_samples: int = 32,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    regressor: str | Path | None = None,
    epochs: int = 10,
    encoder_weights: str | Path | None = None,
) -> list[Scores]:
    """Score a model and the baselines on a part of a store, by the split it was trained with.

    Parameters
    ----------
    model
        A name of the zoo, a folder, or a loaded model.
    store
        The store, with all stains and genes of the model; others in it are not read. Where it is of
        the model's training data, the split must come out the same.
    part
        ``"test"``, ``"cal"``, ``"val"``, or a declared ``"test_NAME"``.
    n_samples, steps, seed, device
        As for :func:`phenoseq.predict`; all draws are kept.
    out
        Folder for what :func:`evaluate_tables` writes, and the ``truth.zarr``, ``prediction.zarr``
        and ``baselines.zarr`` that it is made of. Baselines that are there already, of the same
        model, cells and settings, are taken.
    regressor
        Folder of the regressor that is trained end to end, finished or not; by default beside the
        store, one for each split and configuration. Training it takes about as long as the model.
    epochs
        Budget of the regressor, passes over the training cells; give it the model's.
    encoder_weights
        Pretrained weights that the model's encoder started from, ``hub`` or a file of them, so that
        the regressor's starts from them too. Without them it starts from none, with a warning.

    Returns
    -------
    Scores, the model's first.

    Raises
    ------
    DataError, ModelError
        Where ``part`` is of training, the store lacks stains or genes, its split differs from the
        one trained with, or the pretrained weights are not those of the model's encoder.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="phenoseq-") as some:
            kept: dict[str, Any] = {"part": part, "n_samples": n_samples, "steps": steps}
            kept |= {"seed": seed, "device": device, "regressor": regressor, "epochs": epochs}
            kept["encoder_weights"] = encoder_weights
            return evaluate(model, store, out=some, **kept)
    if part == "train":
        raise DataError(
            "part is 'train': its cells trained the model and the baselines, and say nothing of "
            "others; choose test, or val or cal, by which choices were made"
        )
    name = Path(model).name if isinstance(model, str | Path) else "this model"
    loaded = load_model(model) if isinstance(model, str | Path) else model
    if not isinstance(loaded, PhenoSeq):
        raise ModelError(
            f"{name}: predicts embeddings of samples, and a store has genes of cells; only models "
            "of genes can be scored on one"
        )
    config = loaded.config
    opened = SelectedStore(store, config.image.channels, config.expression.genes)
    table = opened.table()
    how = SplitConfig(**config.training.split)  # type: ignore[arg-type]
    split = split_of_selected(opened, how)
    same = opened.manifest.identity == config.training.identity
    if same and split.digest != config.training.split_digest:
        raise DataError(
            f"{store}: divides its cells otherwise than {name} was trained with, so that its "
            "training cells would be scored; prepare the store with the same options"
        )
    if not same and opened.manifest.identity == config.training.base.get("identity"):
        warnings.warn(
            f"{store}: the model that {name} was fine-tuned from was trained on it, and may have "
            "seen the cells that are scored",
            PhenoseqWarning,
            stacklevel=2,
        )
    start = _start(loaded, encoder_weights, name)
    folder = _folder(out)
    rows = split.rows(part)
    rows = rows[np.asarray(table.X[rows].sum(axis=1)).ravel() >= MIN_COUNTS]
    truth = table[rows].copy()
    truth.obs["group"] = split.group[rows]
    write_whole(truth, folder / _TRUTH)
    inputs = open_inputs(opened, config.image, rows=rows)
    job = image_job(
        loaded,
        inputs,
        n_samples=n_samples,
        steps=steps,
        seed=seed,
        device=device,
        keep_draws=True,
        name=name,
    )
    with bar(f"predicting the {part} part") as progress:
        predict_file(job, folder / _PREDICTION, progress)
    budget = RegressorConfig(config.encoder, dim=config.denoiser.dim, epochs=epochs)
    kept_in = Path(regressor or regressor_folder(opened, split.digest, budget, start))
    plan = [
        __version__,
        digest_of_model(loaded),
        opened.manifest.identity,
        split.digest,
        truth.obs_names.tolist(),
        asdict(budget),
        start.origin if start is not None else None,
        str(regressor),
        n_samples,
        seed,
    ]
    plan_digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    if not _is_of(folder / _BASELINES, plan_digest):
        fitted = fit_baselines(
            loaded,
            opened,
            split,
            how,
            rows,
            regressor=budget,
            folder=kept_in,
            start=start,
            n_draws=n_samples,
            seed=seed,
            device=device,
        )
        fitted.uns["phenoseq"]["plan"] = plan_digest
        write_whole(fitted, folder / _BASELINES)
    facts = {
        "model": name,
        "data": opened.manifest.source,
        "data_identity": opened.manifest.identity,
        "split_digest": split.digest,
        "trained_on_this_data": same,
        "part": part,
        "n_samples": n_samples,
        "steps": config.diffusion.steps if steps is None else steps,
    }
    return evaluate_tables(
        folder / _PREDICTION,
        folder / _TRUTH,
        folder / _BASELINES,
        out=folder,
        store=opened,
        seed=seed,
        name=name,
        facts=facts,
    )


def _start(model: PhenoSeq, weights: str | Path | None, name: str) -> Pretrained | None:
    """Return what the regressor's encoder starts from: the weights of the model's, or none."""
    config = model.config
    wanted = config.training.encoder_weights
    told = wanted.get("file") or wanted.get("name")
    if weights is None:
        if wanted:
            warnings.warn(
                f"the encoder of {name} started from {told}, and that of the regressor starts from "
                "none: a weaker baseline. Name these weights with --encoder-weights",
                PhenoseqWarning,
                stacklevel=3,
            )
        return None
    found = read_pretrained(config.encoder, config.image.crop_px, weights)
    if found.origin != wanted:
        raise ModelError(
            f"{weights}: is {found.origin}, and the encoder of {name} started from "
            f"{wanted or 'no pretrained weights'}"
        )
    return found


def evaluate_tables(
    prediction: Given,
    truth: Given,
    baselines: Given,
    *,
    out: str | Path,
    store: str | Path | Store | None = None,
    group: str = "group",
    seed: int = 0,
    name: str | None = None,
    facts: dict[str, Any] | None = None,
) -> list[Scores]:
    """Score a prediction and the baselines that exist already, and write the report.

    Parameters
    ----------
    prediction
        AnnData or its file, made by :func:`phenoseq.predict` with ``keep_draws``.
    truth
        Raw counts of the same cells and genes, with the group of every cell in ``obs``. Cells below
        20 counts are not scored.
    baselines
        The ``baselines.zarr`` that :func:`evaluate` writes, of the same cells.
    out
        Folder for ``metrics.json``, ``metrics.md``, ``report.html`` (which opens offline), and the
        tables ``scores.parquet``, ``genes.parquet``, ``cells.parquet``, ``calibration.parquet``.
    store
        Store with the crops of the cells, for the gallery.
    group
        Column of ``obs`` in the truth: what was held out together.
    seed
        Of resamples and subsamples.
    name
        What to call the model; by default as in the prediction.
    facts
        More to put into ``metrics.json``.

    Returns
    -------
    Scores, the model's first.

    Raises
    ------
    DataError
        Where cells or genes do not match, the truth are no counts, a prediction is not finite, or
        a baseline is missing.
    """
    cells = open_truth(truth, baselines, group)
    name = name or (Path(prediction).stem if isinstance(prediction, str | Path) else "prediction")
    model = open_prediction(prediction, cells, name)
    with bar("scoring") as progress:
        everything = [model, *open_baselines(baselines, cells)]
        scores, results = compare(cells, everything, seed=seed, progress=progress)
    whole = {
        **(facts or {"model": name}),
        "n_cells": len(cells),
        "n_groups": len(cells.groups),
        "n_genes": int(cells.genes.sum()),
        "regressor": plain(facts_of(baselines).get("regressor", {})),
        "seed": seed,
        "phenoseq_version": __version__,
        "calibration": {r.name: asdict(r.calibration) for r in results if r.calibration},
    }
    folder = _folder(out)
    text = json.dumps(as_json(scores, whole), indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n")
    (folder / "metrics.md").write_text(markdown(scores) + "\n")
    _write_tables(folder, cells, scores, results)
    opened = Store(store) if isinstance(store, str | Path) else store
    write_page(folder / "report.html", cells, model, scores, results, whole, opened, seed=seed)
    return scores


def _folder(out: str | Path) -> Path:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name a folder for the report")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_tables(
    folder: Path, truth: Truth, scores: Sequence[Scores], results: Sequence[Result]
) -> None:
    rows = []
    for s in scores:
        row = {k: v for k, v in asdict(s).items() if not isinstance(v, dict)}
        for kind in ("intervals", "differences"):
            for metric, (low, high) in getattr(s, kind).items():
                row |= {f"{metric}_{kind}_low": low, f"{metric}_{kind}_high": high}
        rows.append(row | {f"coverage_{level}": v for level, v in s.coverage.items()})
    pd.DataFrame(rows).set_index("name").to_parquet(folder / "scores.parquet")
    genes = pd.DataFrame({"symbol": truth.var["symbol"]}, index=truth.var.index)
    cells = truth.obs[[c for c in ("x_centroid", "y_centroid") if c in truth.obs]].copy()
    cells["group"], cells["total_counts"] = truth.groups[truth.group], truth.total
    levels = []
    for r in results:
        genes.loc[truth.genes, r.name] = r.pcc_gene
        if r.n_draws != 1:
            cells[r.name] = r.cell_scores
        if r.calibration is None:
            continue
        found = asdict(r.calibration)
        names = ("coverage", "coverage_common", "closed", "width", "group_means")
        for level in r.calibration.coverage:
            row = {"name": r.name, "level": float(level), "crps": r.values["crps"]}
            row |= {"empty": r.calibration.empty, "empty_crps": r.calibration.empty_crps}
            levels.append(row | {k: found[k][level] for k in names})
    genes.to_parquet(folder / "genes.parquet")
    cells.to_parquet(folder / "cells.parquet")
    pd.DataFrame(levels).to_parquet(folder / "calibration.parquet")


def _is_of(path: Path, plan: str) -> bool:
    """Tell whether baselines are there, of this plan."""
    try:
        facts = ad.io.read_elem(zarr.open_group(path, mode="r")["uns"])["phenoseq"]
    except (OSError, KeyError, ValueError):
        return False
    return bool(facts.get("plan") == plan)
