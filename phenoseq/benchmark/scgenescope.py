"""The scGeneScope benchmark: which treatment, from images, predicted RNA and measured RNA.

The protocol is that of scGeneScope (Altos Labs): classifiers, and all else that is fitted, see
replicate 3, are selected on replicate 5, and are tested within the experiment (replicate 4) and on
the held-out experiment (1 and 2). See :mod:`phenoseq.data.readers.scgenescope` for its files.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from phenoseq._version import __version__
from phenoseq.benchmark.files import COLUMNS, SAMPLE, ScGeneScope
from phenoseq.benchmark.made import Made
from phenoseq.data.readers.scgenescope import PROTOCOL
from phenoseq.data.samplewriter import RnaConfig, write_sample_store
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.inference.predictor import pick_device
from phenoseq.models.embedding import EmbeddingConfig
from phenoseq.models.files import digest_of_model
from phenoseq.models.load import Model
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.record import TrainingRecord
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.progress import bar
from phenoseq.training.arms import Examples, run_arms
from phenoseq.training.perceptron import Modality, PerceptronConfig, regress
from phenoseq.training.settings import keep_settings, same_settings
from phenoseq.zoo.registry import load_model


def benchmark_scgenescope(
    data: ScGeneScope,
    out: str | Path,
    *,
    model: str | Path | Model | None = None,
    config: str | Path | None = None,
    classifier: PerceptronConfig = PerceptronConfig(),  # noqa: B008 - frozen
    bag_sizes: tuple[int, ...] = (1, 32),
    draws: int = 128_000,
    seed: int = 0,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Run the benchmark; a run that was stopped goes on when it is called again.

    Each image cell has a synthetic RNA profile, drawn from the bag of cells of its sample that the
    model read, a draw for each cell of the bag. RNA cells are not the imaged cells: each image cell
    is given a real RNA cell of its sample, all of these equally often. Treatments without RNA in a
    replicate are left out of all arms there, so that all answer the same question.

    Parameters
    ----------
    data
        The files.
    out
        Folder for ``metrics.json``, ``metrics.md``, finished arms, and in ``work`` what they are
        made of, which may be removed then: about 4 bytes a cell and image feature, and twice as
        much where a model is trained.
    model
        Name or folder of a model of these features and embeddings, or the model; it must have been
        trained on replicate 3.
    config
        In its place, a configuration of ``phenoseq train``, by which one is trained on the data.
    classifier, bag_sizes, draws, seed
        See :func:`phenoseq.training.arms.run_arms`.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Returns
    -------
    One row for each bag size, test and arm; see :func:`phenoseq.training.arms.run_arms`.

    Raises
    ------
    DataError
        Where files, columns or replicates are missing.
    ModelError
        Where the model does not fit the data or saw other replicates, or ``out`` holds a run with
        other settings.
    """
    if (model is None) == (config is None):
        raise ModelError(
            "give a trained model (--model), or how to train one on replicate 3 (--config "
            "examples/scgenescope_phenoseq.yaml)"
        )
    folder = Path(out)
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    cells, place = data.cells, pick_device(device)
    plan: dict[str, Any] = {
        "phenoseq_version": __version__,
        "imaging": data.imaging,
        "rna": f"{data.rna}, obsm {data.embedding}",
        "images_identity": data.images.identity(),
        "rna_identity": data.sequenced.identity(),
        "classifier": asdict(classifier),
        "bag_sizes": list(bag_sizes),
        "draws": draws,
        "seed": seed,
    }
    if config is not None:
        text = _text(Path(config))
        plan["trained_with"] = hashlib.sha256(text.encode()).hexdigest()
        _keep(folder, plan)
        loaded: Model = _trained(data, Path(config), work, device)
    else:
        assert model is not None
        loaded = load_model(model) if isinstance(model, str | Path) else model
        plan["model"] = digest_of_model(loaded)
        _keep(folder, plan)
    network, record = _checked(loaded, data)
    made = Made(data, network, work, seed, place)
    part = data.part[cells]
    obs = data.images.obs.iloc[cells]
    rng = np.random.default_rng([seed, 1])
    images, real = made.images(), made.real(rng)
    context, bag = made.context(images), made.bag_of_cell
    synthetic = made.synthetic()
    in_bags = Modality(context, bag)
    train, val = (np.flatnonzero(part == name) for name in ("train", "val"))
    regressed = made.file(
        "regressor",
        lambda: regress(in_bags, real, train, val, classifier, seed=seed, device=place),
    )
    each = np.arange(len(cells))
    shuffled = each.copy()
    for name in np.unique(part):
        rows = np.flatnonzero(part == name)
        shuffled[rows] = rng.permutation(rows)
    examples = Examples(
        modalities={
            "imaging": Modality(images, each),
            "context": in_bags,
            "synthetic": Modality(synthetic, each),
            "regressor": Modality(regressed, bag),
            "shuffled": Modality(synthetic, shuffled),
            "real": real,
        },
        labels=obs["Treatment"].astype(str).to_numpy(dtype=str),
        groups=obs[SAMPLE].to_numpy(dtype=str),
        part=part,
    )
    facts = {
        **plan,
        "benchmark": "scGeneScope",
        "model_split": record.split if record else None,
        "model_bag": network.config.bag_size,
        "cells": {name: int((part == name).sum()) for name in np.unique(part).tolist()},
        "left_out_for_want_of_rna": data.left_out(),
        "protocol": {name: list(some) for name, some in (PROTOCOL.declared or {}).items()},
    }
    return run_arms(
        examples,
        folder,
        config=classifier,
        bag_sizes=bag_sizes,
        draws=draws,
        seed=seed,
        device=place,
        facts=facts,
    )


