"""``phenoseq screen``: which treatments change the predicted expression, and how."""

from __future__ import annotations

import argparse
from pathlib import Path

from phenoseq.cli.options import Commands
from phenoseq.errors import DataError


def add_screen(commands: Commands) -> None:
    """Add ``phenoseq screen``."""
    screen = commands.add_parser("screen", help="rank treatments by what they change")
    screen.add_argument("prediction", help="predicted expression, PRED.h5ad or PRED.zarr")
    screen.add_argument(
        "--control", required=True, help="treatment of the control wells, e.g. DMSO"
    )
    screen.add_argument(
        "--treatment", default="Metadata_Treatment", help="column that names it (%(default)s)"
    )
    screen.add_argument("-o", "--out", required=True, help="folder for the page and the tables")
    screen.add_argument(
        "--normalise",
        choices=["none", "standardise", "sphere"],
        default="none",
        help="each plate, by its control wells (%(default)s)",
    )
    screen.add_argument(
        "--max-ood",
        type=float,
        help="wells with a higher mean ood_score are set apart (by that of the control wells)",
    )
    screen.add_argument(
        "--q",
        type=float,
        default=0.05,
        help="false discovery rate of genes, gene sets and treatments marked (%(default)s)",
    )
    screen.add_argument(
        "--permutations",
        type=int,
        default=2000,
        help="exchanges of labels a treatment; no p is below one over them (%(default)s)",
    )
    screen.add_argument(
        "--gene-sets", nargs="+", default=[], help="files of gene sets, .gmt, or .csv with weights"
    )
    screen.add_argument("--replicates", action="store_true", help="replicate retrieval too (mAP)")
    screen.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    screen.set_defaults(run=_screen)


def _screen(options: argparse.Namespace) -> int:
    from phenoseq.evaluation.genesets import read_gene_sets
    from phenoseq.evaluation.screen import screen

    names = [Path(path).stem for path in options.gene_sets]
    if len(set(names)) < len(names):
        raise DataError(f"--gene-sets: two files have one name, {sorted(names)}; rename one")
    result = screen(
        options.prediction,
        treatment=options.treatment,
        control=options.control,
        normalise=options.normalise,
        max_ood=options.max_ood,
        q_limit=options.q,
        permutations=options.permutations,
        gene_sets=dict(zip(names, map(read_gene_sets, options.gene_sets), strict=True)),
        replicates=options.replicates,
        seed=options.seed,
    )
    folder = result.save(options.out)
    print(result.ranking.head(20).round(4).to_string())
    facts = result.changes.uns["screen"]
    for what in ("wells_set_apart", "treatments_of_one_well"):
        if facts[what]:
            print(f"  not scored, {what.replace('_', ' ')}: {len(facts[what])}")
    print(f"{folder}: screen.html, changes.h5ad, wells.h5ad, ranking.csv, genes.csv")
    return 0
