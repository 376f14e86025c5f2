"""The folder of a model: ``config.json`` and ``model.safetensors``, and no pickle."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phenoseq.errors import ModelError

M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = (".pt", ".ckpt", ".pth", ".pkl", ".pickle", ".bin", ".joblib")
#: Bytes of the largest configuration that is read.
_LARGEST_CONFIG = 1 << 25


def save_folder(folder: str | Path, config: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write ``config.json`` and ``model.safetensors``, each whole or not at all.

    A folder that is not there yet appears with both, or not at all.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = not folder.exists()
    within = folder.parent if new else folder
    with tempfile.TemporaryDirectory(dir=within, prefix=".saving-") as some:
        partial = Path(some) / "model"
        partial.mkdir()
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(config)
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # which are for the owner alone
        if new:
            partial.rename(folder)
        else:
            for name in (WEIGHTS, CONFIG):
                os.replace(partial / name, folder / name)
    return folder


def read_config(folder: str | Path) -> tuple[str, str]:
    """Return the text of the configuration in a model's folder, and where it stands.

    Raises
    ------
    ModelError
        Where one of the two files is missing, or the configuration is too large to be one.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            hint = about_pickles(p.name for p in folder.glob("*"))
            raise ModelError(f"{folder}: no {name} there, so it is no phenoseq model{hint}")
    return config_text(folder)


def config_text(folder: Path) -> tuple[str, str]:
    """Return the text of the configuration in a folder, be there weights or not; and where it is.

    Raises
    ------
    ModelError
        Where it is too large to be one.
    """
    path = folder / CONFIG
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ModelError(f"{path}: {path.stat().st_size:,} bytes are too many for a configuration")
    return path.read_text(encoding="utf-8", errors="replace"), str(path)


def about_pickles(names: Iterable[str]) -> str:
    """Say what to do with the pickles among some files; nothing where there are none."""
    pickles = sorted(name for name in names if Path(name).suffix.lower() in PICKLES)
    if not pickles:
        return ""
    return (
        f"; {pickles} are pickles, which phenoseq never opens, since they can run any program: ask "
        "their author to save the model with 'model.save(folder)'; a checkpoint of the published "
        "PhenoSeq project is converted by 'phenoseq models import'"
    )


def check_weights(model: nn.Module, folder: str | Path) -> None:
    """Check that the weights in a model's folder are those of its configuration, unread.

    Parameters
    ----------
    model
        Built from the configuration on the device ``"meta"``, where it takes no memory: whatever
        the configuration asks for, nothing is allocated that the file does not hold.
    folder
        With ``model.safetensors``.

    Raises
    ------
    ModelError
        Where the file is broken, or its names, shapes or kinds of numbers are others.
    """
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except Exception as error:  # a broken file breaks the reader in any way that it likes
        raise _misfit(path, error) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise _misfit(path, f"lacks {len(missing)} tensors: {missing[:3]}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise _misfit(path, f"has {len(unknown)} tensors of another network: {unknown[:3]}")
    for name, tensor in model.state_dict().items():
        shape, kind = found[name]
        if shape != wanted[name]:
            raise _misfit(path, f"{name} is {shape}, by the config {wanted[name]}")
        if tensor.is_floating_point() and kind not in ("F32", "F16", "BF16"):
            raise _misfit(path, f"{name} holds {kind}, not floats of 16 or 32 bits")


def rebuild(make: Callable[[], M], folder: str | Path) -> M:
    """Make a model, load its folder's weights into it, and return it in evaluation mode.

    The weights are checked first, on a model that takes no memory, so that nothing is allocated
    that the file does not hold; raises :class:`ModelError` as :func:`check_weights` does.
    """
    with torch.device("meta"):
        check_weights(make(), folder)
    model = make()
    load_weights(model, folder)
    return model.eval()


def load_weights(model: nn.Module, folder: str | Path, *, adopt: bool = False) -> None:
    """Load the weights in a model's folder into it.

    Parameters
    ----------
    model
        Built from the folder's configuration.
    folder
        With ``model.safetensors``.
    adopt
        Take over the tensors of the file, of which float32 ones are expected, in place of copying
        them: for a model built on the device ``"meta"``, whose own weights take no memory.

    Raises
    ------
    ModelError
        Where the file is broken, or holds other tensors than the model asks for.
    """
    path = Path(folder) / WEIGHTS
    try:
        tensors = load_file(path)
        others = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]
        if adopt and others:
            raise RuntimeError(f"{others[:3]} are not of type float32")
        model.load_state_dict(tensors, assign=adopt)
    except Exception as error:  # as above
        raise _misfit(path, error) from error


def _misfit(path: Path, why: object) -> ModelError:
    what = str(why).partition("\n")[0][:500]
    return ModelError(
        f"{path}: does not hold the weights of its config ({what}); download or save the model "
        "again"
    )


def digest_of_model(model: nn.Module) -> str:
    """Return the sha256 of a model's configuration and weights, in hex."""
    digest = hashlib.sha256(model.config.to_json().encode())  # type: ignore[union-attr,operator]
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
