"""The scGeneScope benchmark: which treatment, from images, predicted RNA and measured RNA.

The protocol is that of scGeneScope (Altos Labs): classifiers, and all else that is fitted, see
replicate 3, are selected on replicate 5, and are tested within the experiment (replicate 4) and on
the held-out experiment (1 and 2). See :mod:`phenoseq.data.readers.scgenescope` for its files.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import yaml
import zarr
from numpy.typing import NDArray

from phenoseq._version import __version__
from phenoseq.data.backed import Cells, Matrix, dense
from phenoseq.data.bags import Bags, make_bags
from phenoseq.data.pairing import blocks, sample_names
from phenoseq.data.readers.scgenescope import PROTOCOL
from phenoseq.data.samplewriter import RnaConfig, write_sample_store
from phenoseq.disk import room_for
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.inference.bagged import bag_job
from phenoseq.inference.predictor import pick_device
from phenoseq.inference.samples import sample_job
from phenoseq.inference.table import predict_file
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

#: Columns that together name a sample, and the treatment that is left out.
COLUMNS, CONTROL = ("Treatment", "Replicate"), "DMSO"
_SAMPLE = "phenoseq_sample"

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ScGeneScope:
    """The files of the benchmark, and which of their cells it is about.

    Attributes
    ----------
    folder
        Folder of the data.
    imaging, rna
        Folders of ``round_1.h5ad`` and ``round_2.h5ad`` below ``features/imaging`` and
        ``features/rnaseq``.
    embedding
        Name in ``obsm`` of the RNA files.
    """

    folder: Path
    imaging: str = "imagenet/vit-l"
    rna: str = "scgpt"
    embedding: str = "scGPT"

    @cached_property
    def images(self) -> Cells:
        """Cells with image features in ``X``."""
        return self._open(self.folder / "features" / "imaging" / self.imaging)

    @cached_property
    def sequenced(self) -> Cells:
        """Cells with RNA."""
        return self._open(self.folder / "features" / "rnaseq" / self.rna)

    def _open(self, place: Path) -> Cells:
        if not place.is_dir() or not any(place.glob("*.h5ad")):
            raise DataError(
                f"{place}: no .h5ad file there; put scGeneScope's round_1.h5ad and round_2.h5ad "
                "there, or name what you have with --imaging and --rna"
            )
        cells = Cells(place)
        cells.obs[_SAMPLE] = sample_names(cells.obs, COLUMNS, cells.name)
        return cells

    @cached_property
    def part(self) -> NDArray[np.str_]:
        """Part of each image cell, by its replicate; empty where it is not used."""
        assert PROTOCOL.declared is not None
        part_of = {name: part for part, names in PROTOCOL.declared.items() for name in names}
        obs = self.images.obs
        part = obs["Replicate"].astype(str).map(part_of).fillna("").to_numpy(dtype=str)
        has_rna = obs[_SAMPLE].isin(self.sequenced.obs[_SAMPLE].unique()).to_numpy()
        used = (obs["Treatment"].astype(str) != CONTROL).to_numpy() & has_rna
        return np.where(used, part, "")

    @cached_property
    def cells(self) -> Rows:
        """Rows of the image cells that are used."""
        rows = np.flatnonzero(self.part != "")
        missing = set(PROTOCOL.declared or ()) - set(self.part[rows].tolist())
        if missing:
            raise DataError(
                f"{self.folder}: no treated cells with RNA in the parts {sorted(missing)}; the "
                f"protocol needs the replicates {PROTOCOL.declared}"
            )
        return rows

    def left_out(self) -> dict[str, int]:
        """Return the number of treated image cells of samples without RNA, by sample."""
        obs = self.images.obs
        out = (self.part == "") & (obs["Treatment"].astype(str) != CONTROL).to_numpy()
        return {str(k): int(v) for k, v in obs.loc[out, _SAMPLE].value_counts().items()}


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
    made = _Made(data, network, work, seed, place)
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
        groups=obs[_SAMPLE].to_numpy(dtype=str),
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


class _Made:
    """What the arms read, made once and kept in files that are memory-mapped."""

    def __init__(
        self,
        data: ScGeneScope,
        model: PublishedPhenoSeq | SamplePhenoSeq,
        work: Path,
        seed: int,
        device: torch.device,
    ) -> None:
        self.data, self.model, self.work = data, model, work
        self.seed, self.device = seed, device
        images, cells = data.images, data.cells
        self.bags: Bags = make_bags(
            images.obs, _SAMPLE, size=model.config.bag_size, seed=seed, where=images.name
        )
        bag, self._place = (of[cells] for of in self.bags.owners())
        #: Bags of the cells used, and which of these each cell is one of.
        self.used, self.bag_of_cell = np.unique(bag, return_inverse=True)

    def images(self) -> NDArray[np.float32]:
        """Return the image features of each cell."""
        matrix = self.data.images.matrix("X")
        return self._copied("imaging", matrix, self.data.cells)

    def real(self, rng: np.random.Generator) -> Modality:
        """Return an RNA cell of its sample for each cell, all of them equally often."""
        obs = self.data.sequenced.obs
        theirs = obs[_SAMPLE].to_numpy(dtype=str)
        ours = self.data.images.obs[_SAMPLE].to_numpy(dtype=str)[self.data.cells]
        wanted = np.flatnonzero(np.isin(theirs, np.unique(ours)))
        matrix = self.data.sequenced.matrix(f"obsm/{self.data.embedding}")
        values = self._copied("real", matrix, wanted)
        rows = np.empty(len(ours), dtype=np.int64)
        for name in np.unique(ours):
            cells, rna = np.flatnonzero(ours == name), np.flatnonzero(theirs[wanted] == name)
            rows[cells] = np.resize(rng.permutation(rna), len(cells))
        return Modality(values, rows)

    def context(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mean image features of each bag that is used."""
        rows = np.full(len(self.data.images), -1)
        rows[self.data.cells] = np.arange(len(images))
        means, members = Modality(images, np.arange(len(images))), rows[self.bags.rows[self.used]]

        def make() -> NDArray[np.float32]:
            return torch.cat([means.take(some) for some in means.parts(members)]).numpy()

        return self.file("context", make)

    def synthetic(self) -> NDArray[np.float32]:
        """Return a draw of the model for each cell, from the bag that it is one of."""
        table = self.work / "synthetic.zarr"
        n, size = len(self.data.cells), self.model.config.bag_size

        def make() -> NDArray[np.float32]:
            how: dict[str, Any] = {"n_samples": size, "seed": self.seed, "device": str(self.device)}
            if isinstance(self.model, PublishedPhenoSeq):
                job = bag_job(self.model, self.data.images, _SAMPLE, **how)
            else:
                job = sample_job(self.model, self.data.images, _SAMPLE, **how)
            if not table.exists():
                with bar("drawing synthetic RNA") as progress:
                    predict_file(job, table, progress)
            drawn = zarr.open_group(table, mode="r")
            order = pd.Index(ad.io.read_elem(drawn["obs"]).index)
            row = order.get_indexer(np.array(self.bags.names)[self.used])[self.bag_of_cell]
            values = np.empty((n, len(job.var)), dtype=np.float32)
            for k in range(size):
                here = self._place == k
                values[here] = np.asarray(drawn[f"layers/draw_{k}"][:])[row[here]]  # type: ignore[index]
            return values

        return self.file("synthetic", make)

    def file(self, name: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return an array that is in a file, or is made and written."""
        path = self.work / f"{name}.npy"
        if not path.exists():
            made = make()
            partial = path.with_name(f"{name}.partial.npy")
            with room_for(path, "what was made before is kept"):
                np.save(partial, made)
            os.replace(partial, path)
        return _mapped(path)

    def _copied(self, name: str, matrix: Matrix, rows: Rows) -> NDArray[np.float32]:
        """Copy rows of a matrix in blocks, forwards, to a file that can be read at random."""
        path = self.work / f"{name}.npy"
        if path.exists():
            return _mapped(path)
        partial = path.with_name(f"{name}.partial.npy")
        shape = len(rows), matrix.shape[1]
        with room_for(path, "nothing was lost"), bar(f"reading {name}") as progress:
            copy = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            done = 0
            for some in blocks(rows, 4 * shape[1]):
                block = dense(matrix.take(some))
                broken = int((~np.isfinite(block).all(axis=1)).sum())
                if broken:
                    raise DataError(
                        f"{self.data.folder}: {broken} cells whose {name} values are not finite "
                        "numbers; remove them from the files"
                    )
                copy[done : done + len(some)] = block
                done += len(some)
                progress(done, len(rows))
            copy.flush()
            del copy
        os.replace(partial, path)
        return _mapped(path)


def _mapped(path: Path) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return found


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
