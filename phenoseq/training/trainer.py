"""What trainers have in common that no command line configures: where they run, and how quietly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def placed(device: str) -> dict[str, Any]:
    """Return a trainer's arguments for a device: ``"auto"``, ``"cpu"``, ``"cuda:1"``, ``"mps"``."""
    kind, _, number = device.partition(":")
    return {
        "accelerator": {"cuda": "gpu"}.get(kind, kind),
        "devices": [int(number)] if number else 1,
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what Lightning says about devices and loaders to itself."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        log.setLevel(level)
