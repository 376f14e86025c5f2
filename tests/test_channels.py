"""Stains go by one name, whatever instruments and labs call them."""

from __future__ import annotations

import pytest

from phenoseq.channels import STAINS, canonical, canonical_channels, match_channels
from phenoseq.errors import DataError, PhenoseqWarning


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("DAPI", "DNA"),
        ("dapi", "DNA"),
        ("Hoechst 33342", "DNA"),
        ("HOECHST-33342", "DNA"),
        ("OrigDNA", "DNA"),
        ("DNA", "DNA"),
        ("dna", "DNA"),
        ("ATP1A1/CD45/E-Cadherin", "Boundary"),
        ("18S", "18S"),
        ("AlphaSMA/Vimentin", "InteriorProtein"),
        ("alphaSMA/Vimentin", "InteriorProtein"),
        ("\u03b1SMA/Vimentin", "InteriorProtein"),
        ("SYTO 14", "RNA"),
        ("Concanavalin A", "ER"),
        ("MitoTracker", "Mito"),
        ("mito", "Mito"),
        ("poly-T", "PolyT"),
        ("cellbound1", "Cellbound1"),
    ],
)
def test_canonical(written, name):
    assert canonical(written) == name


@pytest.mark.parametrize("name", ["CD8", "anti-PD1", "", "DNA2", "Cellbound4", "核"])
def test_unknown_stain_keeps_its_name(name):
    assert canonical(name) == name


def test_no_alias_means_two_stains():
    """Else the last in the table would win in silence."""
    claims = {}
    for name, aliases in STAINS.items():
        for alias in (name, *aliases):
            folded = "".join(c for c in alias.lower() if c.isalnum())
            assert claims.setdefault(folded, name) == name, alias
        assert canonical(name) == name


def test_canonical_channels_keep_their_order():
    assert canonical_channels(["18S", "DAPI", "CD8"], "here") == ("18S", "DNA", "CD8")


@pytest.mark.parametrize("names", [["DAPI", "CD8", "Hoechst"], ["CD8", "DAPI", "CD8"]])
def test_one_stain_twice(names):
    with pytest.raises(DataError, match=r"plate 3: \['.*', '.*'\] all mean the stain") as error:
        canonical_channels(names, "plate 3")
    assert names[0] in str(error.value)
    assert names[2] in str(error.value)


@pytest.mark.parametrize("empty", ["", "  "])
def test_stain_without_a_name(empty):
    with pytest.raises(DataError, match="plate 3: a stain has no name"):
        canonical_channels(["DAPI", empty], "plate 3")


def test_match_places_by_name():
    assert match_channels(["RNA", "DNA"], ["DNA", "ER", "RNA"], "x") == [1, None, 0]


def test_match_with_an_unknown_stain():
    with pytest.raises(DataError, match=r"my plate: the model does not know .*\['CD8'\].*'DNA'"):
        match_channels(["DNA", "CD8"], ["DNA", "ER"], "my plate")


def test_match_of_more_stains_than_the_model_has():
    with pytest.warns(PhenoseqWarning, match=r"my plate: .*\['Brightfield'\]; they are not used"):
        placed = match_channels(["DNA", "Brightfield", "ER"], ["ER", "DNA"], "my plate")
    assert placed == [2, 0]


def test_match_of_nothing():
    with pytest.raises(DataError, match=r"none of the model's stains \['DNA'\]"):
        match_channels([], ["DNA"], "x")
