"""What users name as MODULE:NAME: where it is looked for, and what is said if it is not there."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from audio_datasets.system.imports import named_attribute


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a command, which Python does not look for modules in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_module_is_found_where_the_command_runs(in_folder: Path) -> None:
    (in_folder / "own_things.py").write_text("THING = object()\n\n\nclass Maker:\n    pass\n")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("own_things")
    assert named_attribute("own_things:Maker", "teacher").__name__ == "Maker"
    assert named_attribute("own_things:THING", "teacher") is sys.modules["own_things"].THING
    before = list(sys.path)
    named_attribute("own_things:THING", "teacher")
    assert sys.path == before, "the folder is added once"


def test_a_module_of_a_package_and_an_installed_one_are_found(in_folder: Path) -> None:
    (in_folder / "own_package").mkdir()
    (in_folder / "own_package" / "__init__.py").write_text("")
    (in_folder / "own_package" / "deep.py").write_text("VALUE = 3\n")
    assert named_attribute("own_package.deep:VALUE", "task") == 3
    assert named_attribute("json:dumps", "task") is json.dumps


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_module:THING",
            "task 'no_such_module:THING': there is no module 'no_such_module' \\(also looked in .*\\)",
        ),
        ("own_package.absent:THING", "there is no module 'own_package.absent'"),
        ("own_package:THING", "own_package has no 'THING'"),
    ],
)
def test_what_is_not_there_is_said(in_folder: Path, spec: str, message: str) -> None:
    (in_folder / "own_package").mkdir()
    (in_folder / "own_package" / "__init__.py").write_text("")
    with pytest.raises(ValueError, match=message):
        named_attribute(spec, "task")


def test_what_a_module_itself_lacks_keeps_its_own_error(in_folder: Path) -> None:
    """The user must read which import failed, not that their own module is not there."""
    (in_folder / "needs_more.py").write_text("import a_package_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        named_attribute("needs_more:THING", "objective")
    (in_folder / "is_broken.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        named_attribute("is_broken:THING", "objective")


@pytest.mark.parametrize("spec", [":THING", " :THING", "..:THING", ".own:THING", "own:", "own", "own:a:b", "own:a.b"])
def test_what_is_no_module_and_name_is_refused(in_folder: Path, spec: str) -> None:
    with pytest.raises(ValueError, match="task .*: expected module:NAME"):
        named_attribute(spec, "task")
