"""Does predicted RNA help to tell the clusters of a section's cells, beside their images?

    phenoseq prepare XENIUM_FOLDER section.zarr
    python examples/section_labels.py section.zarr OUT
    python examples/section_labels.py section.zarr OUT --cells 500 --epochs 3   # a quick try

The question of the scGeneScope benchmark, with a cluster of the RNA (``graph_cluster``) as the
label, and blocks of tissue as replicates: blocks that the model was trained on train the
classifiers, its validation blocks select them, and its test blocks test them. ``imaging`` is the
mean token of the model's encoder, ``synthetic`` one draw of the model for the cell,
``regressor`` a perceptron from the same encoder's features to measured expression, and ``real``
the measured expression, log1p of counts scaled to one library size. A model of samples
(examples/section_samples.py) draws for each cell from a bag of cells of its block and label, and
``context`` is the mean of ``imaging`` over that bag: the same images without RNA.

The label was made from the same RNA: the ceiling of real RNA is circular. It says how well a
classifier can find the clusters again, and not how much RNA knows of a cell beyond its image. The
encoder was trained to predict this RNA, so that ``imaging`` is more than what is in the pixels.

What is made is kept in OUT/work, and a run that was stopped goes on under the same options.
metrics.json and metrics.md are written to OUT.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import yaml
import zarr

import phenoseq
from phenoseq.data.bags import make_bags
from phenoseq.data.datamodule import split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError
from phenoseq.evaluation.report import normalised
from phenoseq.inference.inputs import Inputs, open_inputs
from phenoseq.inference.job import Job
from phenoseq.inference.predictor import image_job, pick_device
from phenoseq.inference.samples import sample_job
from phenoseq.inference.table import predict_file
from phenoseq.models.config import ImageConfig
from phenoseq.models.expression import ExpressionSpace
from phenoseq.models.files import digest_of_model
from phenoseq.models.load import Model
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.progress import bar
from phenoseq.training.arms import Examples, arms_markdown, run_arms
from phenoseq.training.perceptron import Modality, PerceptronConfig, regress
from phenoseq.training.regressor import crops_of
from phenoseq.training.settings import keep_settings, same_settings

#: Column of samples: block and label.
SAMPLE = "sample"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="of the section that the model was trained on")
    parser.add_argument("out", type=Path, help="folder for the scores")
    parser.add_argument(
        "--model", default="xenium-pancreas", help="of cells or samples (%(default)s)"
    )
    parser.add_argument("--label", default="graph_cluster", help="column of obs (%(default)s)")
    parser.add_argument("--cells", type=int, help="of each part, at most (all)")
    parser.add_argument("--draws", type=int, default=128_000, help="bags of 32 (%(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    options = parser.parse_args(args)
    store, model = phenoseq.Store(options.store), phenoseq.load_model(options.model)
    config, device = PerceptronConfig(epochs=options.epochs), pick_device(options.device)
    work = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)

    plan = {name: value for name, value in vars(options).items() if name not in ("out", "device")}
    plan |= {"store": store.manifest.identity, "model": digest_of_model(model)}
    same_settings(options.out, yaml.safe_dump(plan))
    keep_settings(options.out, yaml.safe_dump(plan))
    obs = store.obs()
    if options.label not in obs:
        raise DataError(f"{store.path}: no column {options.label!r} in obs, only {list(obs)}")
    of_samples = isinstance(model, SamplePhenoSeq)
    how = SplitConfig() if of_samples else SplitConfig(**model.config.training.split)
    split = split_of(store, how)
    labelled = obs[options.label].notna().to_numpy()
    rng = np.random.default_rng(options.seed)
    chosen = []
    for part in ("train", "val", "test"):
        some = split.rows(part)
        some = some[labelled[some]]
        if options.cells is not None and len(some) > options.cells:
            some = np.sort(rng.choice(some, options.cells, replace=False))
        chosen.append(some)
    rows = np.concatenate(chosen)
    part = split.part[rows]
    each = np.arange(len(rows))
    train, val = (np.flatnonzero(part == name) for name in ("train", "val"))

    labels = obs[options.label].astype(str).to_numpy(dtype=str)[rows]
    groups = split.group[rows]
    imaging = Modality(features(model.to(device), store, rows, work / "imaging.npy"), each)
    given = {"seed": options.seed, "device": options.device}
    inputs = open_inputs(store, image_of(model), rows=rows)
    context: dict[str, Modality] = {}
    if of_samples:
        samples = np.char.add(np.char.add(groups, "|"), labels)
        inputs = replace(inputs, obs=inputs.obs.assign(**{SAMPLE: samples}))
        drawn, bags = draws_of_bags(model, inputs, work / "prediction.zarr", given)
        context["context"] = Modality(imaging.take(bags.rows).numpy(), bags.owners()[0])
    else:
        job = image_job(model, inputs, n_samples=1, **given)
        drawn = ad.io.read_elem(made(job, work / "prediction.zarr")["layers/draw"]).toarray()
    real = normalised(store.counts(rows), model.config.expression.median_library)
    real = Modality(real.astype(np.float32), each)
    read = context.get("context", imaging)
    regressed = regress(read, real, train, val, config, seed=options.seed, device=device)
    shuffled = each.copy()
    for name in np.unique(part):
        of = np.flatnonzero(part == name)
        shuffled[of] = rng.permutation(of)
    examples = Examples(
        {
            "imaging": imaging,
            **context,
            "synthetic": Modality(drawn, each),
            "regressor": Modality(regressed, read.rows),
            "shuffled": Modality(drawn, shuffled),
            "real": real,
        },
        labels=labels,
        groups=groups,
        part=part,
    )
    facts = {
        "data": store.manifest.source,
        "data_identity": store.manifest.identity,
        "model": options.model,
        "pairing": model.config.pairing,
        "label": options.label,
        "split_digest": split.digest,
        "cells": {name: int((part == name).sum()) for name in ("train", "val", "test")},
        "note": "the label was made from the same RNA: the ceiling of real RNA is circular",
    }
    found = run_arms(
        examples,
        options.out,
        config=config,
        draws=options.draws,
        seed=options.seed,
        device=device,
        facts=facts,
    )
    print(arms_markdown(found))
    print(facts["note"])


def draws_of_bags(model: SamplePhenoSeq, inputs: Inputs, table: Path, given: dict[str, Any]):
    """Return a draw for each cell, the k-th of a bag for its k-th cell, and the bags."""
    size = model.config.bag_size
    job = sample_job(model, inputs, SAMPLE, n_samples=size, keep_draws=True, **given)
    bags = make_bags(inputs.obs, SAMPLE, size=size, seed=given["seed"], where=inputs.name)
    bag, place = bags.owners()
    group = made(job, table)
    row = pd.Index(ad.io.read_elem(group["obs"]).index).get_indexer(bags.names)[bag]
    drawn = np.empty((len(bag), len(job.var)), dtype=np.float32)
    for k in range(size):
        here = place == k
        drawn[here] = ad.io.read_elem(group[f"layers/draw_{k}"])[row[here]].toarray()
    return drawn, bags


def made(job: Job, table: Path) -> zarr.Group:
    """Return a prediction, made if it is not there."""
    if not table.exists():
        with bar("drawing synthetic RNA") as progress:
            predict_file(job, table, progress)
    return zarr.open_group(table, mode="r")


def image_of(model: Model) -> ImageConfig:
    """Return what crops a model reads."""
    image = model.config.image if isinstance(model, PhenoSeq) else getattr(model.config, "cells", 0)
    if not isinstance(image, ImageConfig) or not isinstance(model.expression, ExpressionSpace):
        raise ModelError("this needs a model from crops to genes")
    return image


@torch.inference_mode()
def features(model: Model, store: phenoseq.Store, rows: np.ndarray, path: Path):
    """Return the mean token of each cell, ``(n, dim)``, from a file once it is made."""
    if not path.exists():
        found, done = [], 0
        with bar("encoding") as progress:
            for images in crops_of(store, rows):
                images = images.to(model.image_mean.device)
                if isinstance(model, SamplePhenoSeq):
                    images = images[:, None]  # bags of one cell
                cells, _ = model.pooled(model.encode(images))
                found.append(cells[:, 0].float().cpu())
                progress(done := done + len(images), len(rows))
        partial = path.with_suffix(".partial.npy")
        np.save(partial, torch.cat(found).numpy())
        partial.rename(path)
    return np.load(path)


if __name__ == "__main__":
    main()
