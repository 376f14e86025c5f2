"""``phenoseq benchmark``: published protocols, on data that a lab has."""

from __future__ import annotations

import argparse

from phenoseq.cli.options import Commands


def add_benchmark(commands: Commands) -> None:
    """Add ``phenoseq benchmark``."""
    benchmark = commands.add_parser("benchmark", help="run a published benchmark")
    kinds = benchmark.add_subparsers(required=True, metavar="BENCHMARK")
    scope = kinds.add_parser(
        "scgenescope",
        help="which treatment, from images, predicted RNA and measured RNA",
        description="The protocol of scGeneScope: train on replicate 3, select on 5, test on 4 "
        "and on 1 and 2. A run that was stopped goes on under the same command.",
    )
    scope.add_argument("data", help="folder of scGeneScope, with features/")
    scope.add_argument("-o", "--out", required=True, help="folder for the scores")
    how = scope.add_mutually_exclusive_group(required=True)
    how.add_argument("--model", help="name in the zoo, or folder, of a model of these features")
    how.add_argument("--config", help="configuration of 'phenoseq train', to train one")
    scope.add_argument(
        "--imaging", default="imagenet/vit-l", help="below features/imaging (%(default)s)"
    )
    scope.add_argument("--rna", default="scgpt", help="below features/rnaseq (%(default)s)")
    scope.add_argument(
        "--embedding", default="scGPT", help="name in obsm of the RNA files (%(default)s)"
    )
    scope.add_argument(
        "--draws", type=int, default=128_000, help="bags of 32 in each test (%(default)s)"
    )
    scope.add_argument(
        "--epochs", type=int, default=100, help="of a classifier, at most (%(default)s)"
    )
    scope.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    scope.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    scope.set_defaults(run=_scgenescope)


def _scgenescope(options: argparse.Namespace) -> int:
    from pathlib import Path

    from phenoseq.benchmark.files import ScGeneScope
    from phenoseq.benchmark.scgenescope import benchmark_scgenescope
    from phenoseq.training.arms import arms_markdown
    from phenoseq.training.perceptron import PerceptronConfig

    rows = benchmark_scgenescope(
        ScGeneScope(Path(options.data), options.imaging, options.rna, options.embedding),
        options.out,
        model=options.model,
        config=options.config,
        classifier=PerceptronConfig(epochs=options.epochs),
        draws=options.draws,
        seed=options.seed,
        device=options.device,
    )
    print(arms_markdown(rows))
    print(f"{options.out}: metrics.json, metrics.md")
    return 0
