"""Model cards: their metadata for the hub, their measured tables, and how to show them safely.

A page holds ``<!-- KIND: NAME -->`` and ``<!-- end -->``; what stands between is made: of kind
``table`` from the ``metrics.json`` that ``phenoseq evaluate`` wrote beside the model's weights, of
kind ``genes`` and ``facts`` from its ``config.json`` and files. The metadata at the top of a card
gets the same figures. ``make cards`` does it, and a test compares.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from phenoseq._version import __version__
from phenoseq.errors import ModelError
from phenoseq.evaluation.report import Scores, markdown
from phenoseq.models.files import CONFIG, WEIGHTS, config_text
from phenoseq.models.load import Config, read_any_config
from phenoseq.models.published_config import PublishedConfig
from phenoseq.zoo.about import (
    genes_of,
    image_of,
    record_of,
    tell_data,
    tell_inputs,
    tell_outputs,
    tell_start,
)

METRICS, CARD = "metrics.json", "README.md"

_MADE = re.compile(r"<!-- (table|genes|facts): ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
_FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
#: The task by which the hub lists a model that reads images, and one that reads features.
IMAGES, FEATURES = "image-feature-extraction", "feature-extraction"
#: Genes named at either end of the ranking.
_ENDS = 10
#: Characters of a card that are shown.
_LONGEST = 1 << 20


def weights_folder(name: str) -> Path:
    """Return the folder in the package of a model's weights or scores."""
    return Path(str(files("phenoseq.zoo"))) / "weights" / name


def find_card(name: str) -> str:
    """Return the card of a model of the zoo.

    Raises
    ------
    ModelError
        Where it is not there.
    """
    package = Path(str(files("phenoseq.zoo")))
    for folder in (package / "model_cards", package.parents[1] / "model_cards"):
        if (folder / f"{name}.md").is_file():
            return (folder / f"{name}.md").read_text(encoding="utf-8")
    raise ModelError(f"{name}: its card is missing; install phenoseq again")


def card_beside(folder: Path) -> str | None:
    """Return the card of the model in a folder, be it a folder of the zoo; None without one."""
    if (folder / CARD).is_file():
        return (folder / CARD).read_text(encoding="utf-8", errors="replace")
    return find_card(folder.name) if folder == weights_folder(folder.name) else None


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return what ``phenoseq evaluate`` wrote beside a model's weights; empty where it did not.

    Raises
    ------
    ModelError
        Where the file is broken.
    """
    path = folder / METRICS
    if not path.is_file():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not metrics["scores"][0]["name"]:
            raise ValueError("scores without a name")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path}: not as 'phenoseq evaluate' writes it ({error}); write it again"
        ) from error
    return dict(metrics)


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the model itself, which stands first among the scores, by name."""
    row = metrics["scores"][0] if metrics else {}
    return {
        name: float(f"{value:.6g}") for name, value in row.items() if isinstance(value, int | float)
    }


def split_front(text: str) -> tuple[str, str]:
    """Split a card into its metadata (YAML, or nothing) and its text."""
    match = _FRONT.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def metadata(text: str, name: str) -> dict[str, Any]:
    """Return the metadata of a card; :class:`ModelError` where they are broken."""
    try:
        own = yaml.safe_load(split_front(text)[0]) or {}
    except yaml.YAMLError as error:
        raise ModelError(f"card of {name}: its metadata are not YAML ({error})") from error
    if not isinstance(own, dict):
        raise ModelError(f"card of {name}: its metadata are no list of names and values")
    return own


def complete(
    text: str,
    name: str,
    metrics: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    config: Config | None = None,
) -> str:
    """Return a card with whole metadata, as the hub wants it.

    Parameters
    ----------
    text
        A card; what its metadata says stays, but for the figures.
    name
        Of the model.
    metrics
        Of ``metrics.json``; where they are empty, no figures are given.
    facts
        Metadata that replace the card's own, where they are not None.
    config
        Of the model, if it is known; it says which task it does.

    Raises
    ------
    ModelError
        Where the card's metadata are broken.
    """
    own, body = metadata(text, name), split_front(text)[1]
    data: dict[str, Any] = {
        "library_name": "phenoseq",
        "pipeline_tag": FEATURES if config and image_of(config) is None else IMAGES,
        "license": "unknown",
        "datasets": [],
        "tags": [],
    }
    data |= own | {key: value for key, value in (facts or {}).items() if value is not None}
    data["library_name"] = "phenoseq"
    data["tags"] = list(dict.fromkeys(["phenoseq", *data["tags"]]))
    data.pop("model-index", None)
    if values := figures(metrics):
        dataset = next(iter(data["datasets"]), "") or str(metrics.get("data", "unknown"))
        data["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": data["pipeline_tag"]},
                        "dataset": {
                            "type": dataset,
                            "name": str(metrics.get("data", dataset)),
                            "split": str(metrics.get("part", "test")),
                        },
                        "metrics": [{"type": key, "value": v} for key, v in values.items()],
                    }
                ],
            }
        ]
    if not data["datasets"]:
        del data["datasets"]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{body}"


