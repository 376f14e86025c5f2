"""Single-cell gene expression from microscope images.

Names are imported when first used, so that ``import phenoseq`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from phenoseq._version import __version__
from phenoseq.errors import DataError, ModelError, PhenoseqError

if TYPE_CHECKING:
    from phenoseq.api import calibrate, predict
    from phenoseq.data.store import Store
    from phenoseq.inference.decode import decode
    from phenoseq.inference.extract import embed
    from phenoseq.models.phenoseq import PhenoSeq
    from phenoseq.scoring import evaluate
    from phenoseq.tuning import finetune
    from phenoseq.zoo.push import push_to_hub
    from phenoseq.zoo.registry import list_models, load_model

_LAZY = {
    "PhenoSeq": "phenoseq.models.phenoseq",
    "Store": "phenoseq.data.store",
    "calibrate": "phenoseq.api",
    "decode": "phenoseq.inference.decode",
    "embed": "phenoseq.inference.extract",
    "evaluate": "phenoseq.scoring",
    "finetune": "phenoseq.tuning",
    "list_models": "phenoseq.zoo.registry",
    "load_model": "phenoseq.zoo.registry",
    "predict": "phenoseq.api",
    "push_to_hub": "phenoseq.zoo.push",
}

__all__ = [
    "DataError",
    "ModelError",
    "PhenoSeq",
    "PhenoseqError",
    "Store",
    "__version__",
    "calibrate",
    "decode",
    "embed",
    "evaluate",
    "finetune",
    "list_models",
    "load_model",
    "predict",
    "push_to_hub",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'phenoseq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
