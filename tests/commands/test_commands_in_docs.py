"""Every command line that README and docs show is one that the command accepts."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from kd.cli import COMMANDS
from students import create_student, save_student
from students.frontend import LogMelConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(
    r"^(?:[A-Z_]+=\S+ +)*(?:kd|accelerate launch .*-m kd\.|accelerate launch .*kd/|python kd/|python -m kd\.)"
)


class Parsed(BaseException):
    """The command line was accepted."""


def command_lines(text: str) -> Iterator[str]:
    """Commands in the indented and fenced blocks of a page, with continued lines joined."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        shown = line.strip().removeprefix("$ ")
        if (line.startswith("    ") or SHOWN.match(line)) and SHOWN.match(shown):
            yield shown


def words(line: str) -> tuple[str, list[str]] | None:
    """The subcommand and its arguments; None for a line that leaves some out."""
    found = shlex.split(line, comments=True)
    for end in ("|", ">", "2>&1", "&&", ";", "&"):
        found = found[: found.index(end)] if end in found else found
    if any("…" in word or "..." in word for word in found):
        return None
    modules = {module: name for name, (module, _) in COMMANDS.items()}
    for at, word in enumerate(found):
        if word == "kd":
            return found[at + 1], found[at + 2 :]
        module = word.removesuffix(".py").replace("/", ".")
        if module in modules:
            return modules[module], found[at + 1 :]
    return None


def make_what_pages_mention() -> None:
    save_student("runs/mn10", create_student("mn01", 2), ("fan", "pump"), LogMelConfig())
    page = (ROOT / "docs" / "add_an_objective.md").read_text(encoding="utf-8")
    Path("my_objective.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    make_what_pages_mention()
    cli = tyro.cli

    def parse_only(*arguments, **options):
        cli(*arguments, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_only)
    refused = []
    for line in command_lines(page.read_text(encoding="utf-8")):
        found = words(line)
        if found is None or found[1] in (["--help"], ["--help-all"], ["--version"]) or found[0].startswith("-"):
            continue
        try:
            status = import_module(COMMANDS[found[0]][0]).main(found[1])
        except Parsed:
            continue
        except SystemExit as error:
            status = error.code
        refused.append((line, status))
    assert not refused
