"""What a run writes about itself: ``metrics.csv`` and the picture of its learning curves."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from phenoseq.training.checkpoints import folder_of

METRICS, CURVES = "metrics.csv", "learning_curves.png"


class CsvLogger(Logger):
    """Adds to ``metrics.csv`` as things are logged, and keeps its rows when the run goes on.

    Lightning's own starts a new file, or removes the old one.

    Parameters
    ----------
    root
        Folder of the run.
    done
        Steps of the checkpoint from which the run goes on; later rows will be written again, and
        are removed.
    """

    def __init__(self, root: str | Path, done: int = 0) -> None:
        super().__init__()
        self.path = Path(root) / METRICS
        self._done = done
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Of the experiment: none."""
        return ""

    @property
    def version(self) -> str:
        """Of the experiment: none."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self.path.parent)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Write a row."""
        row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])  # type: ignore[arg-type]
        if not self._columns:
            self._rewrite([kept for kept in self._rows() if int(kept["step"]) < self._done])
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite(self._rows())
        with self.path.open("a", newline="") as file:
            _writer(file, self._columns).writerow(row)

    def _rows(self) -> list[dict[str, str]]:
        """Return the rows that were written whole."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")[:-1]
        return list(csv.DictReader(lines))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = self._columns or (list(rows[0]) if rows else ["step"])
        partial = self.path.with_name(f"{METRICS}.partial")
        with partial.open("w", newline="") as file:
            writer = _writer(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)


def _writer(file: TextIO, columns: list[str]) -> csv.DictWriter[str]:
    return csv.DictWriter(file, columns, lineterminator="\n")


class LearningCurves(Callback):
    """Draws ``checkpoints/learning_curves.png`` from ``metrics.csv`` after each validation."""

    @rank_zero_only  # type: ignore[untyped-decorator]
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what there is."""
        if not trainer.sanity_checking:
            draw_curves(trainer.default_root_dir)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw all."""
        draw_curves(trainer.default_root_dir)


def draw_curves(root: str | Path) -> None:
    """Draw each metric of a run against the step, training and validation in one panel."""
    from matplotlib.figure import Figure

    file = Path(root) / METRICS
    if not file.exists():
        return
    table = pd.read_csv(file).set_index("step").drop(columns="epoch", errors="ignore")
    panels: dict[str, list[str]] = {}
    for name in table.columns[table.notna().any()]:
        panels.setdefault(name.removeprefix("train_").removeprefix("val_"), []).append(name)
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name in names:
            values = table[name].dropna()
            axis.plot(values.index, values, marker="." if len(values) < 50 else "", label=name)
        axis.set(title=title, xlabel="step")
        if len(names) > 1:
            axis.legend(frameon=False)
    target = folder_of(root) / CURVES
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    os.replace(partial, target)
