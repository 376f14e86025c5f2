"""Is fine-tuning worth it? A trained model against training from scratch and against a ridge.

    # 500, 2,000 and 10,000 cells; another assay, tissue and stains
    python examples/finetune_study.py section XENIUM.zarr OUT --encoder-weights FILE
    python examples/finetune_study.py merscope MERSCOPE.zarr OUT --encoder-weights FILE

``section`` trains a base model on the left half of a section, by xenium_pancreas.yaml beside this
file, and goes on with cells of the right half. ``merscope`` starts from the released
xenium-pancreas, and holds out each fifth of the tissue in turn. The base, and what is trained from
scratch, have encoders that start from the weights of ImageNet in FILE. Both leave a table,
results.csv, and a figure, results.png, in OUT, and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
import zarr
from matplotlib.figure import Figure
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import phenoseq
from phenoseq.data.datamodule import StoreDataModule, split_of
from phenoseq.data.splits import SplitConfig
from phenoseq.data.store import Store
from phenoseq.data.storewriter import write_element
from phenoseq.evaluation.metrics import e_distance, pcc_gene, variance_ratio
from phenoseq.evaluation.report import normalised, scored_genes
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.training.baselines import intensity_statistics
from phenoseq.training.module import PhenoSeqModule

SIZES = (500, 2_000, 10_000)
FOLDS = 5
PARTS = ("train", "val", "test")
ROLES = (*PARTS, "out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["section", "merscope"])
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder-weights", help="see xenium_pancreas.yaml; none by default")
    parser.add_argument("--epochs", type=int, default=20, help="of every training, at most")
    parser.add_argument("--base-epochs", type=int, default=6, help="of the base model")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="training cells")
    parser.add_argument("--test", type=int, default=10_000, help="test cells at most")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options.out, options.epochs, options.test, options.encoder_weights)
    {"section": section, "merscope": merscope}[options.study](study, options)


# ---------------------------------------------------------------------------------- the two studies


def section(study: Study, options: argparse.Namespace) -> None:
    """Fine-tune with few cells of the half of a section that the base model has not seen."""
    store = Store(options.store)
    obs = store.obs()
    part = split_of(store, SplitConfig()).part
    x = obs["x_centroid"].to_numpy()
    half = store.manifest.crop_width / 2
    left, right = x < np.median(x) - half, x > np.median(x) + half
    roles = {"Metadata_left": np.where(left & np.isin(part, PARTS), part, "out")}
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        for n in options.sizes:
            role = np.full(len(obs), "out", dtype="<U8")
            for name, most in (("train", n), ("val", max(n // 5, 100)), ("test", options.test)):
                rows = np.flatnonzero(right & (part == name))
                which = np.random.default_rng(0) if name == "test" else rng
                role[which.choice(rows, min(most, len(rows)), replace=False)] = name
            roles[f"Metadata_{n}_{seed}"] = role
    path = with_roles(store, options.out / "section.zarr", roles)
    base = study.base(path, "Metadata_left", options.base_epochs)
    genes = scored_genes(store.counts(np.flatnonzero(right & (part == "train"))))
    for seed in range(options.seeds):
        for n in options.sizes:
            case = Case(path, f"Metadata_{n}_{seed}", n, seed, genes)
            study.ridge(case)
            study.score(case, "base as it is", lambda: base)
            study.all_trained(case, base)
    study.draw("training cells", log=True)


def merscope(study: Study, options: argparse.Namespace) -> None:
    """Fine-tune on a small sample of another assay, each strip of the tissue held out in turn."""
    store = Store(options.store)
    x = store.obs()["x_centroid"].to_numpy()
    half = store.manifest.crop_width / 2
    edges = np.quantile(x, np.linspace(0, 1, FOLDS + 1))
    strip = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, FOLDS - 1)
    roles = {}
    for fold in range(FOLDS):
        names = np.full(FOLDS, "train", dtype="<U8")
        names[fold], names[(fold + 1) % FOLDS] = "test", "val"
        role = names[strip]
        for edge, before, after in zip(edges[1:-1], names[:-1], names[1:], strict=True):
            if before != after:  # no crop reaches into another part
                role[np.abs(x - edge) < half] = "out"
        roles[f"Metadata_fold{fold}"] = role
    path = with_roles(store, options.out / "merscope.zarr", roles)
    genes = scored_genes(store.counts(np.arange(len(x))))
    base = phenoseq.load_model("xenium-pancreas")
    for seed in range(options.seeds):
        for fold, (column, role) in enumerate(roles.items()):
            n = int((role == "train").sum())
            case = Case(path, column, n, seed, genes, fold)
            study.ridge(case)
            study.all_trained(case, base)
    study.draw("fold", log=False)


@dataclass(frozen=True)
class Case:
    """Cells to train on and to test on: a column of the store says which; and the scored genes."""

    store: Path
    column: str
    n: int
    seed: int
    genes: np.ndarray
    fold: int = 0

    @property
    def split(self) -> SplitConfig:
        return by_role(self.column)


# ------------------------------------------------------------------------------- trained and scored


class Study:
    """Trains, scores, and writes a row at a time; what has a row is not made again."""

    def __init__(self, out: Path, epochs: int, most_test: int, weights: str | None) -> None:
        self.out, self.epochs, self.most_test = out, epochs, most_test
        self.weights = weights
        self.file = out / "results.csv"

    def all_trained(self, case: Case, base: PhenoSeq) -> None:
        """Fine-tune in each way, and train from scratch with the same budget."""
        for freeze in ("all-but-head", "encoder", "none"):
            self.score(
                case, f"fine-tuned, frozen: {freeze}", lambda f=freeze: self.tune(case, base, f)
            )
        self.score(
            case, "from scratch", lambda: self.tune(case, self.untrained(case, base), "none", 1e-3)
        )

    def tune(self, case: Case, base: PhenoSeq, freeze: str, lr: float | None = None) -> PhenoSeq:
        name = f"{case.column}-{case.seed}-{freeze}-{'tuned' if lr is None else 'scratch'}"
        folder = self.out / "models" / name
        if folder.exists():
            return PhenoSeq.load(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return phenoseq.finetune(
                base, case.store, freeze=freeze, split=case.split, epochs=self.epochs, lr=lr,
                seed=case.seed, out=folder,
            )  # fmt: skip

    def base(self, store: Path, column: str, epochs: int) -> PhenoSeq:
        """Train the base model on the cells of a column, as the released one was."""
        folder = self.out / "base"
        if not (folder / "model").exists():
            from phenoseq.training.train import train

            parts = "{train: [train], val: [val]}"
            settings = {
                "config": Path(__file__).with_name("xenium_pancreas.yaml"),
                "data.store": store,
                "data.split": f"{{by: {column}, block: null, declared: {parts}}}",
                "model.encoder_weights": self.weights or "null",
                "model.components": min(64, len(Store(store).manifest.genes) // 2),
                "trainer.max_epochs": epochs,
                "trainer.enable_model_summary": "false",
                "trainer.default_root_dir": folder,
            }
            train([f"--{name}={value}" for name, value in settings.items()])
        return PhenoSeq.load(folder / "model")

    def untrained(self, case: Case, like: PhenoSeq) -> PhenoSeq:
        """Return a network of the same sizes and start, its space fitted to the cells."""
        config = like.config
        data = StoreDataModule(case.store, case.split, seed=case.seed)
        data.setup()
        cells = min(case.n // 10, data.opened.counts(data.parts.rows("train")).shape[1] // 2)
        module = PhenoSeqModule(
            encoder=config.encoder,
            denoiser=config.denoiser,
            diffusion=config.diffusion,
            components=min(config.expression.components, cells),
            hidden=config.expression.hidden,
            encoder_weights=self.weights,
            seed=case.seed,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            model, _ = module.build(data)
        return model.eval()

    def ridge(self, case: Case) -> None:
        name = "ridge on intensity statistics"
        if self.done(case, name):
            return
        store, train, test, truth, median = opened(case)
        start = time.perf_counter()
        known = normalised(store.counts(train), median)
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 6)))
        model.fit(intensity_statistics(store.take(train)), known)
        made = model.predict(intensity_statistics(store.take(test)))
        self.add(case, name, truth, made, None, time.perf_counter() - start)

    def score(self, case: Case, name: str, make) -> None:
        if self.done(case, name):
            return
        start = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - start
        store, _, test, truth, median = opened(case)
        made = phenoseq.predict(
            store.take(test),
            model=model,
            channels=store.manifest.channels,
            pixel_size=store.manifest.pixel_size,
            seed=case.seed,
        )
        scale = median / model.config.expression.median_library
        mean, draw = (
            np.log1p(np.expm1(m) * scale) for m in (made.X, made.layers["draw"].toarray())
        )
        self.add(case, name, truth, mean, draw, seconds)

    def done(self, case: Case, name: str) -> bool:
        if not self.file.exists():
            return False
        rows = pd.read_csv(self.file)
        return bool(((rows["column"] == case.column) & (rows["seed"] == case.seed)
                     & (rows["method"] == name)).any())  # fmt: skip

    def add(self, case: Case, name: str, truth, mean, draw, seconds: float) -> None:
        genes = case.genes
        draw = mean if draw is None else draw
        row = {
            "column": case.column,
            "fold": case.fold,
            "seed": case.seed,
            "training cells": case.n,
            "test cells": len(truth),
            "genes": int(genes.sum()),
            "method": name,
            "pcc_gene": np.median(pcc_gene(truth[:, genes], mean[:, genes])),
            "e_distance": e_distance(truth[:, genes], draw[:, genes])[0],
            "variance_ratio": variance_ratio(truth[:, genes], draw[:, genes]),
            "seconds": seconds,
        }
        old = pd.read_csv(self.file) if self.file.exists() else None
        table = pd.concat([old, pd.DataFrame([row])], ignore_index=True)
        partial = self.file.with_suffix(".partial")
        table.round(4).to_csv(partial, index=False)
        os.replace(partial, self.file)
        print(table.round(4).tail(1).to_string(header=False, index=False), flush=True)

    def draw(self, by: str, *, log: bool) -> None:
        """Draw the scores of each method, its mean over seeds (and folds, where there are some)."""
        table = pd.read_csv(self.file)
        figure = Figure(figsize=(13, 3.4), layout="constrained")
        methods = list(dict.fromkeys(table["method"]))
        for axis, score in zip(
            figure.subplots(1, 3), ("pcc_gene", "e_distance", "variance_ratio"), strict=True
        ):
            for method in methods:
                some = table[table["method"] == method].groupby(by)[score].mean()
                axis.plot(some.index, some, marker="o", label=method)
            axis.set(xlabel=by, title=score)
            if log:
                axis.set_xscale("log")
            if score == "e_distance":
                axis.set_yscale("log")
        lines = figure.axes[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside right center", frameon=False, fontsize=7)
        figure.savefig(self.out / "results.png", dpi=150)


def opened(case: Case):
    """Return the store, its training and test cells, their true expression, and its scale."""
    store = Store(case.store)
    parts = split_of(store, case.split)
    train, test = parts.rows("train"), parts.rows("test")
    total = np.asarray(store.counts(train).sum(axis=1)).ravel()
    median = float(np.median(total))
    return store, train, test, normalised(store.counts(test), median), median


# ---------------------------------------------------------------------------------------- the store


def by_role(column: str) -> SplitConfig:
    return SplitConfig(by=column, block=None, declared={part: [part] for part in PARTS})


def with_roles(store: Store, path: Path, roles: dict[str, np.ndarray]) -> Path:
    """Write a store with the same crops, and columns that say what each cell is for."""
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(store.path, partial, ignore=shutil.ignore_patterns("table", "excluded"))
    table = store.table()
    excluded = ad.io.read_elem(zarr.open_group(store.path, mode="r")["excluded"])
    for column, role in roles.items():
        table.obs[column] = pd.Categorical(role, ROLES)
        excluded[column] = pd.Categorical(["out"] * len(excluded), ROLES)
    group = zarr.open_group(partial, mode="r+")
    write_element(group, "table", table)
    write_element(group, "excluded", excluded)
    partial.rename(path)
    return path


if __name__ == "__main__":
    main()
