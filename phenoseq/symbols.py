"""Symbols of human genes and the Ensembl ids that they stand for, as HGNC's table says.

``hgnc.tsv.gz`` is made from HGNC's complete set (https://www.genenames.org/download, CC0 1.0) by
``python -m phenoseq.symbols hgnc_complete_set.txt RELEASE``; its first line says of which release.
HGNC: Seal et al., Genenames.org: the HGNC resources in 2023, Nucleic Acids Research 51, D1003.
"""

from __future__ import annotations

import functools
import gzip
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import pandas as pd

_TABLE = "hgnc.tsv.gz"
#: Columns of the table, those with symbols in the order in which they are asked.
_COLUMNS = ("symbol", "prev_symbol", "alias_symbol", "ensembl_gene_id")


def ensembl_ids(symbols: Sequence[str]) -> list[str]:
    """Return the Ensembl id of each symbol of a human gene, "" where there is none.

    A symbol is that of the gene approved under it, else of the one gene formerly approved under it,
    else of the one gene with this alias. A symbol of several genes is of none. Upper and lower case
    differ, so that mouse genes (``Trp53``) are not taken for human ones.

    Examples
    --------
    >>> ensembl_ids(["TP53", "C1orf194", "p53", "Trp53"])
    ['ENSG00000141510', 'ENSG00000179902', 'ENSG00000141510', '']
    """
    known = _known()
    return [known.get(symbol, "") for symbol in symbols]


def release() -> str:
    """Return which release of HGNC's table this is."""
    with gzip.open(_path(), "rt", encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def _path() -> Path:
    return Path(str(files("phenoseq"))) / _TABLE


@functools.cache
def _known() -> Mapping[str, str]:
    with gzip.open(_path(), "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if not line.startswith("#")]
    known: dict[str, str] = {}
    for column in range(3):
        here: dict[str, str] = {}
        for row in rows:
            for symbol in filter(None, row[column].split("|")):
                here[symbol] = row[3] if here.setdefault(symbol, row[3]) == row[3] else ""
        known = here | known  # what was there before wins
    return known


def write_table(complete_set: Path, release: str, out: Path) -> int:
    """Write the table from HGNC's complete set, a file of tab-separated text; return its rows."""
    table = pd.read_csv(complete_set, sep="\t", dtype=str, keep_default_na=False)
    table = table[list(_COLUMNS)].sort_values("symbol")  # a gene without an id keeps its symbol
    head = f"# HGNC complete set, {release}, CC0 1.0: {', '.join(_COLUMNS)}"
    text = "\n".join([head, *("\t".join(row) for row in table.to_numpy()), ""])
    out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return len(table)


if __name__ == "__main__":
    print(write_table(Path(sys.argv[1]), sys.argv[2], _path()), "genes")