def make_card(name: str, repo: str, config: Config, metrics: Mapping[str, Any]) -> str:
    """Return a card for a model that has none, from what it knows of itself."""
    pairing = (
        "Image and RNA of its training were of the same cells."
        if config.pairing == "cell"
        else "Image and RNA of its training were of different cells of one sample: what it "
        "predicts is as of some cell of the sample, and of none that was imaged."
    )
    scores = _table(metrics) if metrics else "Not measured on held-out groups."
    return f"""
# {name}

Predicts {tell_outputs(config)} from {tell_inputs(config)}. {pairing}

## Use

```python
import phenoseq

model = phenoseq.load_model("{repo}")
```

For research. Not for diagnosis or any decision about a patient. Not for tissue, stains or
instruments other than those of its training, without measuring there first.

## Data

Trained on: {tell_data(config)}.

## Scores

{scores}

{_genes(config)}
{_facts(config)}
"""


def fill(page: str) -> str:
    """Return the page with what is made of it made, and a card's metadata whole.

    Raises
    ------
    ModelError
        Where it names a model that the zoo does not have, or has no measurements of.
    """

    def made(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        folder = weights_folder(name)
        if not folder.is_dir():
            raise ModelError(f"{name}: has no files in the package to make its {kind} from")
        if kind == "table":
            body = _table(read_metrics(folder))
        else:
            config = read_any_config(*config_text(folder))
            body = _genes(config) if kind == "genes" else _facts(config, folder)
        return f"<!-- {kind}: {name} -->\n{body.strip()}\n<!-- end -->"

    page = _MADE.sub(made, page)
    title = re.search(r"^# (.+)$", page, re.MULTILINE)
    if not page.startswith("---\n") or not title:
        return page
    folder = weights_folder(title[1])
    known = (folder / CONFIG).is_file()
    config = read_any_config(*config_text(folder)) if known else None
    return complete(page, title[1], read_metrics(folder), config=config)


def printable(text: str) -> str:
    """Return a card's text with nothing in it that a terminal would obey, cut where it is endless.

    Control characters, among them those that start escape sequences, and marks that turn the
    direction of writing become a sign of replacement.
    """
    kept = (
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}"
        for c in text[:_LONGEST].replace("\r\n", "\n")
    )
    return "".join(kept)


def _table(metrics: Mapping[str, Any]) -> str:
    try:
        scores = [Scores(**row) for row in metrics["scores"]]
        return (
            f"{markdown(scores)}\n\n{metrics['n_cells']:,} cells of {metrics['n_groups']} groups, "
            f"{metrics['n_genes']} genes, {metrics['n_samples']} draws of "
            f"{metrics['steps']} steps, seed {metrics['seed']}"
        )
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{METRICS}: of another version of phenoseq ({error}); run 'phenoseq evaluate' again"
        ) from error


def _genes(config: Config) -> str:
    """Name the genes that are predicted best and worst."""
    genes, record = genes_of(config), record_of(config)
    if genes is None or record is None or not record.reliability:
        return ""
    ranked = sorted(
        zip(record.reliability, genes.symbols, strict=True), key=lambda pair: (-pair[0], pair[1])
    )
    values = [value for value, _ in ranked]

    def named(pairs: Sequence[tuple[float, str]]) -> str:
        return ", ".join(f"{symbol} {round(value, 2) + 0.0:.2f}" for value, symbol in pairs)

    share = sum(value > 0.3 for value in values) / len(values)
    return (
        "Correlation of predicted and measured expression over validation cells, gene by gene "
        f'(`var["reliability"]`): median {statistics.median(values):.2f}; above 0.3 for '
        f"{share:.0%} of the genes.\n\n"
        f"- best: {named(ranked[:_ENDS])}\n- worst: {named(ranked[-_ENDS:])}\n"
    )


def _facts(config: Config, folder: Path | None = None) -> str:
    """List what the files say of the model."""
    rows: dict[str, str] = {"pairing": config.pairing}
    if (record := record_of(config)) is not None:
        rows |= {
            "trained with": f"phenoseq {record.version}",
            "data": f"sha256 `{record.identity}`",
            "split": f"sha256 `{record.split_digest}`",
        }
    if not isinstance(config, PublishedConfig):
        if config.encoder is not None:
            stains = f"{config.encoder.channel_mode} stains"
            rows["encoder"] = f"`{config.encoder.backbone}`, {stains}"
        if start := tell_start(config):
            rows["encoder started from"] = start
        rows["denoiser"] = f"{config.denoiser.depth} blocks, {config.denoiser.dim} wide"
        rows["sampling"] = f"{config.diffusion.sampler}, {config.diffusion.steps} steps"
    if folder is not None:
        rows["weights"] = f"{(folder / WEIGHTS).stat().st_size:,} bytes"
    else:
        rows["written by"] = f"phenoseq {__version__}"
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def main(paths: Sequence[str]) -> None:
    """Fill some pages in place: ``python -m phenoseq.zoo.cards PAGE...``."""
    for path in map(Path, paths):
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
