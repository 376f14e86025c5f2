"""Perceptrons on single cells and bags."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phenoseq.errors import ModelError
from phenoseq.training import perceptron
from phenoseq.training.perceptron import Modality, Perceptron, PerceptronConfig, fit, regress

SMALL = PerceptronConfig(width=16, layers=3, batch_size=32, epochs=40)
ONE = (torch.zeros(2), torch.ones(2))


def test_a_bag_is_the_mean_of_its_cells():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    modality = Modality(values, np.array([3, 1, 0]))
    torch.testing.assert_close(modality.take(np.array([0, 2])), torch.tensor(values[[3, 0]]))
    bags = modality.take(np.array([[0, 1], [2, 2]]))
    torch.testing.assert_close(bags, torch.tensor([values[[3, 1]].mean(0), values[0]]))


def test_scale_is_that_of_the_cells_given_whatever_is_read_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    values = (1e4 + rng.random((50, 3)) * [1, 5, 0]).astype(np.float32)
    monkeypatch.setattr(perceptron, "_READ", 4 * 3 * 7)
    cells = np.arange(20)
    mean, std = Modality(values, np.arange(50)[::-1]).scale(cells)
    used = values[::-1][:20].astype(np.float64)
    np.testing.assert_allclose(mean, used.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std[:2], used.std(0)[:2], rtol=1e-3)
    assert std[2] == 1


def test_layers_are_those_of_the_protocol():
    network = Perceptron(PerceptronConfig(width=8, layers=5), [ONE], 3, seed=0)
    kinds = [type(layer).__name__ for layer in network.branches[0]]
    assert kinds == ["Linear", "LayerNorm", "ReLU"] * 4 + ["Linear"]
    assert not list(network.branches[0][1].parameters())
    fused = Perceptron(PerceptronConfig(width=8, layers=5), [ONE, ONE], 3, seed=0)
    assert fused([torch.zeros(4, 2), torch.zeros(4, 2)]).shape == (4, 3)
    again = Perceptron(PerceptronConfig(width=8, layers=5), [ONE], 3, seed=0)
    torch.testing.assert_close(network([torch.ones(1, 2)]), again([torch.ones(1, 2)]))


def test_rate_is_cut_and_the_best_weights_are_kept(monkeypatch):
    """A score that is best in the third epoch: cut after 8, ended after 15."""
    network = Perceptron(SMALL, [ONE], 2, seed=0)
    rates, weights = [], []
    step = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)

    def epoch(rng):
        yield [torch.from_numpy(rng.random((4, 2), dtype=np.float32))], torch.tensor([0, 1, 0, 1])

    def score():
        weights.append(network.branches[0][0].weight.detach().clone())
        return {1: 0.1, 2: 0.2, 3: 0.5}.get(len(weights), 0.4)

    assert fit(network, epoch, score, SMALL, seed=0) == (0.5, 3)
    assert len(rates) == 15
    np.testing.assert_allclose(rates, [1e-3] * 8 + [1e-4] * 5 + [1e-5] * 2)
    torch.testing.assert_close(network.branches[0][0].weight, weights[2])


def test_scores_that_are_no_numbers_are_an_error():
    network = Perceptron(SMALL, [ONE], 2, seed=0)
    with pytest.raises(ModelError, match="no numbers"):
        fit(network, lambda rng: [], lambda: float("nan"), SMALL, seed=0)


def test_regression_of_samples_learns_their_mean():
    """Targets are of other cells of the sample; the prediction is one for each of the values."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, 4)).astype(np.float32)
    truth = inputs @ rng.standard_normal((4, 3)).astype(np.float32) * 5 + 100
    of = np.repeat(np.arange(60), 8)
    targets = truth[of] + rng.standard_normal((480, 3)).astype(np.float32)
    cells = np.arange(480)
    made = regress(
        Modality(inputs, of), Modality(targets, cells), cells[:320], cells[320:400], SMALL
    )
    assert made.shape == truth.shape
    unseen = slice(50, 60)
    error = ((made[unseen] - truth[unseen]) ** 2).mean()
    assert error < 0.25 * truth[unseen].var(axis=0).mean()
