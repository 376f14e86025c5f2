"""Every cell in one bag, by the seed, its sample and its id, and not by the order of the rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from phenoseq.data.bags import constant_metadata, make_bags
from phenoseq.errors import DataError

SIZES = {"a": 40, "b": 16, "c": 3, "d": 33}


@pytest.fixture
def obs():
    """Cells of four samples, their rows mixed."""
    samples = np.repeat(list(SIZES), list(SIZES.values()))
    order = np.random.default_rng(0).permutation(len(samples))
    index = pd.Index([f"cell{i}" for i in range(len(samples))], name="cell_id")
    return pd.DataFrame({"Sample_ID": samples}, index=index).iloc[order]


def bags_of(obs, **options):
    return make_bags(obs, "Sample_ID", **{"size": 16, "seed": 0, "where": "here", **options})


def by_id(obs, bags):
    """Own cells, and those that fill, of each bag."""
    ids = obs.index.to_numpy()
    pairs = zip(bags.names, bags.rows, bags.n_cells, strict=True)
    return {name: (list(ids[rows[:n]]), list(ids[rows[n:]])) for name, rows, n in pairs}


def test_every_cell_is_in_exactly_one_bag_of_its_sample(obs):
    bags = bags_of(obs)
    own = [row for rows, n in zip(bags.rows, bags.n_cells, strict=True) for row in rows[:n]]
    assert sorted(own) == list(range(len(obs)))
    assert bags.rows.shape == (3 + 1 + 1 + 3, 16)
    samples = obs["Sample_ID"].to_numpy()
    for name, sample, rows in zip(bags.names, bags.samples, bags.rows, strict=True):
        assert (samples[rows] == sample).all()
        assert name.rpartition(":")[0] == sample
    assert len(set(bags.names)) == len(bags.names)
    counts = dict(zip(bags.names, bags.n_cells.tolist(), strict=True))
    assert counts["a:2"] == 8
    assert counts["b:0"] == 16
    assert counts["c:0"] == 3
    assert counts["d:2"] == 1


def test_owners(obs):
    bags = bags_of(obs)
    bag, place = bags.owners()
    assert len(bag) == len(obs)
    np.testing.assert_array_equal(bags.rows[bag, place], np.arange(len(obs)))
    assert (place < bags.n_cells[bag]).all()


def test_membership_does_not_depend_on_the_order_of_rows_or_on_other_samples(obs):
    first = by_id(obs, bags_of(obs))
    other = obs.iloc[np.random.default_rng(5).permutation(len(obs))]
    assert by_id(other, bags_of(other)) == first
    some = obs[obs["Sample_ID"].isin(["a", "d"])]
    assert by_id(some, bags_of(some)) == {n: c for n, c in first.items() if n[0] in "ad"}


def test_a_seed_makes_other_bags(obs):
    first, again, other = (by_id(obs, bags_of(obs, seed=s)) for s in (0, 0, 1))
    assert first == again
    assert first["a:0"] != other["a:0"]
    assert set(first["a:0"][0]) != set(other["a:0"][0])


def test_cells_are_mixed_within_a_sample():
    ids = [f"{i:04d}" for i in range(1600)]
    obs = pd.DataFrame({"Sample_ID": "s"}, index=ids)
    bags = bags_of(obs)
    means = bags.rows.mean(axis=1)
    spread = 1600 / np.sqrt(12) / 4  # of the mean of 16 of them at random
    assert 0.7 * spread < means.std() < 1.3 * spread


def test_a_short_bag_is_filled_from_its_sample(obs):
    filled = by_id(obs, bags_of(obs))["d:2"][1]
    assert len(filled) == 15
    assert len(set(filled)) > 8  # the sample has 33 cells
    three = by_id(obs, bags_of(obs))["c:0"]
    assert set(three[1]) <= set(three[0])


def test_samples_of_any_kind(obs):
    text = by_id(obs, bags_of(obs))
    category = obs.assign(Sample_ID=obs["Sample_ID"].astype("category"))
    assert by_id(obs, bags_of(category)) == text
    numbers = obs.assign(Sample_ID=obs["Sample_ID"].map({"a": 1, "b": 2, "c": 3, "d": 10}))
    assert set(bags_of(numbers).samples) == {"1", "2", "3", "10"}


def test_bad_tables(obs):
    with pytest.raises(DataError, match="here: zero cells"):
        bags_of(obs.iloc[:0])
    with pytest.raises(DataError, match=r"no column 'Sample_ID' in obs.*\['Sample_Id'\]"):
        bags_of(obs.rename(columns={"Sample_ID": "Sample_Id"}))
    twice = pd.concat([obs, obs.iloc[:1]])
    with pytest.raises(DataError, match=rf"more than once: \['{obs.index[0]}'\].*make_unique"):
        bags_of(twice)
    lost = obs.copy()
    lost.iloc[3, 0] = None
    with pytest.raises(DataError, match=f"1 cells have no Sample_ID, e.g. {obs.index[3]}"):
        bags_of(lost)


def test_metadata_that_is_one_for_each_sample(obs):
    sample = obs["Sample_ID"]
    obs = obs.assign(
        Metadata_Compound=sample.map({"a": "x", "b": "x", "c": "y", "d": None}),
        Metadata_Dose=sample.map({"a": 1.0, "b": 2.0, "c": 3.0, "d": np.nan}),
        Metadata_Plate=pd.Categorical(sample.map({"a": "p", "b": "q", "c": "p", "d": "q"})),
        Metadata_Site=np.arange(len(obs)),
        Metadata_Half=np.where(np.arange(len(obs)) == 50, "odd", "even"),
        other="same",
    )
    bags = bags_of(obs)
    got = constant_metadata(obs, bags)
    assert list(got.columns) == ["Metadata_Compound", "Metadata_Dose", "Metadata_Plate"]
    assert list(got.index) == bags.names
    assert got.loc["b:0"].tolist() == ["x", 2.0, "q"]
    assert got.loc["d:1", "Metadata_Compound"] == ""
    assert np.isnan(got.loc["d:1", "Metadata_Dose"])
