"""Converts checkpoints of the published PhenoSeq project, which are pickles, without running them.

torch's restricted unpickler reads them: it knows tensors and plain containers, and from here
arrays of numbers. Whatever else a file asks for is refused before anything of it is called.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phenoseq.errors import DataError, ModelError
from phenoseq.models.published import PublishedPhenoSeq
from phenoseq.models.published_config import (
    Origin,
    PublishedConfig,
    PublishedNoise,
    PublishedSizes,
)
from phenoseq.models.strict import build

Weights = Literal["ema", "raw"]

#: Where the names of our sizes stand in a checkpoint's ``config["model"]``.
_SIZES = {
    "features": "img_dim",
    "embedding": "rna_dim",
    "dim": "model_dim",
    "heads": "num_heads",
    "layers": "num_layers",
    "dropout": "dropout",
    "time_dim": "time_dim",
    "ff_mult": "ff_mult",
}
_NOISE = {
    "schedule": "schedule",
    "timesteps": "num_steps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
}
_ENCODER_LAYER = re.compile(r"^denoiser\.img_encoder\.encoder\.layers\.(\d+)\.")
#: Buffers of the checkpoint that follow from its schedule.
_SCHEDULE = ("betas", "alphas_cumprod")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint says of its network."""

    sizes: PublishedSizes
    noise: PublishedNoise


def convert_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    features: str | Path,
    weights: Weights = "ema",
    repo: str = "",
    commit: str = "",
) -> Path:
    """Convert a checkpoint of the published project to a model's folder.

    Parameters
    ----------
    checkpoint
        ``best_model.pt`` or another checkpoint of that project.
    out
        Folder to write; it must not exist, or be empty. It appears whole or not at all.
    features
        ``.npz`` with mean and std of the image features, ``(F,)`` each: the checkpoint lacks them.
    weights
        ``"ema"``: the moving average over training, by which that project predicts; ``"raw"``: the
        last ones.
    repo, commit
        Where the files came from, to be kept in the configuration.

    Raises
    ------
    ModelError
        Where the checkpoint asks for more than numbers, or is not whole.
    DataError
        Where a file is missing, ``features`` does not fit, or ``out`` is taken.
    """
    checkpoint, out, features = Path(checkpoint), Path(out), Path(features)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already; choose another folder")
    for path in (checkpoint, features):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    found, tensors = read_checkpoint(checkpoint, weights)
    mean, std = read_statistics(features, found.sizes.features)
    config = PublishedConfig(
        origin=Origin(sha256_of(checkpoint), sha256_of(features), weights, repo, commit),
        sizes=found.sizes,
        noise=found.noise,
    )
    with torch.device("meta"):
        model = PublishedPhenoSeq(config)
    tensors |= {"features_mean": torch.from_numpy(mean), "features_std": torch.from_numpy(std)}
    model.load_state_dict(tensors, assign=True)
    if out.is_dir():
        out.rmdir()  # empty: the new one appears in its place
    return model.save(out)


