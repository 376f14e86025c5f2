"""Models saved by older versions load, and give what they gave.

One folder a schema version and network in ``frozen/``: written by the last commit of that version
(version 1: c98cd2b, 2: 19393f1, 3: 872f8a7, 4: fb320be), with what it computed from the inputs in
``expected.safetensors``. They are never written again; a new version adds a folder of the one
before.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import phenoseq
from phenoseq.models.strict import SCHEMA_VERSION

FROZEN = Path(__file__).with_name("frozen")
FOLDERS = sorted(path.name for path in FROZEN.iterdir())


def test_there_is_one_of_every_older_version():
    assert {name.split("-")[0] for name in FOLDERS} == {f"v{v}" for v in range(1, SCHEMA_VERSION)}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_old_model_is_of_the_present_version_once_loaded_and_saved(name, tmp_path):
    old = json.loads((FROZEN / name / "config.json").read_text())
    assert f"v{old['schema_version']}" == name.split("-")[0]
    model = phenoseq.load_model(FROZEN / name)
    assert model.config.schema_version == SCHEMA_VERSION
    model.save(tmp_path / "now")
    assert phenoseq.load_model(tmp_path / "now").config == model.config


@pytest.mark.parametrize("name", [n for n in FOLDERS if not n.endswith("published")])
def test_models_of_ours(name):
    model = phenoseq.load_model(FROZEN / name)
    want = load_file(FROZEN / name / "expected.safetensors")
    assert model.config.recalibration is None
    with torch.inference_mode():
        cells = want["features" if name.endswith("sample") else "images"]
        context = model.encode(cells)
        latents = model.generate(context, want["noise"])
        rates, library = model.expression.decode(latents)
        strangeness = model.strangeness(context, cells)
    got = {"tokens": context[0], "latents": latents, "rates": rates, "library": library}
    for name, tensor in (got | {"strangeness": strangeness}).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", [n for n in FOLDERS if n.endswith("published")])
def test_the_published_network(name):
    model = phenoseq.load_model(FROZEN / name)
    want = load_file(FROZEN / name / "expected.safetensors")
    with torch.inference_mode():
        context = model.encode(want["features"])
        made = model.generate(context, want["noise"])
    torch.testing.assert_close(context[0], want["tokens"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made, want["made"], rtol=1e-4, atol=1e-4)
