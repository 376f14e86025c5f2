"""``phenoseq doctor``: what this machine has, and what is missing for what."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from phenoseq.cli.options import Commands

#: Compressions of images, as imagecodecs names them, and who needs them.
CODECS = {
    "JPEG2K": "Xenium images",
    "JPEG8": "OME-TIFF",
    "LZW": "TIFF of Opera Phenix and ImageXpress",
    "DEFLATE": "TIFF",
    "ZSTD": "TIFF",
}
#: Kinds of URL, the package that opens them and the extra that brings it.
REMOTE = {"https": "aiohttp", "s3": "s3fs"}

Line = tuple[str, str, str]


def add_doctor(commands: Commands) -> None:
    """Add ``phenoseq doctor``."""
    doctor = commands.add_parser(
        "doctor", help="say what this machine has, and what is missing", description=__doc__
    )
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    ill = False
    for title, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("cache", _cache()),
        ("codecs", _codecs()),
        ("readers", _readers()),
        ("extras", _extras()),
    ):
        print(title)
        for name, state, advice in lines:
            print(f"  {name:18} {state}{': ' if advice else ''}{advice}")
            ill |= state == "BAD"
    print("something that phenoseq needs is missing" if ill else "phenoseq has what it needs")
    return int(ill)


def _versions() -> Iterator[Line]:
    from phenoseq._version import __version__

    yield "phenoseq", __version__, ""
    yield "python", platform.python_version(), ""
    yield "system", platform.platform(), ""
    for name, wanted, extra in _requirements():
        if not extra:
            problem = _problem(name, wanted)
            yield name, "BAD" if problem else metadata.version(name), problem


def _extras() -> Iterator[Line]:
    missing: dict[str, list[str]] = {}
    for name, wanted, extra in _requirements():
        if extra:
            problems = missing.setdefault(extra, [])
            if problem := _problem(name, wanted):
                problems.append(problem)
    for extra, problems in missing.items():
        advice = f'{"; ".join(problems)}; pip install "phenoseq[{extra}]"' if problems else ""
        yield extra, "missing" if problems else "installed", advice


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Go through what phenoseq requires: name, versions, and the extra that it belongs to."""
    from packaging.requirements import Requirement

    for text in metadata.requires("phenoseq") or ():
        requirement = Requirement(text)
        marker = str(requirement.marker or "")
        extra = marker.partition('extra == "')[2].partition('"')[0]
        yield requirement.name, str(requirement.specifier), extra


def _problem(name: str, wanted: str) -> str:
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    return "" if fits else f"{name} {version}, phenoseq needs {wanted}"


def _devices() -> Iterator[Line]:
    import torch

    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", ""
    if not torch.cuda.is_available():
        yield "cuda", "none", ""
    for k in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(k)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        yield f"cuda:{k}", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {half}", ""
    yield "mps", "there" if torch.backends.mps.is_available() else "none", ""


def _cache() -> Iterator[Line]:
    from huggingface_hub import constants

    from phenoseq.zoo.registry import list_models

    place = Path(constants.HF_HOME).expanduser()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    writable = os.access(there, os.W_OK)
    yield "HF_HOME", str(place), "" if writable else "not writable; set HF_HOME to another folder"
    yield "free", f"{shutil.disk_usage(there).free / 1e9:.0f} GB", ""
    yield "hub", constants.ENDPOINT, "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    for entry in list_models():
        advice = f"phenoseq models download {entry.name}"
        yield entry.name, "here" if entry.is_here else "not here", "" if entry.is_here else advice


def _codecs() -> Iterator[Line]:
    import imagecodecs

    for name, use in CODECS.items():
        here = bool(getattr(imagecodecs, name).available)
        advice = "" if here else f"for {use}; pip install --force-reinstall imagecodecs"
        yield name, "there" if here else "BAD", advice


def _readers() -> Iterator[Line]:
    from phenoseq.data.readers import READERS

    for reader in READERS:
        yield reader.name, "ready", ""
    use = ", ".join(reader.name for reader in READERS if reader.remote)
    for scheme, package in REMOTE.items():
        problem = _problem(package, "")
        advice = f'for {use}, and images that jump lists; pip install "phenoseq[remote]"'
        yield f"{scheme}://", "missing" if problem else "ready", advice if problem else ""
