"""Checkpoints of the published project: converted right, and never run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from phenoseq.cli import main
from phenoseq.errors import DataError, ModelError
from phenoseq.models.load import load_folder
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import (
    Origin,
    PublishedConfig,
    PublishedNoise,
    PublishedSizes,
)
from phenoseq.zoo.convert import convert_checkpoint, read_statistics, sha256_of

SIZES = PublishedSizes(12, 6, 16, 4, 2, 2, 8, 2, 0.1)


def make_checkpoint() -> dict:
    """A checkpoint in the published format, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PublishedPhenoSeq(PublishedConfig(Origin("", "", "raw"), SIZES, PublishedNoise()))
    state = {n: t.detach().clone() for n, t in model.state_dict().items() if "features" not in n}
    state["rna_mean"] += 2.0
    state["rna_std"] += 0.5
    for name in ("betas", "alphas_cumprod"):
        state[name] = getattr(model.path, name).float()
    ema = {n: p.detach() + 0.25 for n, p in model.named_parameters()}
    return {
        "epoch": 3,
        "best_val_loss": np.float64(0.5),
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "ema_state_dict": ema,
        "config": {
            "model": {
                "img_dim": 12,
                "rna_dim": 6,
                "model_dim": 16,
                "num_heads": 4,
                "num_layers": 2,
                "dropout": 0.1,
                "time_dim": 8,
                "ff_mult": 2,
            },
            "diffusion": {
                "num_steps": 1000,
                "schedule": "cosine",
                "beta_start": 1e-4,
                "beta_end": 0.02,
            },
            "training": {"lr": 1e-4},
        },
        "rna_norm": {"mean": np.zeros(6, np.float32), "std": np.ones(6, np.float32)},
    }


@pytest.fixture
def raw():
    return make_checkpoint()


@pytest.fixture
def statistics(tmp_path):
    path = tmp_path / "img_norm.npz"
    np.savez(path, mean=np.linspace(-1, 1, 12), std=np.linspace(0.5, 2, 12))
    return path


@pytest.fixture
def convert(tmp_path, statistics):
    """Give a function that saves a checkpoint and converts it."""

    def go(raw, name="model", **options):
        path = tmp_path / "checkpoint.pt"
        if not isinstance(raw, Path):
            torch.save(raw, path)
        return convert_checkpoint(path, tmp_path / name, features=statistics, **options)

    return go


# --------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_statistics_and_origin_are_kept(tmp_path, raw, convert, statistics, weights):
    folder = convert(raw, weights=weights)
    got = load_file(folder / "model.safetensors")
    source = raw["ema_state_dict" if weights == "ema" else "model_state_dict"]
    parameters = [name for name in got if name.startswith("denoiser.")]
    assert len(parameters) == len(raw["ema_state_dict"])
    assert all(torch.equal(got[name], source[name]) for name in parameters)
    assert torch.equal(got["rna_mean"], torch.full((6,), 2.0))
    assert torch.equal(got["rna_std"], torch.full((6,), 1.5))
    np.testing.assert_allclose(got["features_mean"], np.linspace(-1, 1, 12), rtol=1e-6)
    np.testing.assert_allclose(got["features_std"], np.linspace(0.5, 2, 12), rtol=1e-6)
    model = load_folder(folder)
    assert model.config.sizes == SIZES
    assert model.config.origin.weights == weights
    assert model.config.origin.checkpoint == sha256_of(tmp_path / "checkpoint.pt")
    assert model.config.origin.statistics == sha256_of(statistics)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_average_is_taken_by_default(raw, convert):
    assert load_folder(convert(raw)).config.origin.weights == "ema"


def test_another_schedule_and_fewer_steps(raw, convert):
    path = PublishedNoise("linear", 12, 1e-3, 0.3, steps=12).path()
    raw["config"]["diffusion"] = {
        "num_steps": 12, "schedule": "linear", "beta_start": 1e-3, "beta_end": 0.3,
    }  # fmt: skip
    raw["model_state_dict"] |= {
        "betas": path.betas.float(),
        "alphas_cumprod": path.alphas_cumprod.float(),
    }
    model = load_folder(convert(raw))
    assert model.path.timesteps == 12
    assert model.config.noise.steps == 12
    torch.testing.assert_close(model.path.betas, path.betas)