def read_checkpoint(path: Path, weights: Weights) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    """Read sizes, schedule and weights of a checkpoint; see :func:`convert_checkpoint`.

    Returns
    -------
    What it says of its network; and its parameters with ``rna_mean`` and ``rna_std``, float32, by
    the names of :class:`~phenoseq.models.published.PublishedPhenoSeq`.
    """
    raw = _unpickle(path)
    where = str(path)
    wanted = ("model_state_dict", "config")
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), Mapping) for key in wanted):
        raise ModelError(
            f"{where}: no checkpoint of the published PhenoSeq: it has no dictionaries {wanted}"
        )
    state = raw["model_state_dict"]
    config = _config(raw["config"], state, where)
    source, label = state, "model_state_dict"
    if weights == "ema":
        source, label = raw.get("ema_state_dict"), "ema_state_dict"
        if not isinstance(source, Mapping) or not source:
            raise ModelError(
                f"{where}: has no averaged weights (ema_state_dict); take the last ones with "
                "'--weights raw' (weights='raw'). They are less good, unless the average has "
                "been copied over them, as in that project's best_model.pt"
            )
    with torch.device("meta"):
        model = PublishedPhenoSeq(
            PublishedConfig(Origin("", "", weights), config.sizes, config.noise)
        )
    names = {name for name, _ in model.named_parameters()}
    tensors = {
        name: _tensor(source, name, like, f"{where}: {label}")
        for name, like in model.named_parameters()
    }
    unknown = [n for n in source if str(n).startswith("denoiser.") and n not in names]
    if unknown:
        raise ModelError(f"{where}: {label} has tensors of another network: {unknown[:3]}")
    for name in ("rna_mean", "rna_std"):
        like = model.get_buffer(name)
        tensors[name] = _tensor(state, name, like, f"{where}: model_state_dict")
    if not bool((tensors["rna_std"] > 0).all()):
        raise ModelError(f"{where}: rna_std has entries that are not positive")
    _check_schedule(state, config.noise, where)
    return config, tensors


def read_statistics(path: Path, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read mean and std of the image features, ``(size,)`` each.

    They are told apart by their names, one with ``mean`` and one with ``std``; else by what they
    hold: deviations are all positive. Where both arrays are, they are refused.

    Raises
    ------
    DataError
        Where the file does not hold two such arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(arrays) != 2 or any(array.size != size for array in arrays.values()):
        raise DataError(
            f"{path}: holds {shapes}; expected mean and std of the {size} image features"
        )
    if not all(np.issubdtype(a.dtype, np.floating) for a in arrays.values()) or not all(
        np.isfinite(a).all() for a in arrays.values()
    ):
        raise DataError(f"{path}: mean and std must be finite floats")
    flat = {name: a.ravel().astype(np.float32) for name, a in arrays.items()}
    means, stds = ([n for n in flat if key in n.lower()] for key in ("mean", "std"))
    if len(means) != 1 or len(stds) != 1 or means == stds:
        stds = [name for name, array in flat.items() if (array > 0).all()]
        means = [name for name in flat if name not in stds]
    if len(means) != 1 or len(stds) != 1:
        raise DataError(
            f"{path}: cannot tell mean and std apart among {list(flat)}; name one array 'mean' "
            "and the other 'std'"
        )
    mean, std = means[0], stds[0]
    if not (flat[std] > 0).all():
        raise DataError(f"{path}: {std!r} has entries that are not positive: no deviations")
    return flat[mean], flat[std]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(raw: Mapping[str, Any], state: Mapping[str, Any], where: str) -> CheckpointConfig:
    """Build sizes and schedule of what a checkpoint says, checked."""
    layers = {int(m[1]) for name in state if (m := _ENCODER_LAYER.match(str(name)))}
    plain: dict[str, dict[str, Any]] = {}
    for part, names in (("model", _SIZES), ("diffusion", _NOISE)):
        given = raw.get(part)
        if not isinstance(given, Mapping) or not set(names.values()) <= set(given):
            raise ModelError(f"{where}: its config has no {part!r} with {sorted(names.values())}")
        plain[part] = {ours: given[theirs] for ours, theirs in names.items()}
    if layers != set(range(len(layers))):
        raise ModelError(f"{where}: lacks some layers of the image encoder, has {sorted(layers)}")
    sizes = {**plain["model"], "encoder_layers": len(layers)}
    own = PublishedNoise()
    steps = plain["diffusion"]["timesteps"]
    noise = {
        **plain["diffusion"],
        "sampler": own.sampler,
        "steps": min(own.steps, steps) if isinstance(steps, int) else own.steps,
    }
    found = CheckpointConfig(
        build(PublishedSizes, sizes, f"{where}: config: model"),
        build(PublishedNoise, noise, f"{where}: config: diffusion"),
    )
    PublishedConfig(Origin("", "", "raw"), found.sizes, found.noise).check(f"{where}: config")
    return found


def _tensor(source: Mapping[str, Any], name: str, like: Tensor, where: str) -> Tensor:
    """Return a tensor of a state dict as float32, of the shape of ``like``, finite."""
    tensor = source.get(name)
    if not isinstance(tensor, Tensor):
        raise ModelError(f"{where}: lacks the tensor {name}; the file is not whole, or another's")
    if tensor.shape != like.shape:
        raise ModelError(
            f"{where}: {name} is {tuple(tensor.shape)}, by its config {tuple(like.shape)}"
        )
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
        raise ModelError(f"{where}: {name} is no plain tensor of floats ({tensor.dtype})")
    plain = tensor.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(plain).all()):
        raise ModelError(f"{where}: {name} has values that are not finite: training had failed")
    return plain


