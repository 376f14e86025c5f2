"""How well labels are told from images, from predicted RNA, and from measured RNA.

Each arm is a classifier on some of what is known of the same cells, so that arms can be compared
cell by cell. Predicted RNA cannot hold more than the images that it was made of: the arms beside it
say how much of a gain is due to these.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from phenoseq.errors import DataError
from phenoseq.evaluation.labels import balanced_accuracy, gap_interval, macro_f1
from phenoseq.evaluation.report import plain
from phenoseq.progress import bar
from phenoseq.training.perceptron import (
    Batch,
    Modality,
    Perceptron,
    PerceptronConfig,
    Rows,
    fit,
    outputs,
)

#: What each arm reads.
ARMS: Mapping[str, tuple[str, ...]] = {
    "imaging": ("imaging",),
    "synthetic": ("synthetic",),
    "imaging + synthetic": ("imaging", "synthetic"),
    "imaging + its bag": ("imaging", "context"),
    "imaging + regressor": ("imaging", "regressor"),
    "imaging + shuffled synthetic": ("imaging", "shuffled"),
    "real": ("real",),
    "imaging + real": ("imaging", "real"),
}
_BASE, _CEILING = "imaging", "imaging + real"


@dataclass(frozen=True)
class Examples:
    """Cells whose label is to be told.

    Attributes
    ----------
    modalities
        What is known of each: ``imaging``, ``synthetic`` (RNA drawn by a model), ``shuffled`` (the
        same, of other cells), ``regressor`` (RNA predicted without a distribution), ``real``, and
        maybe ``context``, the mean image of the bag of which synthetic RNA was made.
    labels
        Text, ``(n,)``.
    groups
        Sample, block or plate of each: cells of a bag have one label and one group, and intervals
        are over groups, ``(n,)``.
    part
        ``"train"``, ``"val"``, ``"test"`` or ``"test_NAME"`` of each, ``(n,)``.
    """

    modalities: Mapping[str, Modality]
    labels: NDArray[np.str_]
    groups: NDArray[np.str_]
    part: NDArray[np.str_]

    @property
    def arms(self) -> list[str]:
        """Names of the arms that there is everything for."""
        return [arm for arm, read in ARMS.items() if set(read) <= set(self.modalities)]

    @property
    def tests(self) -> list[str]:
        """Names of the test parts."""
        return sorted({part for part in self.part.tolist() if part.startswith("test")})


def run_arms(
    examples: Examples,
    folder: str | Path,
    *,
    config: PerceptronConfig,
    bag_sizes: Sequence[int] = (1, 32),
    draws: int = 128_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    facts: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train and test the classifier of every arm, and write the scores.

    An arm that is finished is a file in ``folder/arms`` and is not trained again; the folder is for
    one set of examples and settings.

    Parameters
    ----------
    examples
        The cells. Classifiers are fitted on the part ``train`` and selected by the balanced
        accuracy on ``val``.
    folder
        For ``metrics.json``, ``metrics.md``, and ``arms``.
    config
        Of the classifiers.
    bag_sizes
        Cells an example. Bags are drawn with replacement, their label uniformly, their group as
        often as it has cells of that label; what a classifier reads is the mean over the bag.
    draws
        Bags in each test.
    seed
        Of first weights, order and bags; bags are the same for all arms.
    device
        Where.
    facts
        More to put into ``metrics.json``.

    Returns
    -------
    One row for each bag size, test part and arm: ``balanced_accuracy`` and ``macro_f1`` over the
    classes that occur, and for images with something else ``gap_recovered`` and its interval.

    Raises
    ------
    DataError
        Where a part has no cells, or only one label.
    """
    task = _Task(examples, config, draws, seed, torch.device(device))
    where = Path(folder)
    (where / "arms").mkdir(parents=True, exist_ok=True)
    rows = []
    for size in bag_sizes:
        tests = {part: task.items(part, size) for part in examples.tests}
        found = {}
        for arm in examples.arms:
            file = where / "arms" / f"{size}-{arm.replace(' ', '-')}.json"
            if not file.exists():
                _write(file, json.dumps(task.run(arm, size, tests)))
            found[arm] = json.loads(file.read_text())
        for part, cells in tests.items():
            rows += _scores(task, part, size, cells, found, seed)
    whole = {**(facts or {}), "seed": seed, "draws": draws, "scores": rows}
    _write(where / "metrics.json", json.dumps(plain(whole), indent=1, allow_nan=False) + "\n")
    _write(where / "metrics.md", arms_markdown(rows) + "\n")
    return rows


