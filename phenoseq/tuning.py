"""Fine-tuning and recalibration: a new model of an old one and data; the old one stays as it is."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from phenoseq.data.selection import SelectedDataModule
from phenoseq.data.splits import SplitConfig
from phenoseq.errors import DataError, ModelError, PhenoseqWarning
from phenoseq.inference.predictor import pick_device
from phenoseq.models.load import Model
from phenoseq.models.phenoseq import PhenoSeq
from phenoseq.models.recalibration import LEAST
from phenoseq.models.sample import SamplePhenoSeq
from phenoseq.training.build import record_of
from phenoseq.training.finalise import fit_strangeness, recalibration_of
from phenoseq.training.finetune import (
    LR,
    FinetuneModule,
    Freeze,
    adapted,
    fit,
    warnings_of,
)
from phenoseq.training.finetunedata import open_data, with_tokens
from phenoseq.zoo.registry import load_model

#: In the folder of the run: what of the base model was kept, every gene and stain by name.
_KEPT = "kept.json"


def finetune(
    model: str | Path | Model,
    store: str | Path,
    *,
    freeze: Freeze = "encoder",
    genes: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    split: SplitConfig | None = None,
    epochs: int = 30,
    lr: float | None = None,
    cache: bool = True,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> PhenoSeq | SamplePhenoSeq:
    """Train a model on, on your own cells or samples; the model given stays as it is.

    The new model predicts the genes of the store from the stains of the store. Shared genes (by
    Ensembl id, then symbol) and shared stains (by name) keep what was learned;
    :func:`phenoseq.models.adapt.adapt` says how. Training stops where the loss of the validation
    cells no longer falls, and the weights with the least are kept.

    A model of samples (its ``pairing`` is ``"sample"``) is trained on a store that pairs by sample,
    on bags of as many image cells as it was. It reads crops or features, and predicts genes or an
    embedding, as before; features and embeddings must be made alike.

    Parameters
    ----------
    model
        A name of the zoo, a folder, or a loaded model.
    store
        Made by ``phenoseq prepare``, of images and counts of the same cells, or (for a model of
        samples) of the same samples. Crops of another pixel size than the model's are taken as they
        are, with a warning.
    freeze
        What is not trained: ``"encoder"`` (fast: every crop is encoded once), ``"none"`` (stages of
        the encoder learn slower towards the image), or ``"all-but-head"`` (only the projections
        into and out of the latent are trained: for very few cells).
    genes, channels
        Ids or symbols of the genes to predict, and stains to read; all of the store by default.
        Cells without counts of these genes are left out.
    split
        How cells, or samples, are divided into training, validation, calibration and test; by
        default as the model was trained with, so that on its own data its test cells stay unseen.
    epochs
        Passes over the training cells, at most.
    lr
        Highest learning rate; by default 0.001 where the encoder is frozen, else 0.0003.
    cache
        Keep the tokens of a frozen encoder on disk while training. Without it crops are
        encoded in every epoch, with all augmentations. Features are never cached.
    seed
        Of all that is fitted and drawn.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    out
        Folder of the new model. A folder beside it, ``OUT.run``, holds the run: metrics,
        checkpoints, and ``kept.json``, which lists the genes and stains kept. A run that was killed
        goes on from there under the same call.
    report
        Called with what of the model is kept, before the training; ``print``, say.

    Returns
    -------
    The new model, in evaluation mode, on the CPU. ``config.training.base`` says what it came from.

    Raises
    ------
    DataError
        Where the store cannot be used, pairs otherwise than the model, or holds other features or
        embeddings; a part of the split has no cells; or ``out`` exists.
    ModelError
        Where the model is of the published network, its backbone cannot read crops of that size, or
        ``OUT.run`` holds a run with other settings.
    """
    if freeze not in get_args(Freeze):
        raise ModelError(f"freeze is {freeze!r}; choose from {list(get_args(Freeze))}")
    name = Path(model).name if isinstance(model, str | Path) else ""
    loaded = load_model(model) if isinstance(model, str | Path) else model
    if not isinstance(loaded, PhenoSeq | SamplePhenoSeq):
        raise ModelError(
            f"{name or 'this model'}: is of the published network, which cannot be fine-tuned; "
            "train it with 'phenoseq train', or start from another model"
        )
    base = deepcopy(loaded).cpu()  # wherever it is, there it stays
    target, place = _free(out), pick_device(device)
    data = open_data(store, base, split, channels=channels, genes=genes, seed=seed)
    new, kept = adapted(base, data, name, freeze, seed)
    if report is not None:
        report(str(kept))
    for text in warnings_of(kept, data, freeze):
        warnings.warn(text, PhenoseqWarning, stacklevel=2)
    module = FinetuneModule(
        new,
        freeze=freeze,
        new_stains=kept.cells is not None and bool(kept.cells.stains.new),
        lr=LR[freeze] if lr is None else lr,
        seed=seed,
    )
    settings = {
        "base": new.config.training.base,
        "store": record_of(data, seed).identity,
        "split": data.parts.digest,
        "genes": list(data.opened.manifest.symbols),
        "channels": list(data.opened.manifest.channels),
        "epochs": epochs,
        "lr": module.lr,
        "cache": cache,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) if target is None else target.with_name(f"{target.name}.run")
        root.mkdir(parents=True, exist_ok=True)
        (root / _KEPT).write_text(json.dumps(asdict(kept), indent=1) + "\n")
        tokens = root / "tokens"
        new.to(place)
        used = with_tokens(data, new, tokens) if cache and freeze != "none" else data
        fit(module, used, root, settings, epochs=epochs, device=device)
        done = module.finish(data, place)
        if target is not None:
            done.save(target)
            shutil.rmtree(tokens, ignore_errors=True)
    return done.eval()


def calibrate(
    model: str | Path | Model,
    store: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
) -> PhenoSeq:
    """Recalibrate a model of single cells, as training does at its end; the one given stays.

    Up to 4096 cells of the calibration part of the store, divided as the model was trained with,
    tell how often the truth lies below each level of what is predicted; see
    :mod:`phenoseq.models.recalibration`. :func:`phenoseq.predict` applies it. On the store of its
    training a model also learns anew what its training cells look like, for ``ood_score``.

    Parameters
    ----------
    model
        A name of the zoo, a folder, or a loaded model.
    store
        With all stains and genes of the model: that of its training, or of other images and counts
        for which it is to be right.
    seed
        Of cells and draws.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    out
        Folder of the new model.

    Returns
    -------
    The new model, in evaluation mode, on the CPU, with ``config.recalibration``.

    Raises
    ------
    DataError
        Where the store lacks stains or genes, its split differs from the one trained with, its
        calibration part has fewer than 200 cells, or ``out`` exists.
    ModelError
        Where the model is not one of single cells.
    """
    name = Path(model).name if isinstance(model, str | Path) else ""
    base = load_model(model) if isinstance(model, str | Path) else model
    if not isinstance(base, PhenoSeq):
        raise ModelError(
            f"{name or 'this model'}: only models of single cells are calibrated on a store; a "
            "model of samples is when it is trained"
        )
    target = _free(out)
    new = deepcopy(base).to(pick_device(device)).eval()
    config = new.config
    data = SelectedDataModule(
        store,
        SplitConfig(**config.training.split),  # type: ignore[arg-type]
        seed=seed,
        channels=config.image.channels,
        genes=config.expression.genes,
    )
    data.setup()
    same = data.opened.manifest.identity == config.training.identity
    if same and data.parts.digest != config.training.split_digest:
        raise DataError(
            f"{store}: divides its cells otherwise than the model was trained with, so that it "
            "would be calibrated on training cells; prepare the store with the same options"
        )
    found = recalibration_of(new, new.expression, data, seed)
    if found is None:
        raise DataError(
            f"{store}: the calibration part has {data.n_cells('cal')} cells, of which at least "
            f"{LEAST} need 20 counts and more; give it more groups"
        )
    if same:  # for models of versions that knew less of their training cells
        fit_strangeness(new, data)
    new.config = replace(new.config, recalibration=found)
    new.cpu()
    if target is not None:
        new.save(target)
    return new


def _free(out: str | Path | None) -> Path | None:
    """Check that a model may be written there; raises :class:`~phenoseq.errors.DataError`."""
    if out is None:
        return None
    path = Path(out)
    if path.exists():
        raise DataError(f"{path}: exists already; remove it, or choose another folder")
    return path
