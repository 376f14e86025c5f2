"""Says of a model what it is, and whether its files are what they should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from phenoseq.errors import ModelError
from phenoseq.models.files import CONFIG, WEIGHTS, config_text
from phenoseq.models.load import load_folder, read_any_config
from phenoseq.zoo import checkpoint
from phenoseq.zoo.about import tell_data, tell_inputs, tell_outputs
from phenoseq.zoo.cards import (
    CARD,
    METRICS,
    card_beside,
    figures,
    find_card,
    metadata,
    read_metrics,
)
from phenoseq.zoo.checkpoint import HubCheckpoint
from phenoseq.zoo.convert import sha256_of
from phenoseq.zoo.hub import TRAINING, cached_models, digest_problem, fetch, parse_reference
from phenoseq.zoo.registry import Embedded, HubModel, ModelEntry, find, folder_of, list_models


@dataclass(frozen=True)
class Description:
    """What a model is: facts by name, its held-out figures by name, and its card, if it has one."""

    facts: dict[str, str]
    figures: dict[str, float] = field(default_factory=dict)
    card: str | None = None


def describe(model: str | Path) -> Description:
    """Say what a model is; of one on the hub, all but the weights is fetched.

    Parameters
    ----------
    model
        As for :func:`phenoseq.load_model`.

    Raises
    ------
    ModelError
        Where there is no such model, or it is broken.
    """
    if Path(model).is_dir():
        return _described(str(model), Path(model))
    if reference := parse_reference(str(model)):
        folder = fetch(reference, weights=False)
        return _described(f"{reference.repo}@{folder.name}", folder)
    entry = find(str(model))
    return Description(_facts_of(entry), figures(entry.metrics), find_card(entry.name))


def verify(model: str | Path | None = None) -> Iterator[tuple[str, str, str]]:
    """Check the files of a model, or of all that are on this machine; nothing is fetched.

    Yields
    ------
    Name of the model, name of the file, and what is wrong with it, empty where nothing is.

    Raises
    ------
    ModelError
        Where there is no such model here.
    """
    if model is None:
        for entry in list_models():
            if entry.is_here:
                yield from _verify_entry(entry)
        for cached, folder in cached_models():
            yield from _verify_cached(str(cached), folder)
    elif Path(model).is_dir():
        load_folder(model)
        yield str(model), f"{WEIGHTS}, sha256 {sha256_of(Path(model) / WEIGHTS)}", ""
    elif reference := parse_reference(str(model)):
        here = [
            (str(found), folder)
            for found, folder in cached_models()
            if found.repo == reference.repo
            and (reference.revision is None or found.revision == reference.revision)
        ]
        if not here:
            raise ModelError(
                f"{reference}: no model of phenoseq in the cache by that name and commit; fetch it "
                f"with 'phenoseq models download {reference}'"
            )
        for name, folder in here:
            yield from _verify_cached(name, folder)
    else:
        entry = find(str(model))
        if not entry.is_here:
            raise ModelError(
                f"{entry.name}: is not on this machine; 'phenoseq models download {entry.name}' "
                "fetches it"
            )
        yield from _verify_entry(entry)


def _verify_entry(entry: ModelEntry) -> Iterator[tuple[str, str, str]]:
    problem = ""
    try:
        if isinstance(entry.source, HubCheckpoint):
            checkpoint.verify(entry.name, entry.source)
        else:
            folder_of(entry.name)
    except ModelError as error:
        problem = str(error)
    yield entry.name, WEIGHTS, problem


def _verify_cached(name: str, folder: Path) -> Iterator[tuple[str, str, str]]:
    for file in (CONFIG, WEIGHTS, CARD, METRICS, TRAINING):
        if (folder / file).is_file():
            yield name, file, digest_problem(folder / file) or ""


def _described(name: str, folder: Path) -> Description:
    config = read_any_config(*config_text(folder))
    facts = {"model": name, "network": config.network, "pairing": config.pairing}
    facts |= {
        "reads": tell_inputs(config),
        "predicts": tell_outputs(config),
        "training data": tell_data(config),
    }
    if (folder / WEIGHTS).is_file():
        facts |= {
            "sha256": sha256_of(folder / WEIGHTS),
            "size": told_size((folder / WEIGHTS).stat().st_size),
        }
    card = card_beside(folder)
    try:
        facts["licence"] = str(metadata(card or "", name).get("license", "unknown"))
    except ModelError:
        facts["licence"] = "unknown: the card's metadata cannot be read"
    return Description(facts, figures(read_metrics(folder)), card)


def _facts_of(entry: ModelEntry) -> dict[str, str]:
    source = entry.source
    if isinstance(source, Embedded):
        where = "in the package"
    elif isinstance(source, HubModel):
        where = f"{source.repo}@{source.commit} on the Hugging Face hub"
    else:
        where = (
            f"{source.repo} on the Hugging Face hub; commit and sha256 are recorded at the first "
            "download, and checked ever after"
        )
    return {
        "model": entry.name,
        "what": entry.summary,
        "source": where,
        "on this machine": "yes" if entry.is_here else "no",
        "size": told_size(entry.size),
        "sha256": entry.sha256 or "not known before the first download",
        "pairing": entry.pairing,
        "stains": ", ".join(entry.channels),
        "pixel size": f"{entry.pixel_size:g} µm" if entry.pixel_size else "as it comes",
        "predicts": f"{entry.n_vars} {entry.unit}",
        "training data": f"{entry.data} ({entry.data_licence})",
        "licence": entry.licence,
    }


def told_size(n: int) -> str:
    """Return a number of bytes, for a person to read."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