def _check_schedule(state: Mapping[str, Any], noise: PublishedNoise, where: str) -> None:
    """Check that the schedule among the weights is that of the configuration."""
    path = noise.path()
    for name in _SCHEDULE:
        stored = state.get(name)
        if not isinstance(stored, Tensor):
            continue
        ours: Tensor = getattr(path, name)
        if stored.shape != ours.shape or not torch.allclose(
            stored.double(), ours, rtol=1e-3, atol=1e-5
        ):
            raise ModelError(
                f"{where}: its {name} are not those of the {noise.schedule} schedule of its config"
            )


def _unpickle(path: Path) -> Any:
    """Read a checkpoint with numbers and plain containers in it, and nothing else."""
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _check_archive(path)
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        raise ModelError(_refusal(path, str(error))) from None  # torch's own advice is to trust it
    except Exception as error:  # a broken file breaks the reader in any way that it likes
        if isinstance(error, ModelError):
            raise
        first = str(error).partition("\n")[0]
        raise ModelError(
            f"{path}: not a readable checkpoint, or not all of it ({first}); download it again"
        ) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than the file: checkpoints are not compressed."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ModelError(f"{path}: a compressed archive, which no checkpoint of torch is")


def _refusal(path: Path, message: str) -> str:
    what = re.search(r"GLOBAL (\S+)|module (\S+) is blocked|function (<.*?>)|got (<.*?>)", message)
    named = next(filter(None, what.groups())) if what else message.partition(".")[0]
    return (
        f"{path}: refused: it asks for {named}, and a checkpoint needs nothing but tensors, arrays "
        "of numbers and plain containers. Opening it as the pickle that it is could run any "
        "program; get it from a source that you trust, or have it saved without that object"
    )


def _allowed() -> list[Any]:
    """List what may be made from a checkpoint besides tensors: numpy's arrays of numbers."""
    numbers = [np.dtype(kind) for kind in ("?", *np.typecodes["AllInteger"], *"efdg")]
    return [
        *{type(dtype) for dtype in numbers},
        np.ndarray,
        (_dtype, "numpy.dtype"),
        (_encode, "_codecs.encode"),
        *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


def _dtype(kind: Any, *_: Any) -> np.dtype[Any]:
    """Stand in for ``numpy.dtype``, for numbers alone: an array of objects is refused."""
    dtype = np.dtype(kind) if isinstance(kind, str) else None
    if dtype is None or dtype.kind not in "biuf":
        raise UnpicklingError(f"GLOBAL numpy.dtype({kind!r})")
    return dtype


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand in for ``_codecs.encode``, which in an old pickle writes bytes as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnpicklingError("GLOBAL _codecs.encode other than of text to latin1")
    return text.encode("latin1")


def _array(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    """Stand in for numpy's maker of the empty array that is then filled."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise UnpicklingError(f"GLOBAL numpy array of type {kind!r}")
    return np.ndarray((0,), dtype=np.int8)


def _scalar(dtype: Any, data: Any) -> Any:
    """Stand in for numpy's maker of single numbers."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
        raise UnpicklingError(f"GLOBAL numpy scalar of type {dtype!r}")
    return np.frombuffer(data, dtype=dtype, count=1)[0]
