"""Whatever stands in a configuration or a header of weights, only our own error comes out."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phenoseq.errors import ModelError
from phenoseq.models.load import load_folder, read_any_config

pytestmark = pytest.mark.long

spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

FROZEN = Path(__file__).with_name("frozen")
CONFIGS = [
    (FROZEN / f"v1-{name}" / "config.json").read_text() for name in ("phenoseq", "published")
]
WEIGHTS = (FROZEN / "v1-published" / "model.safetensors").read_bytes()
HEADER = json.loads(WEIGHTS[8 : 8 + struct.unpack("<Q", WEIGHTS[:8])[0]])


def tries(n):
    """The same n examples each time."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    how = {"deadline": None, "derandomize": True, "database": None}
    return settings(max_examples=n, suppress_health_check=quiet, **how)


numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 65536, 1024]),
    st.floats(),
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(shutil.copytree(fuzz.SEED, tmp_path_factory.mktemp("fuzz") / "model"))


@st.composite
def spoilt(draw, raw):
    """A value of JSON with some of its parts replaced, taken away or added."""
    raw = json.loads(json.dumps(raw))
    for _ in range(draw(st.integers(1, 3))):
        at = raw
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            what = draw(st.sampled_from(["replace", "number", "drop", "add"]))
            if what == "drop":
                del at[key]
            elif what == "add" and isinstance(at, dict):
                at[draw(st.text(max_size=4))] = draw(anything)
            else:
                at[key] = draw(numbers if what == "number" else anything)
            break
    return raw


@tries(200)
@given(data=st.data(), text=st.sampled_from(CONFIGS))
def test_configurations(data, text):
    text = json.dumps(data.draw(spoilt(json.loads(text))))
    try:
        read_any_config(text, "here")
    except ModelError as error:
        fuzz.check_told(str(error))


@tries(200)
@given(text=st.text() | st.binary().map(lambda b: b.decode(errors="replace")))
def test_text_that_is_no_configuration(text):
    with pytest.raises(ModelError):
        read_any_config(text, "here")


@tries(40)
@given(data=st.data())
def test_folders_with_a_spoilt_configuration(folder, data):
    raw = data.draw(spoilt(json.loads(CONFIGS[1])))
    fuzz.attempt(folder, "config.json", json.dumps(raw).encode(errors="surrogatepass"))


@tries(100)
@given(header=spoilt(HEADER))
def test_folders_with_a_spoilt_header(folder, header):
    text = json.dumps(header).encode()
    body = WEIGHTS[8 + struct.unpack("<Q", WEIGHTS[:8])[0] :]
    fuzz.attempt(folder, "model.safetensors", struct.pack("<Q", len(text)) + text + body)


@tries(100)
@given(
    at=st.integers(0, 400),
    new=st.binary(max_size=12),
    cut=st.none() | st.integers(0, len(WEIGHTS)),
)
def test_folders_with_spoilt_bytes(folder, at, new, cut):
    data = (WEIGHTS[:at] + new + WEIGHTS[at + len(new) :])[:cut]
    fuzz.attempt(folder, "model.safetensors", data)


def test_the_check_above_would_notice(folder, monkeypatch):
    assert fuzz.attempt(folder, "model.safetensors", WEIGHTS)
    monkeypatch.setattr(fuzz, "load_folder", lambda folder: {}["other"])
    with pytest.raises(KeyError):
        fuzz.attempt(folder, "config.json", b"")


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("phenoseq", {"denoiser": {"dim": 65536, "depth": 64, "heads": 2, "tokens": 2}}),
        ("published", {"sizes": {"dim": 16384, "layers": 128, "heads": 4}}),
        ("phenoseq", {"encoder": {"backbone": "vit_giant_patch14_224"}}),
    ],
)
def test_a_terabyte_of_layers_is_refused_before_it_is_allocated(tmp_path, network, changes):
    folder = tmp_path / "m"
    shutil.copytree(FROZEN / f"v1-{network}", folder)
    raw = json.loads((folder / "config.json").read_text())
    for part, values in changes.items():
        raw[part] |= values
    (folder / "config.json").write_text(json.dumps(raw))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="does not hold the weights of its config"):
        load_folder(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