def _trained(data: ScGeneScope, config: Path, work: Path, device: str) -> Model:
    """Prepare a store of the data, and train on it as a configuration says, or go on with that."""
    from phenoseq.training.train import train

    store, root = work / "store.zarr", work / "training"
    model = root / "model"
    if not (model / "config.json").exists():
        if not store.exists():
            with bar("preparing") as progress:
                write_sample_store(
                    data.images,
                    data.sequenced,
                    store,
                    columns=COLUMNS,
                    config=RnaConfig(embedding=data.embedding),
                    progress=progress,
                )
        settings = {"data.store": store, "trainer.default_root_dir": root, "out": model}
        if device != "auto":
            settings["trainer.accelerator"] = Path(device.partition(":")[0])
        train(["--config", str(config), *(f"--{name}={value}" for name, value in settings.items())])
    return load_model(model)


def _checked(
    model: Model, data: ScGeneScope
) -> tuple[PublishedPhenoSeq | SamplePhenoSeq, TrainingRecord | None]:
    """Check that a model makes these embeddings of these features, and what it has seen."""
    if isinstance(model, PublishedPhenoSeq):
        name, width = model.config.embedding, model.config.sizes.embedding
        record: Any = model.config.origin
    elif isinstance(model, SamplePhenoSeq) and isinstance(model.config.expression, EmbeddingConfig):
        name, width = model.config.expression.name, model.config.expression.width
        record = model.config.training
    else:
        raise ModelError("the benchmark needs a model from image features to embeddings of RNA")
    there = data.sequenced.matrix(f"obsm/{data.embedding}").shape[1]
    if (name, width) != (data.embedding, there):
        raise ModelError(
            f"the model predicts {name!r} of {width} numbers, and the RNA has {data.embedding!r} "
            f"of {there}; choose other files with --rna and --embedding, or another model"
        )
    if isinstance(record, TrainingRecord):
        declared = record.split.get("declared")
        declared = declared if isinstance(declared, dict) else {}
        seen = {part: sorted(declared.get(part, ())) for part in ("train", "val")}
        if seen != {"train": ["3"], "val": ["5"]} or record.split.get("by") != "Replicate":
            raise ModelError(
                "the model was not trained on replicate 3 and selected on 5 (its split is by "
                f"{record.split.get('by')!r}, {declared or 'undeclared'}), so that it may have "
                "seen cells that it would be tested on; train one with --config"
            )
    else:
        warnings.warn(
            "the model does not say which replicates it was trained on, and may have seen cells "
            "that it is tested on (model_split is null in metrics.json); train one with --config",
            PhenoseqWarning,
            stacklevel=3,
        )
    return model, record if isinstance(record, TrainingRecord) else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _keep(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder that holds another run, and mark it as that of this one."""
    text = yaml.safe_dump(plan)
    same_settings(folder, text)
    keep_settings(folder, text)
