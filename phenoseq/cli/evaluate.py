"""``phenoseq evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from phenoseq.cli.options import Commands, add_sampling


def add_evaluate(commands: Commands) -> None:
    """Add ``phenoseq evaluate``."""
    evaluate = commands.add_parser(
        "evaluate",
        help="score a model, or a prediction, beside the baselines",
        description="Score a model on a store (--model, --store), or a prediction that exists "
        "(PREDICTION TRUTH --baselines).",
    )
    evaluate.add_argument("prediction", nargs="?", help="PRED.h5ad or .zarr, with all draws")
    evaluate.add_argument("truth", nargs="?", help="counts of the same cells, .h5ad or .zarr")
    evaluate.add_argument("--baselines", help="baselines.zarr of an earlier evaluation")
    evaluate.add_argument("--group", default="group", help="column held out together (%(default)s)")
    evaluate.add_argument("--model", help="name in the zoo, or folder")
    evaluate.add_argument("--store", help="prepared store; for a prediction, of the gallery")
    evaluate.add_argument("--split", default="test", help="test, cal, val, test_NAME (%(default)s)")
    evaluate.add_argument("--regressor", help="folder of the end-to-end regressor, made if need be")
    evaluate.add_argument(
        "--epochs", type=int, default=10, help="of the regressor; the model's own (%(default)s)"
    )
    evaluate.add_argument(
        "--encoder-weights",
        help="pretrained weights that the model's encoder started from, for the regressor's: hub, "
        "or a file",
    )
    evaluate.add_argument("-o", "--out", help="folder for metrics, tables and report.html")
    add_sampling(evaluate)
    evaluate.set_defaults(run=_evaluate, n_samples=32)
    only = ("split", "regressor", "epochs", "encoder_weights", "n_samples", "steps", "device")
    evaluate.set_defaults(
        of_models={name: evaluate.get_default(name) for name in only},
        of_tables={"group": evaluate.get_default("group")},
    )


def _refuse(options: argparse.Namespace, defaults: dict[str, object], why: str) -> None:
    """Refuse options that would say nothing."""
    from phenoseq.errors import DataError

    given = [name for name, default in defaults.items() if getattr(options, name) != default]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise DataError(f"{names}: {why}; leave out what has no effect")


def _evaluate(options: argparse.Namespace) -> int:
    from phenoseq.errors import DataError
    from phenoseq.evaluation.report import markdown
    from phenoseq.scoring import evaluate, evaluate_tables

    if options.model and options.store and not options.prediction:
        _refuse(options, options.of_tables, "a model is scored by the groups of its split")
        scores = evaluate(
            options.model,
            options.store,
            part=options.split,
            n_samples=options.n_samples,
            steps=options.steps,
            seed=options.seed,
            device=options.device,
            out=options.out,
            regressor=options.regressor,
            epochs=options.epochs,
            encoder_weights=options.encoder_weights,
        )
    elif options.truth and options.baselines and options.out and not options.model:
        _refuse(options, options.of_models, "nothing is predicted or fitted for tables")
        scores = evaluate_tables(
            options.prediction,
            options.truth,
            options.baselines,
            out=options.out,
            store=options.store,
            group=options.group,
            seed=options.seed,
        )
    else:
        raise DataError(
            "give --model and --store; or PREDICTION, TRUTH, --baselines and --out. Baselines are "
            "part of every report, and evaluating a model writes them"
        )
    print(markdown(scores))
    if options.out:
        print(f"report: {Path(options.out) / 'report.html'}")
    return 0
