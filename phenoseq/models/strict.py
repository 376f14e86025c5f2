"""Strict reading of configurations: JSON into frozen dataclasses, or a refusal that says why."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from phenoseq.errors import ModelError

SCHEMA_VERSION = 1

#: The name under which a configuration says which network it is of.
NETWORK = "network"


def parse(text: str, where: str) -> dict[str, Any]:
    """Read the JSON of a configuration and check its schema version.

    A configuration that names no network is of the first one, ``"phenoseq"``, which was alone when
    it was written; one whose training has no base was written before there was fine-tuning.

    Raises
    ------
    ModelError
        Where the text is not JSON, or of another schema version; ``where`` says of what.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{where}: not JSON ({error}); download or save it again") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ModelError(
            f"{where}: schema version {version}, this phenoseq reads {SCHEMA_VERSION}; "
            "install the phenoseq that wrote it, or a newer one"
        )
    raw.setdefault(NETWORK, "phenoseq")
    if isinstance(raw.get("training"), dict):
        raw["training"] = {"base": {}, **raw["training"]}
    return dict(raw)


def build(kind: Any, raw: Any, where: str) -> Any:
    """Build a value of the annotated type from plain JSON, strictly.

    Raises
    ------
    ModelError
        Where a field is unknown, missing or of the wrong type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(raw, dict):
            raise ModelError(f"{where}: should be an object, is {raw!r}")
        hints = typing.get_type_hints(kind)
        names = {f.name for f in fields(kind)}
        if set(raw) != names:
            raise ModelError(
                f"{where}: missing {sorted(names - set(raw))}, unknown {sorted(set(raw) - names)}"
            )
        return kind(**{n: build(hints[n], raw[n], f"{where}: {n}") for n in sorted(names)})
    if origin is tuple and isinstance(raw, list):
        return tuple(build(args[0], item, where) for item in raw)
    if origin is dict and isinstance(raw, dict):
        return {str(k): build(args[1], v, f"{where}: {k}") for k, v in raw.items()}
    if origin is Literal and raw in args:
        return raw
    if origin is types.UnionType:
        parts = [option for option in args if is_dataclass(option)]
        if parts and isinstance(raw, dict):
            return build(max(parts, key=lambda part: _alike(part, raw)), raw, where)
        for option in args:
            if option is type(None) and raw is None:
                return None
            if option is not type(None) and _is(raw, option):
                return raw
    if kind is float and _is(raw, float):
        return float(raw)
    if isinstance(kind, type) and origin is None and _is(raw, kind):
        return raw
    raise ModelError(f"{where}: {raw!r} is not {kind}")


def _alike(part: Any, raw: Mapping[str, Any]) -> int:
    """Count the fields that a part and what is written have in common, less the others."""
    names = {f.name for f in fields(part)}
    return len(names & set(raw)) - len(names ^ set(raw))


def _is(raw: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(raw, int | float) and not isinstance(raw, bool)
    return isinstance(raw, kind) and (kind is bool or not isinstance(raw, bool))


def check_between(where: str, values: Mapping[str, tuple[float, float, float]]) -> None:
    """Check numbers, each given as (value, lowest, highest) by its name; NaN is never between.

    Raises
    ------
    ModelError
        Where one lies outside.
    """
    for name, (value, lowest, highest) in values.items():
        if not lowest <= value <= highest:
            raise ModelError(f"{where}: {name} is {value}, not from {lowest} to {highest}")


def check_divides(where: str, part: str, parts: int, whole: str, size: int) -> None:
    """Check that ``parts`` divide ``size``.

    Raises
    ------
    ModelError
        Where they do not.
    """
    if size % parts:
        raise ModelError(f"{where}: {parts} {part} do not divide a {whole} of {size}")
