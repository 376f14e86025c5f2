"""``phenoseq screen``: which treatments change the predicted expression, and how."""

from __future__ import annotations

import argparse

from phenoseq.cli.options import Commands


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
        default=2.0,
        help="wells with a higher mean ood_score are set apart (%(default)s)",
    )
    screen.add_argument(
        "--gene-sets", nargs="+", default=[], help="files of gene sets, .gmt, or .csv with weights"
    )
    screen.add_argument(
        "--replicates", action="store_true", help="replicate retrieval too (mAP, by copairs)"
    )
    screen.add_argument("--seed", type=int, default=0, help="of the permutations (%(default)s)")
    screen.set_defaults(run=_screen)


def _screen(options: argparse.Namespace) -> int:
    from phenoseq.evaluation.genesets import read_gene_sets, score_gene_sets
    from phenoseq.evaluation.screen import screen

    sets = {path: read_gene_sets(path) for path in options.gene_sets}
    result = screen(
        options.prediction,
        treatment=options.treatment,
        control=options.control,
        normalise=options.normalise,
        max_ood=options.max_ood,
        replicates=options.replicates,
        seed=options.seed,
    )
    for path, table in sets.items():
        score_gene_sets(result.changes, table, path)
    folder = result.save(options.out)
    print(result.ranking.head(20).round(4).to_string())
    facts = result.changes.uns["screen"]
    for what in ("wells_set_apart", "treatments_of_one_well"):
        if facts[what]:
            print(f"  not scored, {what.replace('_', ' ')}: {len(facts[what])}")
    print(f"{folder}: screen.html, changes.h5ad, wells.h5ad, ranking.csv, genes.csv")
    return 0
