"""The folder of a model: ``config.json`` and ``model.safetensors``, and no pickle."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phenoseq.errors import ModelError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = (".pt", ".ckpt", ".pth", ".pkl")


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
        Where one of the two files is missing.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            pickles = [p.name for p in folder.glob("*") if p.suffix in PICKLES]
            hint = (
                f"; {pickles} are pickles, which phenoseq never opens: save the model with "
                "'model.save(folder)', or if it is a checkpoint of the published PhenoSeq "
                "project, convert it with 'phenoseq models import'"
                if pickles
                else ""
            )
            raise ModelError(f"{folder}: no {name} there, so it is no phenoseq model{hint}")
    path = folder / CONFIG
    return path.read_text(encoding="utf-8", errors="replace"), str(path)


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
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{path}: does not hold the weights of its config ({error}); "
            "download or save the model again"
        ) from error


def digest_of_model(model: nn.Module) -> str:
    """Return the sha256 of a model's configuration and weights, in hex."""
    digest = hashlib.sha256(model.config.to_json().encode())  # type: ignore[union-attr,operator]
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
