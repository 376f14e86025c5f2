"""HGNC's table of symbols: which gene a symbol is of, and how the table is made."""

from __future__ import annotations

import gzip

import h5py
import pytest

from phenoseq import symbols
from phenoseq.symbols import ensembl_ids, release, write_table

HEAD = "hgnc_id\tsymbol\tname\talias_symbol\tprev_symbol\tensembl_gene_id\n"
ROWS = """\
HGNC:1\tAAA\tfirst\tX1|both|BBB\tOLD1|shared\tENSG00000000001
HGNC:2\tBBB\tsecond\tboth|OLD1\tshared\tENSG00000000002
HGNC:3\tCCC\tthird\tshared\t\tENSG00000000003
HGNC:4\tX1\tno id\t\t\t
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Put a small table in place of HGNC's."""
    (tmp_path / "hgnc.txt").write_text(HEAD + ROWS)
    assert write_table(tmp_path / "hgnc.txt", "1 May", tmp_path / "small.tsv.gz") == 4
    monkeypatch.setattr(symbols, "_path", lambda: tmp_path / "small.tsv.gz")
    symbols._known.cache_clear()
    yield tmp_path / "small.tsv.gz"
    symbols._known.cache_clear()


@pytest.mark.parametrize(
    ("symbol", "number"),
    [
        ("AAA", 1),
        ("BBB", 2),  # approved, and an alias of another
        ("OLD1", 1),  # former of one, alias of another
        ("both", None),  # alias of two
        ("shared", None),  # former of two, and an alias of one
        ("X1", None),  # approved of a gene without an id, and an alias of another
        ("aaa", None),
        ("", None),
    ],
)
def test_which_gene_a_symbol_is_of(small, symbol, number):
    assert ensembl_ids([symbol]) == ["" if number is None else f"ENSG{number:011d}"]


def test_the_table_is_the_same_each_time_it_is_made(small, tmp_path):
    first = small.read_bytes()
    write_table(tmp_path / "hgnc.txt", "1 May", small)
    assert small.read_bytes() == first
    assert release() == (
        "HGNC complete set, 1 May, CC0 1.0: symbol, prev_symbol, alias_symbol, ensembl_gene_id"
    )


def test_the_table_that_is_shipped():
    assert "CC0" in release()
    with gzip.open(symbols._path(), "rt", encoding="utf-8") as file:
        assert sum(1 for _ in file) > 44_000
    assert symbols._path().stat().st_size < 1_500_000
    assert ensembl_ids(["TP53", "MARCH1", "MARCHF1", "H2AC6", "Cd4"]) == [
        "ENSG00000141510",
        *["ENSG00000145416"] * 2,
        "ENSG00000180573",
        "",
    ]


def test_it_agrees_with_a_real_panel(shared_data):
    """Ids and symbols of 10x Genomics' panel are those of the table, a few renamed genes too."""
    with h5py.File(shared_data / "xenium_pancreas" / "cell_feature_matrix.h5") as file:
        features = file["matrix/features"]
        columns = [features[name].asstr()[:] for name in ("id", "name")]
    real = {name: i for i, name in zip(*columns, strict=True) if i.startswith("ENSG")}
    found = ensembl_ids(list(real))
    assert sum(a == b for a, b in zip(found, real.values(), strict=True)) == len(real) == 374
