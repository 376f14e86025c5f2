"""Appearance: statistics by hand, a distance by the textbook, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phenoseq.errors import ModelError
from phenoseq.models.appearance import Appearance, pixel_statistics

STD = torch.tensor([2.0, 1.0])[:, None, None]


def test_statistics_by_hand():
    rows = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    crop = torch.stack([rows, 1 - rows / 4])[None]
    # standardised: 0 2 / 0 2 and 1 0 / 1 0
    got = pixel_statistics(crop, STD)[0]
    want = [1, 0.5, 1, 0.5, 2**0.5, 0.5**0.5]  # means, deviations, steps to neighbours
    np.testing.assert_allclose(torch.exp(got[:6]) - 0.05, want, atol=1e-6)
    assert float(got[6]) == pytest.approx(-1, abs=0.01)
    nothing = pixel_statistics(torch.zeros(1, 2, 4, 4), STD)[0]
    np.testing.assert_allclose(nothing, [np.log(0.05)] * 6 + [0], rtol=1e-6)


def test_distance_is_mahalanobis_of_the_stains_that_are_there():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 7)) @ (np.eye(7) + 0.2 * rng.normal(size=(7, 7))) + 3
    appearance = Appearance.fit(torch.from_numpy(values))
    one = torch.from_numpy(rng.normal(size=(3, 7)).astype(np.float32))
    present = torch.tensor([[True, True], [False, True], [False, False]])
    for i, kept in enumerate([list(range(7)), [1, 3, 5]]):
        away = one[i].numpy()[kept] - values[:, kept].mean(axis=0)
        covariance = np.cov(values[:, kept].T)
        want = np.sqrt(away @ np.linalg.solve(covariance, away) / len(kept))
        assert float(appearance.distance(one, present)[i]) == pytest.approx(want, rel=0.01)
    assert appearance.distance(one, present)[2] == 0
    own = appearance.distance(torch.from_numpy(values), torch.ones(500, 2, dtype=torch.bool))
    assert float(own.square().mean()) == pytest.approx(1, abs=0.01)
    appearance.check(2, "here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c[:6], "have 7 statistics"),
        (lambda c: c.fill_diagonal_(-1.0), "is no covariance"),
        (lambda c: c + torch.triu(torch.ones(7, 7), 1) / 100, "is no covariance"),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    covariance = tuple(map(tuple, change(torch.eye(7)).tolist()))
    with pytest.raises(ModelError, match=said):
        Appearance((0.0,) * 7, covariance).check(2, "here")
