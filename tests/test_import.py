"""Importing the package, and asking the command for help, is quick: nothing heavy is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

import phenoseq

HEAVY = ("torch", "anndata", "lightning", "timm", "zarr", "pandas", "scipy", "h5py", "numpy")


def loaded_by(code: str) -> list[str]:
    """Heavy modules that some code loads, in a fresh interpreter."""
    tell = f"import sys\nprint('LOADED', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()[1:]


HELP = """
from phenoseq.cli import main
try:
    main({args})
except SystemExit as stop:
    assert stop.code == 0, stop.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import phenoseq",
        "import phenoseq; phenoseq.__version__, phenoseq.DataError, dir(phenoseq)",
        "import phenoseq.cli",
        HELP.format(args=["--help"]),
        HELP.format(args=["--version"]),
        HELP.format(args=["predict", "--help"]),
        HELP.format(args=["evaluate", "--help"]),
    ],
)
def test_nothing_heavy_is_loaded(code):
    assert loaded_by(code) == []


def test_the_check_above_would_notice():
    assert "numpy" in loaded_by("import phenoseq.genes")


@pytest.mark.parametrize("name", phenoseq.__all__)
def test_every_public_name_is_there(name):
    assert getattr(phenoseq, name) is not None
    assert name in dir(phenoseq)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'phenoseq' has no attribute 'predikt'"):
        phenoseq.predikt  # noqa: B018


def test_lazy_names_are_the_real_ones():
    from phenoseq.api import predict
    from phenoseq.data.store import Store
    from phenoseq.models.phenoseq import PhenoSeq
    from phenoseq.scoring import evaluate
    from phenoseq.zoo.registry import list_models, load_model

    names = (evaluate, predict, Store, PhenoSeq, list_models, load_model)
    assert all(getattr(phenoseq, thing.__name__) is thing for thing in names)
