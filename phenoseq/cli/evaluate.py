"""``phenoseq evaluate``."""

from __future__ import annotations

import argparse

from phenoseq.cli.options import Commands, add_sampling


def add_evaluate(commands: Commands) -> None:
    """Add ``phenoseq evaluate``."""
    evaluate = commands.add_parser("evaluate", help="score a model beside the baselines")
    evaluate.add_argument("--model", required=True, help="name in the zoo, or folder")
    evaluate.add_argument("--store", required=True, help="prepared store")
    evaluate.add_argument("--split", default="test", help="test, cal, val, test_NAME (%(default)s)")
    evaluate.add_argument("-o", "--out", help="folder for metrics.json, metrics.md, genes.csv")
    add_sampling(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from phenoseq.api import evaluate
    from phenoseq.evaluation.report import markdown

    scores = evaluate(
        options.model,
        options.store,
        part=options.split,
        n_samples=options.n_samples,
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        out=options.out,
    )
    print(markdown(scores))
    return 0