def test_the_command(tmp_path, raw, statistics, capsys):
    torch.save(raw, tmp_path / "c.pt")
    arguments = ["models", "import", str(tmp_path / "c.pt"), str(tmp_path / "out")]
    assert main([*arguments, "--features-mean-std", str(statistics), "--weights", "raw"]) == 0
    assert load_folder(tmp_path / "out").config.origin.weights == "raw"
    assert main([*arguments, "--features-mean-std", str(statistics)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["models"]) == 0
    assert "xenium-pancreas" in capsys.readouterr().out


def test_the_reference_checkpoint(tmp_path, shared_data):
    folder = shared_data / "reference_phenoseq"
    np.savez(tmp_path / "norm.npz", mean=np.zeros(40), std=np.ones(40))
    raw = torch.load(folder / "tiny_checkpoint.pt", weights_only=False)
    out = convert_checkpoint(
        folder / "tiny_checkpoint.pt", tmp_path / "m", features=tmp_path / "norm.npz"
    )
    got = load_file(out / "model.safetensors")
    assert all(torch.equal(got[n], t) for n, t in raw["ema_state_dict"].items())


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_either_numpy_are_read(tmp_path, raw, statistics, core):
    """Files written by numpy 1 name numpy.core where those of numpy 2 name numpy._core."""
    torch.save(raw, tmp_path / "own.pt")
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(tmp_path / "own.pt") as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core" in data
                data = data.replace(b"numpy._core", f"numpy.{core}".encode())
            new.writestr(entry.filename, data)
    # an archive written by zipfile is not aligned as torch's, which it reads all the same
    folder = convert_checkpoint(path, tmp_path / "m", features=statistics)
    assert load_folder(folder).config.sizes == SIZES


def test_a_checkpoint_of_the_old_format_of_torch(tmp_path, raw, statistics):
    torch.save(raw, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    folder = convert_checkpoint(tmp_path / "old.pt", tmp_path / "m", features=statistics)
    assert load_folder(folder).config.sizes == SIZES


# ----------------------------------------------------------------------------------- hostile files


class Command:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_the_command_would_run_if_it_were_let(tmp_path):
    pickle.loads(pickle.dumps(Command(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


PLACES = {
    "top": lambda raw, bad: bad,
    "training": lambda raw, bad: raw["config"]["training"].update(note=[bad]) or raw,
    "beside": lambda raw, bad: raw | {"scheduler_state_dict": {"x": bad}},
    "weights": lambda raw, bad: raw["model_state_dict"].update(betas=bad) or raw,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, raw, statistics, place, new):
    marker = tmp_path / "marker"
    bad = PLACES[place](raw, Command(marker))
    torch.save(bad, tmp_path / "c.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ModelError, match=r"c\.pt: refused: it asks for \S*system") as error:
        convert_checkpoint(tmp_path / "c.pt", tmp_path / "m", features=statistics)
    assert "weights_only" not in str(error.value)
    assert "add_safe_globals" not in str(error.value)
    assert not marker.exists()
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path, statistics, protocol):
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Command(tmp_path / "marker"), protocol))
    with pytest.raises(ModelError, match=r"c\.pt"):
        convert_checkpoint(tmp_path / "c.pt", tmp_path / "m", features=statistics)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "array",
    [
        np.array([{"a": 1}, None], dtype=object),
        np.array(["text"]),
        np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(raw, convert, array):
    raw["rna_norm"]["mean"] = array
    with pytest.raises(ModelError, match="refused: it asks for numpy"):
        convert(raw)


def test_an_array_of_commands_is_refused_and_does_not_run(tmp_path, raw, convert):
    raw["rna_norm"]["mean"] = np.array([Command(tmp_path / "marker")], dtype=object)
    with pytest.raises(ModelError, match="refused"):
        convert(raw)
    assert not (tmp_path / "marker").exists()


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path, statistics):
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ModelError, match="compressed archive"):
        convert_checkpoint(tmp_path / "c.pt", tmp_path / "m", features=statistics)


# ------------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, raw, statistics, cut_file, share):
    torch.save(raw, tmp_path / "c.pt")
    cut_file(tmp_path / "c.pt", share)
    with pytest.raises(ModelError, match=r"c\.pt: not a readable checkpoint|c\.pt: refused"):
        convert_checkpoint(tmp_path / "c.pt", tmp_path / "m", features=statistics)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", bytes(4000)])
def test_no_checkpoint_at_all(tmp_path, statistics, data):
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(ModelError, match=r"c\.pt"):
        convert_checkpoint(tmp_path / "c.pt", tmp_path / "m", features=statistics)


@pytest.mark.parametrize("other", [[1, 2], {"state_dict": {}}, torch.zeros(3), {}])
def test_another_checkpoint(convert, other):
    with pytest.raises(ModelError, match="no checkpoint of the published PhenoSeq"):
        convert(other)


def spoiled(part, name, value):
    raw = make_checkpoint()
    at = raw[part] if isinstance(part, str) else raw[part[0]][part[1]]
    if value is None:
        del at[name]
    else:
        at[name] = value
    return raw


HEAD = "denoiser.out_proj.2.bias"


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("ema_state_dict", HEAD, None, f"ema_state_dict: lacks the tensor {HEAD}"),
        ("ema_state_dict", HEAD, torch.zeros(7), rf"{HEAD} is \(7,\), by its config \(6,\)"),
        ("ema_state_dict", HEAD, torch.full((6,), float("nan")), f"{HEAD} has values .* finite"),
        ("ema_state_dict", HEAD, torch.zeros(6, dtype=torch.int64), "no plain tensor of floats"),
        ("ema_state_dict", HEAD, torch.zeros(6).to_sparse(), "no plain tensor of floats"),
        ("ema_state_dict", HEAD, [0.0] * 6, "lacks the tensor"),
        ("ema_state_dict", "denoiser.extra", torch.zeros(1), "tensors of another network"),
        ("model_state_dict", "rna_std", torch.zeros(6), "rna_std has entries .* not positive"),
        ("model_state_dict", "rna_mean", None, "lacks the tensor rna_mean"),
        ("model_state_dict", "betas", torch.full((1000,), 0.1), "betas are not those of the cos"),
        (("config", "model"), "model_dim", 32, "by its config"),
        (("config", "model"), "model_dim", 10**12, "dim is 1000000000000"),
        (("config", "model"), "num_heads", 5, "5 heads do not divide"),
        (("config", "model"), "num_layers", "2", "layers: '2' is not"),
        (("config", "model"), "ff_mult", None, "has no 'model' with"),
        (("config", "diffusion"), "schedule", "sigmoid", "sigmoid"),
        (("config", "diffusion"), "num_steps", 500, "are not those"),
        ("config", "diffusion", None, "has no 'diffusion' with"),
    ],
)
def test_a_checkpoint_that_is_not_whole(convert, part, name, value, message):
    with pytest.raises(ModelError, match=message):
        convert(spoiled(part, name, value))