def arms_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the scores out as a Markdown table."""
    lines = [
        "| cells | test | arm | balanced accuracy | macro F1 | gap recovered (95%) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gap = ""
        if row["gap_recovered"] is not None:
            low, high = row["gap_interval"]
            gap = f"{row['gap_recovered']:.2f} ({low:.2f} to {high:.2f})"
            gap = gap if np.isfinite(row["gap_recovered"]) else "none: real RNA adds nothing"
        lines.append(
            f"| {row['bag_size']} | {row['test']} | {row['arm']} | {row['balanced_accuracy']:.3f} "
            f"| {row['macro_f1']:.3f} | {gap} |"
        )
    return "\n".join(lines)


class _Task:
    """Trains and applies classifiers of one set of cells."""

    def __init__(
        self,
        examples: Examples,
        config: PerceptronConfig,
        draws: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.examples, self.config, self.draws = examples, config, draws
        self.seed, self.device = seed, device
        self.classes, self.labels = np.unique(examples.labels, return_inverse=True)
        self.group_names, self.groups = np.unique(examples.groups, return_inverse=True)
        self.train = self._cells("train")
        if len(np.unique(self.labels[self.train])) < 2:
            raise DataError("the training cells have one label; there is nothing to tell apart")
        self._cells("val")
        if not examples.tests:
            raise DataError("no cells to test on: 'part' names none 'test' or 'test_NAME'")

    def _cells(self, part: str) -> Rows:
        cells = np.flatnonzero(self.examples.part == part)
        if not len(cells):
            raise DataError(f"no cells in the {part} part; classifiers need some")
        return cells

    def items(self, part: str, size: int, n: int | None = None) -> Rows:
        """Return the cells of a part, ``(n,)``, or bags of them, ``(n, size)``."""
        cells = self._cells(part)
        if size == 1:
            return cells
        rng = np.random.default_rng([self.seed, size, *part.encode()])
        return self.bags(cells, n or self.draws, size, rng)

    def bags(self, cells: Rows, n: int, size: int, rng: np.random.Generator) -> Rows:
        """Draw bags of ``cells``: label uniform, group by its cells, cells with replacement."""
        key = self.labels[cells] * len(self.group_names) + self.groups[cells]
        order = np.argsort(key, kind="stable")
        key, label = key[order], self.labels[cells][order]
        chosen = rng.choice(np.unique(label), n)
        first = _within(label, chosen, rng.random(n))
        members = _within(key, np.repeat(key[first], size), rng.random(n * size))
        found: Rows = cells[order[members]].reshape(n, size)
        return found

    def run(self, arm: str, size: int, tests: Mapping[str, Rows]) -> dict[str, Any]:
        """Train one classifier, and say which class it takes each item of the tests for."""
        start, config = time.monotonic(), self.config
        read = [self.examples.modalities[name] for name in ARMS[arm]]
        scales = [modality.scale(self.train) for modality in read]
        network = Perceptron(config, scales, len(self.classes), self.seed).to(self.device)
        held = self.items("val", size, config.bags_per_epoch)

        def epoch(rng: np.random.Generator) -> Iterator[Batch]:
            if size == 1:
                items, step = rng.permutation(self.train), config.batch_size
            else:
                items = self.bags(self.train, config.bags_per_epoch, size, rng)
                step = config.bag_batch
            for at in range(0, len(items), step):
                some = items[at : at + step]
                yield [modality.take(some) for modality in read], self._target(some)

        def score() -> float:
            return balanced_accuracy(self.truth(held), self._predict(network, read, held))

        with bar(f"{arm}, {size} {'cell' if size == 1 else 'cells'}") as progress:
            best, chosen = fit(network, epoch, score, config, seed=self.seed, progress=progress)
        return {
            "arm": arm,
            "bag_size": size,
            "val_balanced_accuracy": best,
            "epochs": chosen,
            "parameters": sum(p.numel() for p in network.parameters()),
            "seconds": round(time.monotonic() - start, 1),
            "predicted": {
                part: self._predict(network, read, items).tolist() for part, items in tests.items()
            },
        }

    def truth(self, items: Rows) -> Rows:
        """Return the class of each cell or bag."""
        return self.labels[items if items.ndim == 1 else items[:, 0]]

    def group(self, items: Rows) -> Rows:
        """Return the group of each cell or bag."""
        return self.groups[items if items.ndim == 1 else items[:, 0]]

    def _target(self, items: Rows) -> torch.Tensor:
        return torch.from_numpy(self.truth(items))

    def _predict(self, network: Perceptron, read: Sequence[Modality], items: Rows) -> Rows:
        said = [out.argmax(dim=1).cpu() for out in outputs(network, read, items)]
        return torch.cat(said).numpy()


def _within(ordered: Rows, wanted: Rows, uniform: NDArray[np.float64]) -> Rows:
    """Return for each of ``wanted`` the place of one of its equals among sorted numbers."""
    start = np.searchsorted(ordered, wanted)
    stop = np.searchsorted(ordered, wanted, side="right")
    return np.asarray(start + (uniform * (stop - start)).astype(np.int64))


def _scores(
    task: _Task,
    part: str,
    size: int,
    items: Rows,
    found: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> list[dict[str, Any]]:
    true, group = task.truth(items), task.group(items)
    said = {arm: np.array(result["predicted"][part]) for arm, result in found.items()}
    rows = []
    for arm, predicted in said.items():
        row = {
            "bag_size": size,
            "test": part,
            "arm": arm,
            "n": len(items),
            "n_classes": len(np.unique(true)),
            "n_groups": len(np.unique(group)),
            "balanced_accuracy": balanced_accuracy(true, predicted),
            "macro_f1": macro_f1(true, predicted),
            "gap_recovered": None,
            "gap_interval": None,
            **{k: v for k, v in found[arm].items() if k not in ("arm", "bag_size", "predicted")},
        }
        if arm.startswith(f"{_BASE} + ") and arm != _CEILING:
            value, low, high = gap_interval(
                true, said[_BASE], predicted, said[_CEILING], group, seed=seed
            )
            row |= {"gap_recovered": value, "gap_interval": [low, high]}
        rows.append(row)
    return rows


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
