"""Gene vocabularies align by id, and say what does not."""

from __future__ import annotations

import numpy as np
import pytest

from phenoseq.errors import DataError
from phenoseq.genes import align_genes, gene_table, without_ensembl

P53, ACTB, MOUSE = "ENSG00000141510", "ENSG00000075624", "ENSMUSG00000059552"


def test_gene_table():
    var = gene_table([P53, f"{ACTB}.11", MOUSE, ""], ["TP53", "ACTB", "Trp53", "NOID"], "here")
    assert list(var.index) == [P53, ACTB, MOUSE, "NOID"]
    assert list(var["symbol"]) == ["TP53", "ACTB", "Trp53", "NOID"]
    assert var.index.name == "gene_id"


def test_spaces_around_names_do_not_count():
    var = gene_table([f" {P53} ", "  "], [" TP53", "NOID "], "here")
    assert list(var.index) == [P53, "NOID"]
    assert list(var["symbol"]) == ["TP53", "NOID"]


def test_only_ensembl_ids_lose_their_version():
    """A dot is part of many symbols."""
    var = gene_table(["AC004556.1", f"{P53}.2", "", "NKX2.1"], ["a", "b", "HLA.A", "c"], "here")
    assert list(var.index) == ["AC004556.1", P53, "HLA.A", "NKX2.1"]


def test_without_ensembl():
    var = gene_table([P53, "", "CLECL1", MOUSE], ["TP53", "NOID", "CLECL1", "Trp53"], "here")
    assert without_ensembl(var) == ["NOID", "CLECL1"]


@pytest.mark.parametrize(
    ("ids", "symbols"),
    [
        ([P53, P53], ["TP53", "TP53b"]),
        ([f"{P53}.1", f"{P53}.2"], ["TP53", "TP53b"]),
        (["", ""], ["SAME", "SAME"]),
        (["", "SAME"], ["SAME", "OTHER"]),
    ],
)
def test_gene_listed_twice(ids, symbols):
    with pytest.raises(DataError, match=r"m\.h5: genes listed more than once.*(ENSG|SAME)"):
        gene_table(ids, symbols, "m.h5")


def test_gene_without_id_and_symbol():
    with pytest.raises(DataError, match=r"m\.h5: 2 genes have neither id nor symbol"):
        gene_table(["", " ", P53], [" ", "", ""], "m.h5")


def test_no_genes():
    assert len(gene_table([], [], "here")) == 0


def test_align():
    have, want = ["d", "a", "x", "b"], ["a", "b", "c", "d"]
    found = align_genes(have, want, "here")
    assert [have[i] for i in found.have] == [want[i] for i in found.want] == ["a", "b", "d"]
    assert found.have.tolist() == [1, 3, 0]
    assert found.want.tolist() == [0, 1, 3]
    assert found.missing == ["c"]
    assert found.have.dtype == found.want.dtype == np.int64


def test_align_of_equal_vocabularies():
    genes = [P53, ACTB, "NOID"]
    found = align_genes(genes, genes, "here")
    assert found.have.tolist() == found.want.tolist() == [0, 1, 2]
    assert found.missing == []


def test_align_of_nothing_names_both_sides():
    with pytest.raises(DataError, match=r"table: none of the 2 genes.*'TP53'.*ENSG.*Ensembl id"):
        align_genes(["TP53", "ACTB"], [P53, ACTB], "table")
