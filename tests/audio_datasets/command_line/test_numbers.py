"""No command computes with a number that is not finite, or larger than any that makes sense."""

import dataclasses
import importlib
import inspect
import math
import typing
from typing import Any

import pytest

from audio_datasets.command_line.numbers import check_numbers
from kd.cli import COMMANDS, main
from kd.training.non_finite import NonFiniteConfig

ABSURD = {float: (math.inf, -math.inf, math.nan, 1e308, -1e308, 1e-40), int: (10**30, -(10**30), 10**5000)}


def configurations() -> dict[str, type]:
    """The options of each command, by the command's name."""
    found: dict[str, type] = {}
    for command, (module, _) in COMMANDS.items():
        there = [
            value
            for name, value in vars(importlib.import_module(module)).items()
            if inspect.isclass(value) and dataclasses.is_dataclass(value) and name.endswith(("Config", "Command"))
        ]
        found |= {f"{command} {value.__name__}": value for value in there if value is not NonFiniteConfig}
    return found


def numbers_of(config: type, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], type]]:
    """(names of the fields that lead to it, int or float) of each number among the options, in parts of the options as well."""
    found = []
    for name, kind in typing.get_type_hints(config).items():
        if typing.get_origin(kind) is typing.ClassVar or name not in {item.name for item in dataclasses.fields(config)}:
            continue
        if dataclasses.is_dataclass(kind):
            found += numbers_of(kind, (*path, name))
        kinds = {kind, *typing.get_args(kind)}
        found += [((*path, name), number) for number in (int, float) if number in kinds and bool not in kinds]
    return found


def holding(config: type, path: tuple[str, ...], value: Any) -> Any:
    """Options of which only one is set, without the checks of the class itself."""
    inner = typing.get_type_hints(config)[path[0]]
    content = holding(inner, path[1:], value) if len(path) > 1 else value
    return dataclasses.make_dataclass("Options", [(path[0], Any)])(content)


@pytest.mark.parametrize("command", configurations())
def test_every_number_of_every_command(command: str) -> None:
    config = configurations()[command]
    for path, kind in numbers_of(config):
        for value in ABSURD[kind]:
            with pytest.raises(ValueError, match=f"^--{path[-1].replace('_', '-')} must be "):
                check_numbers(holding(config, path, value))
            with pytest.raises(ValueError, match=f"^--{path[-1].replace('_', '-')} must be "):
                check_numbers(holding(config, path, (value,)))


def test_defaults_are_allowed() -> None:
    for config in configurations().values():
        for item in dataclasses.fields(config):
            if item.default is not dataclasses.MISSING:
                check_numbers(dataclasses.make_dataclass("Options", [(item.name, Any)])(item.default))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretrain --clips a.h5 --out b --label-weight 1 --clip-seconds 1e308", "--clip-seconds must be at most 3,600"),
        ("pretrain --clips a.h5 --out b --label-weight 1 --roll-seconds inf", "--roll-seconds must be a finite number"),
        ("teach --clips a.h5 --teacher b --out c --clip-seconds 1e9", "--clip-seconds must be at most 3,600"),
        ("evaluate --clips a.h5 --tagger b --clip-seconds inf", "--clip-seconds must be a finite number"),
        (f"pack a --out b.h5 --shard-clips {'9' * 400}", "--shard-clips must be at most 1,000,000,000; found a number"),
        (
            f"profile --num-classes {10**30}",
            "--num-classes must be at most 1,000,000; found a number of about 31 digits",
        ),
    ],
)
def test_the_message(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
