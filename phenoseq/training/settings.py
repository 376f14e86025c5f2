"""The settings of a run, kept in its folder: a run goes on under the same ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from phenoseq.errors import ModelError

CONFIG = "config.yaml"
#: What may differ when a run goes on: it changes what is shown or where, not the weights. Of
#: devices the number counts, which the checkpoint knows.
_FREE = (
    "checkpoint",
    "export",
    "out",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.num_nodes",
    "trainer.profiler",
)


def keep_settings(root: Path, text: str) -> None:
    """Write the settings, as YAML, whole or not at all."""
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{CONFIG}.partial"
    partial.write_text(text)
    os.replace(partial, root / CONFIG)


def same_settings(root: Path, text: str) -> None:
    """Refuse to go on under settings that would change what comes out.

    Raises
    ------
    ModelError
        Naming each setting that differs, with both values.
    """
    stored = root / CONFIG
    if not stored.exists():
        return
    then, now = _flat(yaml.safe_load(stored.read_text())), _flat(yaml.safe_load(text))
    differing = [
        f"{name} is {now.get(name)!r}, and was {then.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not _is_free(name)
    ]
    if differing:
        raise ModelError(
            f"{root}: holds a run with other settings: {'; '.join(differing)}. Go on with those, "
            "give this run a folder of its own (for 'phenoseq train' trainer.default_root_dir), or "
            "remove that one"
        )


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in _FREE)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
