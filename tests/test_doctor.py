"""``phenoseq doctor`` tells what is there, and fails where something that is needed is not."""

from __future__ import annotations

from importlib import metadata

import pytest

from phenoseq._version import __version__
from phenoseq.cli import main


@pytest.fixture
def told(capsys):
    """Give a function that runs it: exit status, and its lines by their first word."""

    def run():
        status = main(["doctor"])
        out = capsys.readouterr().out
        lines = [line.split(maxsplit=1) for line in out.splitlines()]
        return status, {line[0]: line[-1] for line in lines}

    return run


def test_what_is_there(told):
    status, lines = told()
    assert status == 0
    assert lines["phenoseq"] in (__version__, "has what it needs")
    assert lines["torch"] == metadata.version("torch")
    assert "cores" in lines["cpu"]
    assert lines["JPEG2K"] == "there"
    assert lines["xenium"] == "ready"
    assert lines["https://"] == "ready"
    assert lines["xenium-pancreas"] == "here"
    assert lines["test"] == "installed"


def test_what_is_missing(told, monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("aiohttp", "faiss-cpu"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "timm" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    status, lines = told()
    assert status == 1
    assert lines["timm"].startswith("BAD: timm 0.1, phenoseq needs >=1.0")
    assert lines["faiss"].endswith('pip install "phenoseq[faiss]"')
    assert lines["https://"].startswith("missing: for ome-zarr")


def test_a_codec_that_is_missing(told, monkeypatch):
    import imagecodecs

    monkeypatch.setattr(imagecodecs.JPEG2K, "available", False)
    status, lines = told()
    assert status == 1
    assert lines["JPEG2K"].startswith("BAD: for Xenium images")
