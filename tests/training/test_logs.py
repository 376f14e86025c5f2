"""What a run writes about itself: by default, by the user's choice, and on resume."""

from __future__ import annotations

import pandas as pd
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phenoseq.errors import ModelError
from phenoseq.training.train import train

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]
EACH = {"trainer.log_every_n_steps": 1}


@pytest.fixture
def no_pictures():
    """Draw them, here."""


def test_csv_tensorboard_and_curves_by_default(arguments, tmp_path, capsys):
    train(arguments(epochs=1, **EACH))
    said = capsys.readouterr()
    assert not said.err  # no bar, no notes: nobody looks on
    root = tmp_path / "run"
    assert sorted(p.name for p in root.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "model",
        "tensorboard",
    ]
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "learning_curves.png",
    ]
    table = pd.read_csv(root / "metrics.csv")
    board = EventAccumulator(str(root / "tensorboard")).Reload()
    assert [s.step for s in board.Scalars("train_loss")] == table[
        "train_loss"
    ].dropna().index.tolist()
    assert board.Scalars("val_loss")[0].value == pytest.approx(table["val_loss"].dropna().item())
    least = table["val_loss"].min()
    assert f"mean weights of last.ckpt, step {len(board.Scalars('train_loss'))} " in said.out
    assert f"(val_loss was least, {least:.4g}, at step" in said.out


def test_a_logger_of_choice_is_taken(arguments, tmp_path):
    """As W&B and MLflow are: by class_path; metrics.csv is written all the same."""
    config = tmp_path / "logger.yaml"
    chosen = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "mine"), "name": "chosen"},
    }
    config.write_text(yaml.safe_dump({"trainer": {"logger": chosen}}))
    train(["--config", str(config), *arguments(epochs=1, **EACH)])
    run = tmp_path / "run"
    mine = pd.read_csv(tmp_path / "mine" / "chosen" / "version_0" / "metrics.csv")
    table = pd.read_csv(run / "metrics.csv")
    pd.testing.assert_series_equal(mine["train_loss"], table["train_loss"])
    assert not (run / "tensorboard").exists()
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_whose_package_is_not_there_is_named(arguments, name, monkeypatch):
    """The settings are read; then it says what to install."""
    module, flag = {
        "WandbLogger": ("wandb", "_WANDB_AVAILABLE"),
        "MLFlowLogger": ("mlflow", "_MLFLOW_AVAILABLE"),
    }[name]
    monkeypatch.setattr(f"lightning.pytorch.loggers.{module}.{flag}", None)
    chosen = {"trainer.logger": f"lightning.pytorch.loggers.{name}"}
    with pytest.raises(ModelError, match="need a package that is not there"):
        train(arguments(**chosen))


def test_best_or_last(arguments, tmp_path, capsys):
    """Learning at far too high a rate, the first epoch is the best."""
    settings = {"model.lr": 0.3, "ema": 0.0, **EACH}
    train(arguments(epochs=2, **settings))
    capsys.readouterr()
    loss = pd.read_csv(tmp_path / "run" / "metrics.csv").set_index("step")["val_loss"].dropna()
    best = int(loss.idxmin()) + 1
    train([*arguments(epochs=2, **settings), "--export", "best", "--out", str(tmp_path / "best")])
    assert f"mean weights of best.ckpt, step {best} " in capsys.readouterr().out
    assert (tmp_path / "best" / "model.safetensors").exists()
