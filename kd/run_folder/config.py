"""Configurations as JSON: written into run folders, and compared when a run is resumed."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_datasets.system.files import parse_json


def as_json(config: Any) -> Any:
    """A dataclass (or anything inside one) as plain JSON values; paths become strings."""
    if dataclasses.is_dataclass(config):
        return {item.name: as_json(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): as_json(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [as_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = (), prefix: str = ""
) -> list[str]:
    """``"name: old -> new"`` for each value that differs between two nested configurations."""
    found = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if name in ignore or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, ignore, f"{name}.")
        else:
            found.append(f"{name}: {json.dumps(before)} -> {json.dumps(after)}")
    return found


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``("width=0.3", "head=attention_pooling")`` as a dict. Values are parsed as JSON if possible, otherwise kept as strings.

    Raises:
        ValueError: a pair without ``=``, a name given twice, or a number that is not finite.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ValueError(f"options must be written as NAME=VALUE; found {pair!r}")
        if name in options:
            raise ValueError(f"option {name!r} is given twice")
        try:
            options[name] = parse_json(text)
        except ValueError:
            options[name] = text
        if isinstance(options[name], float) and not math.isfinite(options[name]):
            raise ValueError(f"option {name!r} must be a finite number; found {text}")
    return options


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """A nested configuration as a flat one, as trackers need it."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_values(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
