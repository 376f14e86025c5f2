"""Strict reading of configurations: JSON into frozen dataclasses, or a refusal that says why."""

from __future__ import annotations

import json
import math
import reprlib
import types
import typing
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from phenoseq._version import __version__
from phenoseq.errors import ModelError

SCHEMA_VERSION = 5

#: The name under which a configuration says which network it is of.
NETWORK = "network"

#: No string of a configuration is longer.
_LONGEST = 4096


def parse(text: str, where: str) -> dict[str, Any]:
    """Read the JSON of a configuration, brought to this schema version.

    Raises
    ------
    ModelError
        Where the text is not JSON, holds a number or string that no configuration has, or is of a
        newer schema version; ``where`` says of what.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not JSON ({error}); download or save it again") from error
    version: Any = raw.get("schema_version") if isinstance(raw, dict) else None
    if not _is(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise ModelError(
            f"{where}: schema version {_short(version)}, this phenoseq ({__version__}) reads 1 to "
            f"{SCHEMA_VERSION}; where that is newer: pip install --upgrade phenoseq"
        )
    _check_plain(raw, where)
    return migrate(raw, version)


def migrate(raw: dict[str, Any], version: int) -> dict[str, Any]:
    """Bring the plain values of a configuration from a schema version to the present one.

    1 to 2
        Says which network it is of; before, there was one, and those written after the second
        came said so already. The training has a base, which is empty: nothing was fine-tuned.
    2 to 3
        Models of cells and of samples have a recalibration, which is none; so is the appearance
        of crops. No encoder started from pretrained weights.
    3 to 4
        The diffusion of models of cells and of samples is not centred.
    4 to 5
        The reliability of genes has no interval.
    """
    raw = dict(raw)
    if version < 2:
        raw.setdefault(NETWORK, "phenoseq")
        if isinstance(raw.get("training"), dict):
            raw["training"] = {"base": {}, **raw["training"]}
    if version < 3 and raw.get(NETWORK) in ("phenoseq", "sample"):
        raw.setdefault("recalibration", None)
        for name in ("image", "cells"):
            if isinstance(raw.get(name), dict) and "p999" in raw[name]:
                raw[name] = {"appearance": None, **raw[name]}
    for name in ("training", "origin"):
        if version < 3 and isinstance(record := raw.get(name), dict) and "split" in record:
            raw[name] = {"encoder_weights": {}, **record}
        if version < 5 and isinstance(record := raw.get(name), dict) and "split" in record:
            raw[name] = {"reliability_interval": [], **record}
    if version < 4 and isinstance(raw.get("diffusion"), dict) and "steps" in raw["diffusion"]:
        raw["diffusion"] = {"centred": False, **raw["diffusion"]}
    return raw | {"schema_version": SCHEMA_VERSION}


def _check_plain(raw: Any, where: str) -> None:
    """Refuse what would break, or deceive, whoever computes with it or prints it."""
    stack: list[tuple[str, Any]] = [(where, raw)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{place}: a name", name) for name in value]
            stack += [(f"{place}: {_short(name)}", part) for name, part in value.items()]
        elif isinstance(value, list):
            stack += [(place, part) for part in value]
        elif isinstance(value, str):
            if len(value) > _LONGEST or any(unicodedata.category(c)[0] == "C" for c in value):
                raise ModelError(
                    f"{place}: {_short(value)} is longer than {_LONGEST} characters, or has some "
                    "that are not to be printed"
                )
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ModelError(f"{place}: {value} is no number to compute with")
        elif isinstance(value, int) and value.bit_length() > 63:
            raise ModelError(f"{place}: a number of {value.bit_length()} bits")


def _short(value: Any) -> str:
    return reprlib.repr(value)


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
            raise ModelError(f"{where}: should be an object, is {_short(raw)}")
        hints = typing.get_type_hints(kind)
        names = {f.name for f in fields(kind)}
        if set(raw) != names:
            raise ModelError(
                f"{where}: missing {sorted(names - set(raw))}, "
                f"unknown {_short(sorted(set(raw) - names))}"
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
    raise ModelError(f"{where}: {_short(raw)} is not {kind}")


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
