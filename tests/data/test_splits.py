"""Splits: as METRICS.md defines them, the same for ever, and nothing shared by two parts."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from phenoseq.data.readers.scgenescope import PROTOCOL
from phenoseq.data.splits import LEFT_OUT, PARTS, UNASSIGNED, SplitConfig, make_split
from phenoseq.errors import DataError

PIXEL, BLOCK, HALF = 0.2125, 318.75, 13.6  # a block of 1500 pixels; half of 64 pixels of 0.425 um


def cells(n=4000, width=7000.0, height=2900.0, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {"x_centroid": rng.random(n) * width, "y_centroid": rng.random(n) * height},
        index=[f"cell{i}" for i in range(n)],
    )


FIXED = SplitConfig()


def split(obs, config=FIXED, occupied=None, crop_width=2 * HALF):
    everyone = obs if occupied is None else occupied
    return make_split(config, obs, crop_width=crop_width, occupied=everyone)


def parts_by_definition(obs, occupied):
    """Divide as METRICS.md says, in its own words and in pixels."""

    def block_of(x, y):
        return math.floor(x / PIXEL / 1500), math.floor(y / PIXEL / 1500)

    places = {block_of(x, y) for x, y in zip(occupied.x_centroid, occupied.y_centroid, strict=True)}
    order = sorted(places, key=lambda b: hashlib.sha256(f"{b[0]},{b[1]}".encode()).hexdigest())
    n = len(order)
    fifth, tenth = math.floor(n / 5), math.floor(n / 10)
    part = {}
    for rank, place in enumerate(order):
        if rank < fifth:
            part[place] = "test"
        elif rank < fifth + tenth:
            part[place] = "val"
        elif rank < fifth + 2 * tenth:
            part[place] = "cal"
        else:
            part[place] = "train"
    out = []
    for x, y in zip(obs.x_centroid, obs.y_centroid, strict=True):
        bx, by = block_of(x, y)
        own = part[bx, by]
        for other, its in part.items():
            gap_x = max(other[0] * BLOCK - x, x - (other[0] + 1) * BLOCK, 0)
            gap_y = max(other[1] * BLOCK - y, y - (other[1] + 1) * BLOCK, 0)
            if its != own and max(gap_x, gap_y) <= HALF:
                own = "margin"
                break
        out.append(own)
    return np.array(out)


def test_fixed_split_as_defined():
    occupied = cells()
    obs = occupied.sample(2500, random_state=1)
    found = split(obs, occupied=occupied).part
    expected = parts_by_definition(obs, occupied)
    np.testing.assert_array_equal(found, expected)
    assert set(found) == {"train", "val", "cal", "test", "margin"}
    assert 0.05 < (found == "margin").mean() < 0.25


def test_groups_come_from_all_cells_of_the_source():
    """So that a harsher filter of cells moves no block to another part."""
    occupied = cells(900)
    full = split(occupied).part
    some = np.random.default_rng(0).permutation(900)[:100]
    np.testing.assert_array_equal(split(occupied.iloc[some], occupied=occupied).part, full[some])


def test_no_block_in_two_parts():
    result = split(cells())
    frame = pd.DataFrame({"group": result.group, "part": result.part})
    kept = frame[frame.part != LEFT_OUT]
    assert kept.groupby("group").part.nunique().max() == 1
    assert set(kept.part) == set(PARTS)


@pytest.mark.parametrize(
    ("block", "crop_width"), [(100.0, 20.0), (100.0, 150.0), (30.0, 80.0), (20.0, 90.0)]
)
def test_no_crop_touches_a_block_of_another_part(block, crop_width):
    """Checked against every occupied block; also for crops wider than blocks."""
    obs = cells(1500, 600.0, 400.0)
    config = SplitConfig(block=block, test=0.05, val=0.05, cal=0.05)
    result = split(obs, config, crop_width=crop_width)
    x, y = obs.x_centroid.to_numpy(), obs.y_centroid.to_numpy()
    place = np.stack([np.floor(x / block), np.floor(y / block)], axis=1)
    # No block is without a cell in the margin, so take the parts from a split without margin.
    part = split(obs, config, crop_width=0.0).part
    assert LEFT_OUT not in part
    touched = np.zeros(len(obs), dtype=bool)
    blocks = {(*corner, its) for corner, its in zip(place.tolist(), part.tolist(), strict=True)}
    for column, row, its in blocks:
        left, top = column * block, row * block
        overlaps = (
            (x + crop_width / 2 >= left)
            & (x - crop_width / 2 < left + block)
            & (y + crop_width / 2 >= top)
            & (y - crop_width / 2 < top + block)
        )
        touched |= overlaps & (part != its)
    np.testing.assert_array_equal(result.part == LEFT_OUT, touched)
    np.testing.assert_array_equal(result.part[~touched], part[~touched])


def test_margin_is_of_occupied_blocks_only():
    """A block without cells is in no part."""
    config = SplitConfig(block=100.0, test=0.5, val=0.0, cal=0.0)
    apart = pd.DataFrame({"x_centroid": [99.0, 201.0], "y_centroid": 50.0})
    assert set(split(apart, config, crop_width=20.0).part) == {"test", "train"}
    side_by_side = pd.DataFrame({"x_centroid": [99.0, 101.0, 150.0], "y_centroid": 50.0})
    result = split(side_by_side, config, crop_width=20.0)
    assert result.part[:2].tolist() == [LEFT_OUT, LEFT_OUT]
    assert result.part[2] in ("test", "train")


def test_fields_have_blocks_of_their_own():
    obs = cells(400, 500.0, 500.0).assign(field=["left", "right"] * 200)
    config = SplitConfig(block=250.0, test=0.25, val=0.25, cal=0.25)
    result = split(obs, config, crop_width=10.0)
    assert {group.split(":")[0] for group in result.group} == {"left", "right"}
    assert len(set(result.group)) == 8
    # Where all stored cells are of one field, their blocks keep their names and parts.
    of_left = (obs["field"] == "left").to_numpy()
    left = split(obs[of_left], config, occupied=obs, crop_width=10.0)
    np.testing.assert_array_equal(left.part, result.part[of_left])
    assert left.digest == result.digest


# ------------------------------------------------------------------------------------- by column


def wells(n=300, n_wells=30):
    return cells(n).assign(Metadata_Well=[f"W{i % n_wells:02d}" for i in range(n)])


def test_by_column():
    obs = wells()
    result = split(obs, SplitConfig(by="Metadata_Well", block=None))
    order = sorted(set(obs.Metadata_Well), key=lambda w: hashlib.sha256(w.encode()).hexdigest())
    part = dict(zip(order, ["test"] * 6 + ["val"] * 3 + ["cal"] * 3 + ["train"] * 18, strict=True))
    assert result.part.tolist() == [part[well] for well in obs.Metadata_Well]
    assert result.group.tolist() == list(obs.Metadata_Well)


def test_by_column_of_numbers_or_categories():
    text = wells().assign(Metadata_Site=[str(i % 20) for i in range(300)])
    config = SplitConfig(by="Metadata_Site", block=None)
    expected = split(text, config)
    for dtype in (int, "category"):
        other = split(text.astype({"Metadata_Site": dtype}), config)
        np.testing.assert_array_equal(other.part, expected.part)
        assert other.digest == expected.digest


def test_by_a_column_that_is_not_there():
    with pytest.raises(DataError, match=r"'Metadata_Plate': cells have no such column.*Metadata_W"):
        split(wells(), SplitConfig(by="Metadata_Plate", block=None))


def test_by_a_column_with_holes():
    """Cells without a group cannot be told to be on one side."""
    obs = wells()
    obs.loc["cell7", "Metadata_Well"] = None
    with pytest.raises(DataError, match="'Metadata_Well': 1 cells have none"):
        split(obs, SplitConfig(by="Metadata_Well", block=None))


# -------------------------------------------------------------------------------- declared groups


def replicates(n=60):
    return cells(n).assign(Replicate=[str(1 + i % 6) for i in range(n)])


DECLARED = {"train": ["3"], "val": ["5"], "test": ["4"], "test_he": ["1", "2"]}


def declared(groups=DECLARED, by="Replicate", **options):
    return SplitConfig(by=by, block=None, declared=groups, **options)


def test_declared_groups_fall_where_they_are_told():
    obs = replicates()
    result = split(obs, declared())
    where = {"3": "train", "5": "val", "4": "test", "1": "test_he", "2": "test_he", "6": UNASSIGNED}
    assert result.part.tolist() == [where[group] for group in obs.Replicate]
    assert result.sizes() == {
        "train": 10, "val": 10, "test": 10, "test_he": 20, UNASSIGNED: 10,
    }  # fmt: skip
    assert set(obs.Replicate.iloc[result.rows("test_he")]) == {"1", "2"}
    with pytest.raises(DataError, match="the cal part has no cells"):
        result.rows("cal")
    with pytest.raises(DataError, match="no part 'unassigned'"):
        result.rows(UNASSIGNED)


KINDS = {
    "block": SplitConfig(),
    "small block": SplitConfig(block=40.0, test=0.3),
    "field": SplitConfig(by="field", block=None, test=0.34, val=0, cal=0.34),
    "plate": SplitConfig(by="Metadata_Plate", block=None, test=0.25, val=0.25, cal=0),
    "well": SplitConfig(by="Metadata_Well", block=None),
    "donor": SplitConfig(by="Metadata_Donor", block=None),
    "treatment": SplitConfig(by="Metadata_Treatment", block=None, test=0.3),
    "batch": SplitConfig(by="batch", block=None, test=0.34, val=0.34, cal=0),
    "donors told": declared({"train": ["d1", "d2"], "test": ["d0"]}, by="Metadata_Donor"),
    "scGeneScope": PROTOCOL,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_on_two_sides(kind, seed):
    """Whatever cells of a source are in the store, in whatever order, and of whatever dtype."""
    rng = np.random.default_rng(seed)
    everyone = cells(3000, seed=seed).assign(
        field=rng.choice(["f0", "f1", "f2"], 3000),
        Metadata_Plate=rng.integers(0, 4, 3000) + 2**60,
        Metadata_Well=pd.Categorical(rng.choice([f"A{k:02d}" for k in range(1, 25)], 3000)),
        Metadata_Donor=[f"d{k}" for k in rng.zipf(1.5, 3000) % 12],
        Metadata_Treatment=rng.choice(["DMSO", "drug é", "drug/2", "x" * 99], 3000),
        batch=rng.choice(["b1", "b2", "b3"], 3000),
        Replicate=rng.choice(list("12345"), 3000),
    )
    obs = everyone.sample(frac=0.7, random_state=seed)
    config = KINDS[kind]
    result = split(obs, config, occupied=everyone)
    assert len(result.part) == len(result.group) == len(obs)
    sides = pd.DataFrame({"group": result.group, "part": result.part})
    sides = sides[~sides["part"].isin([LEFT_OUT, UNASSIGNED])].drop_duplicates()
    assert sides["group"].is_unique
    assert len(set(sides["part"])) >= 2
    if config.block is None:
        assert (result.group == obs[config.by].astype(str)).all()
    other = split(everyone, config, occupied=everyone)  # all cells: the same side for each
    again = pd.Series(other.part, index=everyone.index)[obs.index]
    assert (again.to_numpy() == result.part).all()


def test_the_protocol_of_scgenescope():
    """Train on replicate 3, select on 5; 4 is the test within, 1 and 2 the one held out."""
    obs = cells(50).assign(Replicate=[str(1 + i % 5) for i in range(50)])
    result = split(obs, PROTOCOL)
    where = {"3": "train", "5": "val", "4": "test_we", "1": "test_he", "2": "test_he"}
    assert result.part.tolist() == [where[replicate] for replicate in obs["Replicate"]]


def test_a_declared_part_may_be_absent_but_not_half_there():
    """One round of an experiment has no group of some parts; one group missing is a slip."""
    obs = replicates()
    first_round = obs[~obs.Replicate.isin(["1", "2"])]
    result = split(first_round, declared())
    assert result.sizes() == {"train": 10, "val": 10, "test": 10, UNASSIGNED: 10}
    with pytest.raises(DataError, match=r"the test_he part has no cells.*declared"):
        result.rows("test_he")
    with pytest.raises(DataError, match=r"no cell is of \['2'\], declared for test_he; there are"):
        split(obs[obs.Replicate != "2"], declared())


def test_digest_of_declared_groups():
    """Of what is declared and what is there; not of its order, nor of shares that are not used."""
    obs = replicates()
    known = split(obs, declared()).digest
    other = {part: tuple(reversed(groups)) for part, groups in reversed(DECLARED.items())}
    assert split(obs, declared(other, test=0.3)).digest == known
    moved = {**DECLARED, "test": ["4", "6"]}
    assert split(obs, declared(moved)).digest != known
    assert split(obs[obs.Replicate != "6"], declared()).digest != known
    renamed = obs.rename(columns={"Replicate": "Metadata_Replicate"})
    assert split(renamed, declared(by="Metadata_Replicate")).digest != known


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"train": ["3"], "dev": ["5"]}, r"no parts \['dev'\]"),
        ({"train": ["3"], "test_": ["5"]}, r"no parts \['test_'\]"),
        ({"train": "3"}, "groups of train must be a list of text"),
        ({"train": [3]}, "groups of train must be a list of text"),
        ({"train": ["3"], "val": ["3"]}, r"groups \['3'\] are declared more than once"),
        ({"train": ["3", "3"]}, r"groups \['3'\] are declared more than once"),
    ],
)
def test_bad_declarations(groups, message):
    with pytest.raises(DataError, match=message):
        declared(groups)


def test_blocks_cannot_be_declared():
    with pytest.raises(DataError, match="declared by a column"):
        SplitConfig(declared={"train": ["0,0"]})


# ---------------------------------------------------------------------------------------- digest


def test_digest_is_stable():
    """These values are inside trained models: a change breaks their claim of a fixed split."""
    blocks = pd.DataFrame({"x_centroid": np.arange(40) * 100.0 + 50, "y_centroid": 10.0})
    known = "96e81ecc5fe02680"
    assert split(blocks).digest.startswith(known)
    assert split(blocks.iloc[::-1]).digest.startswith(known)
    assert split(blocks.iloc[:5], occupied=blocks).digest.startswith(known)


def test_digest_of_whole_numbers():
    """A config file may say 300 where a script says 300.0."""
    obs = cells(200)
    whole = SplitConfig(block=300, test=0.2, val=0, cal=0)
    floats = SplitConfig(block=300.0, test=0.2, val=0.0, cal=0.0)
    assert split(obs, whole).digest == split(obs, floats).digest


def test_digest_changes_with_config_and_groups():
    obs = wells()
    base = SplitConfig()
    configs = [
        base,
        replace(base, block=300.0),
        replace(base, test=0.3),
        replace(base, val=0.2),
        replace(base, cal=0.05),
        SplitConfig(by="Metadata_Well", block=None),
    ]
    digests = [split(obs, config).digest for config in configs]
    digests.append(split(obs, base, occupied=pd.concat([obs, cells(5, 9000.0, seed=3)])).digest)
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)


# -------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("shares", [(-0.1, 0.1, 0.1), (0.5, 0.3, 0.2), (0.9, 0.1, 0.1)])
def test_bad_shares(shares):
    with pytest.raises(DataError, match="leave some training"):
        SplitConfig(test=shares[0], val=shares[1], cal=shares[2])


def test_bad_blocks():
    with pytest.raises(DataError, match="no block"):
        SplitConfig(block=0.0)
    with pytest.raises(DataError, match="needs 'block'"):
        SplitConfig(block=None)
    with pytest.raises(DataError, match="only such a split has one"):
        SplitConfig(by="Metadata_Well")


def test_rows_of_a_part():
    result = split(cells())
    together = np.concatenate([result.rows(part) for part in PARTS])
    assert len(together) == (result.part != LEFT_OUT).sum()
    for part in PARTS:
        assert set(result.part[result.rows(part)]) == {part}
    with pytest.raises(DataError, match=r"no part 'dev'; choose from \['train', 'val'"):
        result.rows("dev")
    with pytest.raises(DataError, match="no part 'margin'"):
        result.rows("margin")


def test_empty_part():
    few = split(cells(50, 300.0, 900.0))  # three blocks: a tenth of them is none
    with pytest.raises(DataError, match="the val part has no cells: 3 groups are too few"):
        few.rows("val")
