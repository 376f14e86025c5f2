"""Gene vocabularies align by id, and say what does not."""

from __future__ import annotations

import warnings

import pandas as pd
import pytest

from phenoseq.errors import DataError, PhenoseqWarning
from phenoseq.genes import (
    gene_table,
    genes_of,
    match_genes,
    merged_genes,
    read_gene_list,
    tell_symbols,
)

ID = "ENSG%011d"

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


def test_genes_without_ensembl_ids_are_told():
    var = gene_table([P53, "", "CLECL1", MOUSE], ["TP53", "NOID", "CLECL1", "Trp53"], "here")
    with pytest.warns(PhenoseqWarning, match=r"2 genes have no .* of 1 of them, not of \['NOID'\]"):
        tell_symbols(var, "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_symbols(var.iloc[[0, 3]], "here")


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


def test_genes_of_var():
    """Ids are the index where it has them, else a column; a gene without one goes by symbol."""
    by_id = pd.DataFrame({"gene_name": ["A", "B"]}, index=[ID % 1 + ".7", ID % 2])
    found = genes_of(by_id, "here")
    assert list(found.index) == [ID % 1, ID % 2]
    assert list(found["symbol"]) == ["A", "B"]
    by_symbol = pd.DataFrame({"gene_ids": [ID % 1, None]}, index=["A", "B"])
    found = genes_of(by_symbol, "here")
    assert list(found.index) == [ID % 1, "B"]
    assert list(found["symbol"]) == ["A", "B"]
    with pytest.raises(DataError, match="listed more than once"):
        genes_of(pd.DataFrame({"gene_ids": [ID % 1, ID % 1]}, index=["A", "B"]), "here")


def test_match_by_id_then_by_symbol():
    have = gene_table([ID % 1, ID % 2, "", ""], ["A", "B", "C", "D"], "have")
    want = gene_table(["", ID % 4, ID % 1, ID % 9], ["B", "D", "renamed", "lost"], "want")
    match = match_genes(have, want, "here")
    # B by symbol; D by symbol, since only one has an id; 1 by id, though its symbol changed
    assert match.want.tolist() == [0, 1, 2]
    assert match.have.tolist() == [1, 3, 0]
    assert match.by_symbol == 2
    assert match.missing == ["lost"]
    merged = merged_genes(have, want, match)
    assert list(merged.index) == [ID % 2, ID % 4, ID % 1]


def test_two_ids_are_two_genes_and_unclear_symbols_match_nothing():
    have = gene_table([ID % 1, ID % 2, ID % 3], ["A", "B", "B"], "have")
    want = gene_table([ID % 7, "", ""], ["A", "B", "C"], "want")
    with pytest.raises(DataError, match=r"only 0 of 3 genes matched"):
        match_genes(have, want, "here")


def test_symbols_match_ids_through_the_table():
    """Approved, former and alias symbols; two names of one gene, or of none, match nothing."""
    ids = [P53, "ENSG00000168385", ACTB, "ENSG00000184293"]
    want = gene_table(ids, ["TP53", "SEPTIN2", "other", "CLEC2L"], "want")
    have = gene_table([""] * 6, ["SEPT2", "p53", "ACTB", "GENE1", "CLECL1", "CLECL1P"], "have")
    match = match_genes(have, want, "here")
    assert match.have.tolist() == [1, 0, 2]
    assert match.want.tolist() == [0, 1, 2]
    assert (match.by_symbol, match.by_table) == (0, 3)
    assert "3 of 4 genes matched, 0 of them by symbol, 3 by HGNC's table" in str(match)
    back = match_genes(want, have, "here", min_share=0.4)
    assert back.have.tolist() == [1, 0, 2]
    assert back.want.tolist() == [0, 1, 2]
    assert list(merged_genes(have, want, match).index) == ids[:3]


def test_what_files_say_comes_before_the_table():
    """SEPT2 is formerly SEPTIN2's, but here it is the symbol of another gene."""
    have = gene_table(["", ""], ["SEPT2", "Trp53"], "have")
    want = gene_table([ID % 5, "ENSG00000168385", P53], ["SEPT2", "SEPTIN2", "TP53"], "want")
    match = match_genes(have, want, "here", min_share=0.1)
    assert (match.have.tolist(), match.want.tolist()) == ([0], [0])
    assert match.missing == ["SEPTIN2", "TP53"]  # Trp53 is a mouse's


def test_no_genes_match_nothing():
    none, some = gene_table([], [], "none"), gene_table([""], ["TP53"], "some")
    for have, want in ((none, some), (some, none)):
        with pytest.raises(DataError, match="only 0 of"):
            match_genes(have, want, "here")


def test_too_few_genes_match():
    have, want = gene_table(["", ""], ["A", "B"], "h"), gene_table([""] * 3, ["A", "X", "Y"], "w")
    with pytest.raises(DataError, match=r"here: only 1 of 3.*missing are X, Y.*at least 50%"):
        match_genes(have, want, "here")
    assert len(match_genes(have, want, "here", min_share=0.3).have) == 1


def test_list_of_genes(tmp_path):
    (tmp_path / "genes.txt").write_text(f"B\n\n{ID % 3}.2\n")
    assert list(read_gene_list(tmp_path / "genes.txt").index) == ["B", ID % 3]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="empty list of genes"):
        read_gene_list(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="not a readable list"):
        read_gene_list(tmp_path / "nowhere.txt")
