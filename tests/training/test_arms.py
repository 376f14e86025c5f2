"""Classifiers on images, predicted RNA and measured RNA, compared."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from phenoseq.errors import DataError
from phenoseq.training import arms
from phenoseq.training.arms import ARMS, Examples, run_arms
from phenoseq.training.perceptron import Modality, PerceptronConfig

CONFIG = PerceptronConfig(
    width=16, layers=2, batch_size=64, epochs=20, patience=8, bag_batch=32, bags_per_epoch=512
)
HOW = {"config": CONFIG, "draws": 300, "bag_sizes": (1, 8)}


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Four labels, of which images tell two pairs apart, RNA all, and synthetic RNA in part."""
    rng = np.random.default_rng(0)
    n = 1600
    label = rng.integers(4, size=n)
    part = rng.choice(["train", "val", "test_a", "test_b"], n, p=[0.4, 0.2, 0.2, 0.2])
    own = np.eye(4, dtype=np.float32)[label]
    pair = np.eye(2, dtype=np.float32)[label // 2]

    def noisy(signal, noise):
        made = signal + noise * rng.standard_normal(signal.shape)
        return Modality(made.astype(np.float32), np.arange(n))

    synthetic = noisy(own, 0.6)
    return Examples(
        {
            "imaging": noisy(pair, 0.4),
            "context": noisy(pair, 0.2),
            "synthetic": synthetic,
            "regressor": noisy(pair, 0.1),
            "shuffled": Modality(synthetic.values, rng.permutation(n)),
            "real": noisy(own, 0.15),
        },
        labels=np.array(["a", "b", "c", "d"])[label],
        groups=np.char.add(np.char.add(part, "-"), rng.integers(5, size=n).astype(str)),
        part=part,
    )


@pytest.fixture(scope="module")
def scored(examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    return run_arms(examples, folder, facts={"of": "a test"}, **HOW), folder


def test_arms_say_where_the_gain_comes_from(scored):
    rows, folder = scored
    assert len(rows) == 2 * 2 * len(ARMS)
    for size in HOW["bag_sizes"]:
        for test in ("test_a", "test_b"):
            of = {r["arm"]: r for r in rows if r["bag_size"] == size and r["test"] == test}
            right = {arm: row["balanced_accuracy"] for arm, row in of.items()}
            assert right["imaging + real"] > 0.9
            assert right["imaging + synthetic"] > right["imaging"] + 0.1
            for none in ("imaging + shuffled synthetic", "imaging + regressor"):
                assert abs(right[none] - right["imaging"]) < 0.12
            low, high = of["imaging + synthetic"]["gap_interval"]
            assert 0.2 < low < of["imaging + synthetic"]["gap_recovered"] < high
            assert of["real"]["gap_recovered"] is None
            assert of["imaging"]["n_classes"] == 4
    bags = [r for r in rows if r["bag_size"] == 8]
    single = [r for r in rows if r["bag_size"] == 1]
    assert {r["n"] for r in bags} == {300}
    for one, many in zip(single, bags, strict=True):
        if one["arm"] == "synthetic":
            assert many["balanced_accuracy"] > one["balanced_accuracy"] + 0.1
    written = json.loads((folder / "metrics.json").read_text())
    assert written["of"] == "a test"
    assert [r["arm"] for r in written["scores"]] == [r["arm"] for r in rows]
    assert (folder / "metrics.md").read_text().count("\n") == len(rows) + 2


def test_bags_are_of_one_label_and_group_and_labels_are_uniform(examples):
    task = arms._Task(examples, CONFIG, 2000, 0, "cpu")
    cells = np.flatnonzero(examples.part == "val")
    some = np.concatenate([cells[examples.labels[cells] == "a"][:7], cells[-120:]])
    bags = task.items("val", 8)
    assert set(bags.ravel()) <= set(cells)
    for of in (task.labels, task.groups):
        assert (of[bags] == of[bags[:, :1]]).all()
    bags = task.bags(some, 4000, 8, np.random.default_rng(0))
    share = np.bincount(task.truth(bags)) / 4000
    np.testing.assert_allclose(share, 0.25, atol=0.03)
    assert set(bags.ravel()) == set(some)
    np.testing.assert_array_equal(task.items("val", 8), task.items("val", 8))


def test_a_run_that_was_stopped_goes_on(examples, scored, tmp_path, monkeypatch):
    calls, run = [], arms._Task.run

    def stop(self, arm, size, tests):
        calls.append((arm, size))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, arm, size, tests)

    monkeypatch.setattr(arms._Task, "run", stop)
    how = {**HOW, "bag_sizes": (1,)}
    with pytest.raises(KeyboardInterrupt):
        run_arms(examples, tmp_path, **how)
    assert len(list((tmp_path / "arms").glob("*.json"))) == 2
    rows = run_arms(examples, tmp_path, **how)
    assert len(calls) == 1 + len(ARMS)  # those that were finished are not trained again
    wanted = [r for r in scored[0] if r["bag_size"] == 1]
    for row, want in zip(rows, wanted, strict=True):
        assert row["balanced_accuracy"] == want["balanced_accuracy"]


def test_examples_that_cannot_be_used(examples, tmp_path):
    none = replace(examples, part=np.where(examples.part == "val", "", examples.part))
    with pytest.raises(DataError, match="val part"):
        run_arms(none, tmp_path, **HOW)
    one = replace(examples, labels=np.full(len(examples.labels), "a"))
    with pytest.raises(DataError, match="one label"):
        run_arms(one, tmp_path, **HOW)
    untested = np.where(examples.part == "val", "val", "train")
    with pytest.raises(DataError, match="test"):
        run_arms(replace(examples, part=untested), tmp_path, **HOW)
