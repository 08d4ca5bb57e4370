"""Help pages: which options they show, in which groups, and with which defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tyro

from audio_datasets.command_line.help_pages import HelpGroups, help_page
from audio_datasets.system.command import parse


@dataclass(frozen=True)
class Oven:
    """Settings of the oven."""

    help_title: ClassVar[str] = "Oven"

    degrees: float = 180.0
    """Temperature, up to 90 % of the maximum."""
    fan: bool = True
    """Use the fan."""


@dataclass(frozen=True)
class Dish:
    """What every dish has."""

    name: str
    """Name of the dish."""
    spices: tuple[str, ...] = ()
    """Spices to add."""


@dataclass(frozen=True, kw_only=True)
class Cake(Dish):
    """Bake a cake."""

    help_groups: ClassVar[HelpGroups] = {"Dough": ("name", "flour"), "Baking": ("minutes", "degrees")}
    main_options: ClassVar[tuple[str, ...]] = ("name", "degrees", "recipe")

    recipe: tyro.conf.Positional[Path]
    """The recipe's file."""
    flour: Literal["wheat", "rye"] | None = None
    """Kind of flour."""
    minutes: int = 0
    """Time in the oven."""
    dry: bool = False
    """Leave out the icing."""
    oven: Annotated[Oven, tyro.conf.arg(name="")] = field(default_factory=Oven)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_help_shows_the_main_options_and_counts_the_others() -> None:
    page = help_page(Cake, "bake")
    assert [" ".join(line.split()) for line in page.splitlines()] == [
        "usage: bake --name STR PATH [OPTIONS]",
        "",
        "Bake a cake.",
        "",
        "Dough:",
        "--name STR Name of the dish. (required)",
        "",
        "Baking:",
        "--degrees FLOAT Temperature, up to 90 % of the maximum. (default: 180)",
        "",
        "Other options:",
        "PATH The recipe's file. (required)",
        "",
        "5 more options: bake --help-all",
    ]


def test_help_all_shows_every_option_in_its_group_the_main_ones_first() -> None:
    page = help_page(Cake, "bake", everything=True)
    blocks = [block.splitlines() for block in page.strip().split("\n\n")[2:-1]]
    found = {lines[0]: [line.split()[0] for line in lines[1:]] for lines in blocks}
    assert found == {
        "Dough:": ["--name", "--flour"],
        "Baking:": ["--degrees", "--minutes"],
        "Oven:": ["--fan,"],
        "Other options:": ["PATH", "--spices", "--dry"],
    }
    assert "--flour {wheat,rye}" in page
    assert "--spices STR [STR ...]" in page
    assert "Time in the oven. (default: 0)" in page
    assert "--fan, --no-fan" in page
    assert "Leave out the icing.\n" in page  # off is what a switch is unless given
    assert page.endswith("--no-NAME turns a switch --NAME off.\n")


def test_defaults_are_those_of_the_instance() -> None:
    default = Cake(name="pie", recipe=Path("a.txt"), oven=Oven(degrees=2.5e-5, fan=False))
    page = help_page(Cake, "bake", default=default, everything=True, note="For pies.")
    assert "Name of the dish. (default: pie)" in page
    assert "(default: 2.5e-05)" in page
    assert "--no-fan" not in page
    assert "Bake a cake. For pies." in page
    assert page.startswith("usage: bake [OPTIONS]")


@pytest.mark.parametrize(("flag", "all_shown"), [("-h", False), ("--help", False), ("--help-all", True)])
def test_parsing_prints_help_wherever_it_is_asked_for(
    flag: str, all_shown: bool, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Cake, ["recipe.txt", "--minutes", "30", flag], "bake")
    assert stopped.value.code == 0
    assert ("--flour" in capsys.readouterr().out) == all_shown


def test_a_main_option_that_does_not_exist_is_our_mistake() -> None:
    @dataclass(frozen=True)
    class Wrong:
        """Nothing."""

        main_options: ClassVar[tuple[str, ...]] = ("sugar",)

    with pytest.raises(AssertionError, match="sugar"):
        help_page(Wrong, "bake")
