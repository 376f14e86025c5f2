"""Puts the measured tables of the zoo's models into their cards and the README.

A page holds ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between is made from the
``metrics.json`` that ``phenoseq evaluate`` wrote beside the model's weights.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.evaluation.report import Scores, markdown
from phenoseq.zoo.registry import ModelEntry, find

_TABLE = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(page: str) -> str:
    """Return the page with the table of every model that it names.

    Raises
    ------
    ModelError
        Where it names a model that the zoo does not have, or has no measurements of.
    """

    def table(match: re.Match[str]) -> str:
        entry = find(match[1])
        if not isinstance(entry, ModelEntry):
            raise ModelError(f"{entry.name}: was not measured here, so there is no table of it")
        path = entry.folder / "metrics.json"
        facts = json.loads(path.read_text())
        scores = [Scores(**row) for row in facts["scores"]]
        what = (
            f"{facts['n_cells']:,} cells of {facts['n_groups']} groups, {facts['n_genes']} genes, "
            f"mean of {facts['n_samples']} draws of {facts['steps']} steps, seed {facts['seed']}"
        )
        return f"<!-- table: {match[1]} -->\n{markdown(scores)}\n\n{what}\n<!-- end -->"

    return _TABLE.sub(table, page)


def main(paths: Sequence[str]) -> None:
    """Fill the tables of some pages in place: ``python -m phenoseq.zoo.cards PAGE...``."""
    for path in map(Path, paths):
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
