"""Short of memory: batches in pieces give the same training; the largest that fits is found."""

from __future__ import annotations

import json

import pytest
import torch

from phenoseq.errors import ModelError
from phenoseq.training import train as training
from phenoseq.training.memory import Fit, largest_batch
from phenoseq.training.module import PhenoSeqModule
from phenoseq.training.train import train

quiet = pytest.mark.filterwarnings("ignore")
pytestmark = pytest.mark.usefixtures("quick")


def noise_of_a_cell(self, batch, generator):
    """A loss whose noise depends on the cell alone, so that it is the same in pieces."""
    dim = self.model.config.expression.latent_dim
    drawn = torch.stack(
        [
            torch.randn(2, dim + 1, generator=torch.Generator().manual_seed(row))
            for row in batch["rows"].tolist()
        ]
    )
    t, noise = torch.sigmoid(drawn[..., 0]), drawn[..., 1:]
    drop = torch.zeros(len(t), dtype=torch.bool)
    context = self.model.encode(batch["images"])
    loss = self.model.denoising_loss(context, batch["counts"], t, noise, drop).mean()
    return loss + self.mean_loss(batch, context)


def only(most: int, since: int = 0):
    """Return a loss that takes no more cells than that, from some step on."""

    def loss(self, batch, generator):
        if len(batch["rows"]) > most and self.global_step >= since:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return noise_of_a_cell(self, batch, generator)

    return loss


def checkpoint(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=False)


@pytest.mark.long
@quiet
def test_batches_in_pieces_train_alike(arguments, tmp_path, capsys, monkeypatch):
    """Memory runs short in mid-epoch; the run goes on from the checkpoint of step 4.

    Not with Adam, which makes whole steps of the rounding of small gradients.
    """
    monkeypatch.setattr(
        PhenoSeqModule,
        "configure_optimizers",
        lambda self: torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9),
    )
    monkeypatch.setattr(PhenoSeqModule, "training_loss", noise_of_a_cell)
    train(arguments("whole", epochs=1))
    assert "out of memory" not in capsys.readouterr().out
    monkeypatch.setattr(PhenoSeqModule, "training_loss", only(16, since=6))
    train(arguments("pieces", epochs=1, **{"checkpoint.steps": 4}))
    said = capsys.readouterr().out
    assert said.count("out of memory: each batch of 32 is computed in 2 pieces of about 16") == 1
    assert json.loads((tmp_path / "pieces/checkpoints/memory.json").read_text())["pieces"] == 2
    whole, pieces = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "pieces")
    assert pieces["global_step"] == whole["global_step"]
    assert pieces["StoreDataModule"] == whole["StoreDataModule"]
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(pieces["state_dict"][name], tensor, rtol=1e-4, atol=1e-5)


@quiet
def test_out_of_memory_in_validation_says_what_to_set(arguments, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PhenoSeqModule, "validation_losses", full)
    with pytest.raises(ModelError, match=r"in validation.* set data.batch_size to 16"):
        train(arguments(epochs=1, **{"trainer.num_sanity_val_steps": 1}))


@quiet
def test_auto_batch_finds_the_largest(arguments, tmp_path, capsys, monkeypatch):
    with pytest.raises(ModelError, match="auto_batch tries batches on one GPU"):
        train([*arguments(epochs=1), "--auto-batch"])
    monkeypatch.setattr(training, "_tells_when_full", lambda trainer: True)
    monkeypatch.setattr(PhenoSeqModule, "training_loss", only(70))
    train([*arguments("found", epochs=1, **{"data.batch_size": 16}), "--auto-batch"])
    out = capsys.readouterr().out
    assert "the largest batch that fits has 64" in out
    assert "out of memory" not in out
    assert Fit.read(tmp_path / "found") == Fit(batch_size=64)
    assert checkpoint(tmp_path / "found")["global_step"] < 8


@pytest.mark.parametrize(
    ("room", "start", "most", "found"),
    [(100, 16, 1000, 64), (100, 128, 1000, 64), (100, 100, 120, 100), (5, 64, 64, 4), (1, 8, 8, 1)],
)
def test_largest_batch(room, start, most, found):
    tried = []

    def try_one(size):
        tried.append(size)
        if size > room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    assert largest_batch(try_one, start, most) == found
    assert max(tried) <= most


def test_largest_batch_that_cannot_be():
    def full(size):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(ModelError, match="out of memory with a single item"):
        largest_batch(full, 8, 8)

    def broken(size):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        largest_batch(broken, 8, 8)
