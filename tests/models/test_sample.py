"""The model of samples: bags to contexts, and back from its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from phenoseq.errors import ModelError
from phenoseq.models.config import SampleConfig, TrainingRecord
from phenoseq.models.denoiser import DenoiserConfig
from phenoseq.models.embedding import EmbeddingConfig, fit_embedding_space
from phenoseq.models.encoder import EncoderConfig
from phenoseq.models.givenfeatures import GivenFeatures
from phenoseq.models.load import load_folder
from phenoseq.models.published_config import PublishedConfig
from phenoseq.models.sample import SamplePhenoSeq

RECORD = TrainingRecord("a + b", "0" * 64, {"by": "Replicate", "block": None}, "1" * 64, 9, 0, "0")


def config_of(make_model=None, **changes) -> SampleConfig:
    """Of features and an embedding; of crops and genes where a model of cells is given."""
    if make_model is None:
        cells, expression, encoder = (
            GivenFeatures("vit", ("DNA", "ER"), 8, 6),
            EmbeddingConfig("scGPT", 5),
            None,
        )
    else:
        of_cells = make_model().config
        cells, expression, encoder = of_cells.image, of_cells.expression, of_cells.encoder
    base = SampleConfig(
        cells, expression, RECORD, encoder, denoiser=DenoiserConfig(16, 2, 2, 2), bag_size=3
    )
    return replace(base, **changes)


def made(config: SampleConfig) -> SamplePhenoSeq:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SamplePhenoSeq(config).eval()


def test_round_trip(tmp_path, make_model):
    for name, config in (("features", config_of()), ("crops", config_of(make_model))):
        model = made(config)
        model.save(tmp_path / name)
        again = load_folder(tmp_path / name)
        assert isinstance(again, SamplePhenoSeq)
        assert again.config == config
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_published_network_remembers_its_training():
    config = PublishedConfig(RECORD)
    assert PublishedConfig.from_json(config.to_json(), "here") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bag_size": 0}, "bag_size is 0"),
        ({"encoder": asdict(EncoderConfig())}, "crops need an encoder, and features have none"),
        ({"expression": {"name": "scGPT", "width": 0}}, "expression: width is 0"),
        ({"expression": {"name": "scGPT", "width": "5"}}, "width: '5' is not"),
        ({"expression": {"name": "scGPT"}}, r"missing \['width'\]"),
        ({"cells": {**asdict(GivenFeatures("v", ("A", "B"), 1, 5))}}, "not those of 2 stains"),
        ({"cells": 3}, "cells: 3 is not"),
        ({"pairing": "cell"}, "pairing"),
        ({"network": "phenoseq"}, "load it with phenoseq.load_model"),
    ],
)
def test_a_broken_configuration_is_refused(changes, message):
    raw = json.loads(config_of().to_json()) | changes
    with pytest.raises(ModelError, match=message):
        SampleConfig.from_json(json.dumps(raw), "here")


@pytest.mark.parametrize("crops", [False, True])
def test_cells_of_a_bag_are_encoded_by_themselves(crops, make_model):
    """The context is each cell's tokens side by side, whatever else is in the bag."""
    model = made(config_of(make_model if crops else None))
    shape = (2, 3, 3, 32, 32) if crops else (2, 3, 6)
    cells = torch.randn(shape)
    keep = torch.tensor([[True, True, False], [True, False, True]])
    tokens, seen = model.encode(cells, keep=keep)
    n = model.encoder.n_tokens
    assert tokens.shape == (2, 3 * n, 16)
    assert torch.equal(seen, keep.repeat_interleave(n, dim=1))
    alone, _ = model.encode(cells[1:, 2:])
    torch.testing.assert_close(tokens[1, 2 * n :], alone[0], rtol=1e-4, atol=1e-5)


def test_a_stain_that_is_missing_has_no_token():
    model = made(config_of())
    features = torch.randn(2, 3, 6)
    present = torch.tensor([[True, False], [True, True]])
    tokens, seen = model.encode(features, present)
    assert seen[0].tolist() == [True, False] * 3
    assert seen[1].all()
    features[0, :, 3:] += 10
    torch.testing.assert_close(model.encode(features, present)[0][:, ::2], tokens[:, ::2])


def test_order_and_fillers_do_not_matter():
    model = made(config_of())
    for block in model.denoiser.blocks:
        torch.nn.init.normal_(block.modulate.weight, std=0.1)
    torch.nn.init.normal_(model.denoiser.outward.weight)
    cells, noise = torch.randn(1, 3, 6), torch.randn(1, 4, 5)
    whole = model.generate(model.encode(cells), noise)
    again = model.generate(model.encode(cells[:, [2, 0, 1]]), noise)
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)
    filled = torch.cat([cells, cells[:, :2]], dim=1)
    keep = torch.tensor([[True, True, True, False, False]])
    again = model.generate(model.encode(filled, keep=keep), noise)
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.generate(model.encode(2 * cells), noise), whole, atol=1e-3)


def test_strangeness_is_over_the_cells_that_count():
    model = made(config_of())
    cells = torch.randn(4, 3, 6)
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[:, 1] = False
    context = model.encode(cells, keep=keep)
    pooled = context[0].unflatten(1, (3, 2)).mean(dim=2)
    expected = pooled[:, [0, 2]].square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(model.strangeness(context, cells), expected)


def test_embeddings_are_standardised_as_they_are():
    values = np.random.default_rng(0).normal(3, 2, (500, 4)).astype(np.float32)
    values[:, 2] = 7  # a constant
    space = fit_embedding_space("scVI", values)
    latent = space.encode(torch.from_numpy(values))
    np.testing.assert_allclose(latent.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(latent.std(0, correction=0), [1, 1, 0, 1], atol=1e-5)
    torch.testing.assert_close(space.decode(latent), torch.from_numpy(values))
    assert space.config == EmbeddingConfig("scVI", 4)