@pytest.mark.parametrize("ema", [None, {}])
def test_a_checkpoint_without_the_average_says_how_to_go_on(raw, convert, ema):
    raw["ema_state_dict"] = ema
    with pytest.raises(ModelError, match=r"no averaged weights.*--weights raw"):
        convert(raw)
    assert load_folder(convert(raw, weights="raw")).config.origin.weights == "raw"


def test_a_folder_that_is_taken_is_left_alone(tmp_path, raw, convert):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        convert(raw)
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"
    (tmp_path / "model" / "mine.txt").unlink()
    assert load_folder(convert(raw))


def test_missing_files(tmp_path, statistics):
    with pytest.raises(DataError, match=r"none\.pt: no such file"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "m", features=statistics)


# ------------------------------------------------------------------- mean and std of the features

MEAN, STD = np.linspace(-1, 1, 12), np.linspace(0.5, 2, 12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"mean": MEAN}, {"std": STD}),
        ({"img_std": STD}, {"img_mean": MEAN}),
        ({"mean": STD}, {"std": STD + 1}),  # by name, where both are positive
        ({"a": STD}, {"b": MEAN}),
        ({"arr_0": MEAN[None]}, {"arr_1": STD[None].astype(np.float32)}),
        ({"mean_std": STD}, {"mean_mean": MEAN}),
    ],
)
def test_mean_and_std_are_told_apart(tmp_path, one, other):
    np.savez(tmp_path / "n.npz", **one, **other)
    mean, std = read_statistics(tmp_path / "n.npz", 12)
    values = {name: value.ravel() for name, value in (one | other).items()}
    want = next(v for n, v in values.items() if n.endswith("std") or (n[-1] in "ab01" and v[0] > 0))
    np.testing.assert_allclose(std, want, rtol=1e-6)
    assert not np.allclose(mean, std)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": STD, "b": STD + 1}, "cannot tell mean and std apart"),
        ({"a": MEAN, "b": MEAN - 1}, "cannot tell mean and std apart"),
        ({"mean": STD, "std": MEAN}, "'std' has entries that are not positive"),
        ({"mean": MEAN}, "expected mean and std of the 12"),
        ({"mean": MEAN, "std": STD[:-1]}, "expected mean and std of the 12"),
        ({"mean": MEAN, "std": np.where(STD > 1, np.nan, STD)}, "finite"),
        ({"mean": MEAN, "std": np.zeros(12)}, "not positive"),
        ({"mean": np.array([{}] * 12, dtype=object), "std": STD}, "not a readable"),
    ],
)
def test_statistics_that_cannot_be(tmp_path, arrays, message):
    np.savez(tmp_path / "n.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_statistics(tmp_path / "n.npz", 12)


def test_statistics_that_are_no_npz(tmp_path):
    (tmp_path / "n.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"n\.npz: not a readable"):
        read_statistics(tmp_path / "n.npz", 12)
    data = io.BytesIO()
    np.save(data, MEAN)
    (tmp_path / "n.npz").write_bytes(data.getvalue())
    with pytest.raises(DataError, match=r"n\.npz: not a readable"):
        read_statistics(tmp_path / "n.npz", 12)
