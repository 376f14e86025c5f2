"""The configuration goes through JSON and back, and refuses what it does not know."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from phenoseq.errors import ModelError
from phenoseq.models.config import (
    SCHEMA_VERSION,
    DiffusionConfig,
    ImageConfig,
    PhenoSeqConfig,
    TrainingRecord,
)
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.expression import ExpressionConfig

CONFIG = PhenoSeqConfig(
    image=ImageConfig(
        channels=("DNA", "18S"),
        pixel_size=0.2125,
        crop_px=64,
        dtype="uint16",
        mean=(1.5, 2.0),
        std=(0.1, 3.0),
        p999=(65535.0, 1e-7),
    ),
    expression=ExpressionConfig(("ENSG1", "B"), ("A", "B"), 1, 8, 123.5),
    training=TrainingRecord(
        source="å section",
        identity="ab",
        split={"by": "Metadata_Well", "block": None, "test": 0.2, "val": 0.1, "cal": 0.1},
        split_digest="cd",
        n_cells=10,
        seed=3,
        version="0.1",
        reliability=(0.25, -0.5),
        reliability_interval=((0.1, 0.4), (-0.7, 0.0)),
    ),
    encoder=EncoderConfig("test_vit", "separate", "batch"),
    denoiser=DenoiserConfig(8, 1, 2, 1),
    diffusion=DiffusionConfig("cosine", "v", "heun", 5),
)
WHERE = "some/folder/config.json"


def changed(**fields) -> str:
    """The configuration as JSON with fields, named by their path, replaced; None removes."""
    raw = json.loads(CONFIG.to_json())
    for name, value in fields.items():
        *parents, last = name.split("__")
        at = raw
        for parent in parents:
            at = at[parent]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return json.dumps(raw)


def refusal(text: str) -> str:
    with pytest.raises(ModelError) as error:
        PhenoSeqConfig.from_json(text, WHERE)
    assert WHERE in str(error.value)
    return str(error.value)


def test_round_trip():
    again = PhenoSeqConfig.from_json(CONFIG.to_json(), WHERE)
    assert again == CONFIG
    assert isinstance(again.image.channels, tuple)
    assert again.training.split["block"] is None


def test_round_trip_of_declared_groups():
    split = {"by": "Replicate", "block": None, "declared": {"train": ["3"], "test_he": ["1", "2"]}}
    config = replace(CONFIG, training=replace(CONFIG.training, split=split))
    assert PhenoSeqConfig.from_json(config.to_json(), WHERE) == config


def test_round_trip_of_defaults():
    plain = PhenoSeqConfig(
        CONFIG.image,
        CONFIG.expression,
        replace(CONFIG.training, reliability=(), reliability_interval=()),
    )
    assert PhenoSeqConfig.from_json(plain.to_json(), WHERE) == plain


def test_json_is_plain_and_has_its_schema_version():
    raw = json.loads(CONFIG.to_json())
    assert raw["schema_version"] == SCHEMA_VERSION
    assert raw["image"]["channels"] == ["DNA", "18S"]
    assert raw["pairing"] == "cell"


def test_a_whole_number_does_for_a_float():
    again = PhenoSeqConfig.from_json(changed(image__pixel_size=1, image__mean=[1, 2]), WHERE)
    assert again.image.pixel_size == 1.0
    assert all(isinstance(m, float) for m in (again.image.pixel_size, *again.image.mean))


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        CONFIG.image.crop_px = 32


@pytest.mark.parametrize("text", ["", "{", "not JSON", '{"schema_version": 1'])
def test_not_json(text):
    assert "not JSON" in refusal(text)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"text"'])
def test_json_that_is_no_configuration(text):
    refusal(text)


@pytest.mark.parametrize("version", [0, -1, SCHEMA_VERSION + 1, "1", 1.0, True, None])
def test_a_schema_version_that_is_not_read(version):
    message = refusal(changed(schema_version=version))
    assert f"schema version {version!r}, this phenoseq" in message
    assert f"reads 1 to {SCHEMA_VERSION}" in message


def test_the_first_version_named_no_network():
    old = json.loads(changed(schema_version=1, network=None))
    again = PhenoSeqConfig.from_json(json.dumps(old), WHERE)
    assert again == CONFIG
    assert "is of the network None" in refusal(changed(network=None))


@pytest.mark.parametrize(
    "name",
    ["image__pixel_size", "image__mean", "expression__median_library", "training__reliability"],
)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(name, number):
    given = 77.25 if name.count("size") or name.count("library") else [77.25, 1.0]
    text = changed(**{name: given}).replace("77.25", number)
    assert "no number to compute with" in refusal(text)


def test_a_number_of_a_thousand_digits():
    assert "bits" in refusal(changed(training__seed=10**1000))


@pytest.mark.parametrize(
    "text",
    ["\x1b[2Jgone", "\x9b31m", "a\x07", "\u202egnp.exe", "nul\0", "\ud800", "a\nb", "x" * 5000],
)
@pytest.mark.parametrize("name", ["training__source", "image__dtype", "diffusion__path"])
def test_text_that_a_terminal_would_obey_is_refused(name, text):
    message = refusal(changed(**{name: text}))
    assert "not to be printed" in message
    assert message.isprintable()
    assert len(message) < 500


def test_letters_of_any_language_are_fine():
    text = "Bauchspeicheldrüse 膵臓 بنكرياس µm"
    again = PhenoSeqConfig.from_json(changed(training__source=text), WHERE)
    assert again.training.source == text


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_deep(opening):
    refusal(opening * 100_000)


def test_a_wrong_value_is_told_in_short():
    assert len(refusal(changed(image__channels=["DNA"] * 100_000 + [3]))) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("denoiser__dim", 10**9),
        ("denoiser__depth", 10**6),
        ("denoiser__tokens", 10**6),
        ("denoiser__heads", 3),
        ("expression__components", 10**7),
        ("expression__hidden", 10**12),
        ("expression__median_library", 0),
        ("image__crop_px", 100_000),
        ("image__crop_px", 0),
        ("image__pixel_size", -1),
        ("image__std", [0.0, 1.0]),
        ("diffusion__steps", 0),
    ],
)
def test_numbers_out_of_bounds_are_refused_by_name(name, value):
    assert name.split("__")[-1] in refusal(changed(**{name: value}))


@pytest.mark.parametrize(
    "name", ["surprise", "image__surprise", "denoiser__surprise", "training__surprise"]
)
def test_an_unknown_field_is_named(name):
    message = refusal(changed(**{name: 1}))
    assert "unknown ['surprise']" in message
    assert all(part in message for part in name.split("__")[:-1])


@pytest.mark.parametrize("name", ["image", "image__channels", "expression__genes", "encoder__norm"])
def test_a_missing_field_is_named(name):
    assert f"missing ['{name.split('__')[-1]}']" in refusal(changed(**{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image__crop_px", "64"),
        ("image__crop_px", 64.5),
        ("image__crop_px", True),
        ("image__pixel_size", "0.2"),
        ("image__pixel_size", False),
        ("image__channels", "DNA"),
        ("image__channels", ["DNA", 3]),
        ("image__mean", [1.0, "2"]),
        ("image", [1, 2]),
        ("encoder__channel_mode", "both"),
        ("encoder__backbone", 3),
        ("diffusion__output", "x1"),
        ("diffusion__steps", 2.5),
        ("pairing", "guess"),
        ("training__split", ["by"]),
        ("training__split", {"by": True}),
        ("training__reliability", 0.5),
        ("training__reliability_interval", [[0.1, 0.2]]),
        ("training__reliability_interval", [[0.1, 0.2], [0.1]]),
    ],
)
def test_a_wrong_type_is_refused_by_name(name, value):
    assert name.split("__")[-1] in refusal(changed(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("image__mean", [1.0]), ("image__std", [1.0, 2.0, 3.0]), ("expression__symbols", ["A"])],
)
def test_lists_that_do_not_go_together_are_refused(name, value):
    assert name.split("__")[-1] in refusal(changed(**{name: value}))
