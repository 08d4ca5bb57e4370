from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kd.run_folder.config import as_json, differences, parse_options


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    path: Path = Path("a/b")
    folds: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=Inner)


def test_a_configuration_is_plain_json() -> None:
    assert as_json(Outer()) == {"path": "a/b", "folds": [1, 2], "inner": {"rate": 0.5}}


def test_differences_name_nested_settings() -> None:
    old, new = as_json(Outer()), as_json(Outer(path=Path("c"), inner=Inner(0.25)))
    assert differences(old, new) == ["inner.rate: 0.5 -> 0.25", 'path: "a/b" -> "c"']
    assert differences(old, new, ignore=("path",)) == ["inner.rate: 0.5 -> 0.25"]


def test_options_are_json_where_they_can_be() -> None:
    assert parse_options(["width=0.3", "head=mlp", "strides=[1,2]", "flag=true"]) == {
        "width": 0.3,
        "head": "mlp",
        "strides": [1, 2],
        "flag": True,
    }
    for text in ("Infinity", "NaN", "1e999"):
        with pytest.raises(ValueError, match=f"^option 'width' must be a finite number; found {text}$"):
            parse_options([f"width={text}"])
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_options(["width"])
    with pytest.raises(ValueError, match="twice"):
        parse_options(["a=1", "a=2"])
