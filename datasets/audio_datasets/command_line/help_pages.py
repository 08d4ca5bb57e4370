"""The help of a command, made from its configuration: ``--help`` shows the main options, ``--help-all`` every one.

Options, explanations and defaults are read from the dataclass that describes the command, and from an instance of it where
the defaults depend on other options. A configuration may say how its options are arranged:

    help_groups: ClassVar[HelpGroups] = {"Data": ("task", "data"), "Training": ("epochs", "learning_rate")}
    main_options: ClassVar[tuple[str, ...]] = ("task", "data", "epochs")

Options that no group names are listed under the title of the nested dataclass that holds them: its ``help_title``, or the first
line of its docstring. Without ``main_options`` both pages show everything.
"""

import argparse
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

HelpGroups = Mapping[str, tuple[str, ...]]

HELP_FLAGS = ("-h", "--help", "--help-all")
OTHERS = "Other options"
WIDEST = 110
VALUE_NAMES = {Path: "PATH", str: "STR", int: "INT", float: "FLOAT"}


@dataclass(frozen=True)
class Option:
    """One option of a command."""

    name: str
    kind: Any
    """Its type, without ``Annotated``."""
    default: Any
    """``tyro.MISSING`` for one that must be given."""
    explanation: str
    group: str
    positional: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def values(self) -> str | None:
        """What follows the flag; None for a switch."""
        return None if self.kind is bool else value_name(self.kind)

    @property
    def help(self) -> str:
        """The explanation and the default, as one paragraph."""
        default = f"({'required' if self.default is tyro.MISSING else f'default: {as_typed(self.default)}'})"
        silent = self.default is None or self.default is False or self.default == ()
        return " ".join([*self.explanation.split(), *([] if silent else [default])])


def wants_help(arguments: list[str] | tuple[str, ...]) -> bool:
    """Whether a command line asks for help, wherever in it."""
    return any(argument in HELP_FLAGS for argument in arguments)


def help_page(config: type, program: str, *, default: Any = None, everything: bool = False, note: str = "") -> str:
    """The help of a command as text, as wide as the terminal.

    Args:
        config: the dataclass that describes the command.
        program: how the command is called.
        default: an instance whose values are shown as defaults; the dataclass's own if left out.
        everything: all options, rather than the main ones.
        note: a sentence after the description, such as which task the defaults are for.
    """
    options = list(options_of(config, default))
    main = getattr(config, "main_options", tuple(option.name for option in options))
    names = [option.name for option in options]
    assert set(main) <= set(names), f"{config.__name__} has no options {set(main) - set(names)}"
    shown = [option for option in options if everything or option.name in main]
    width = min(WIDEST, shutil.get_terminal_size().columns)
    page = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} {usage_of(options)}[OPTIONS]",
        description=" ".join([*inspect.getdoc(config).split(), note]).strip(),
        add_help=False,
        formatter_class=lambda prog: WholeWords(prog, max_help_position=30, width=width),
        epilog=last_line(program, len(options) - len(shown), any(option.kind is bool for option in shown)),
    )
    for title, members in arranged(shown, getattr(config, "help_groups", {}), main).items():
        group = page.add_argument_group(title)
        for option in members:
            add_option(group, option)
    return page.format_help()


class WholeWords(argparse.HelpFormatter):
    """argparse's layout, without line breaks inside ``--valid-split``."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(text, width, break_on_hyphens=False, initial_indent=indent, subsequent_indent=indent)


def add_option(group: Any, option: Option) -> None:
    """Adds an option to a group of argparse's, which is only used to lay out the page."""
    text = option.help.replace("%", "%%")
    if option.positional:
        group.add_argument(option.name, metavar=value_name(option.kind), help=text)
    elif option.kind is bool:
        group.add_argument(
            option.flag, *([f"--no-{option.flag[2:]}"] if option.default else []), action="store_true", help=text
        )
    else:
        group.add_argument(option.flag, metavar=option.values, help=text)


def usage_of(options: list[Option]) -> str:
    """The options that must be given, as the usage line shows them."""
    required = [option for option in options if option.default is tyro.MISSING]
    words = [value_name(option.kind) if option.positional else f"{option.flag} {option.values}" for option in required]
    return "".join(f"{word} " for word in words)


def last_line(program: str, hidden: int, has_switches: bool) -> str:
    """What stands below the options."""
    switches = "--no-NAME turns a switch --NAME off. " if has_switches and not hidden else ""
    return switches + (f"{hidden} more options: {program} --help-all" if hidden else "")


def arranged(options: list[Option], groups: HelpGroups, main: tuple[str, ...]) -> dict[str, list[Option]]:
    """Options by the title of their group: named groups first, and in each of them the main options first."""
    by_name = {option.name: option for option in options}
    found = {title: [by_name[name] for name in names if name in by_name] for title, names in groups.items()}
    named = {name for names in groups.values() for name in names}
    for option in options:
        if option.name not in named:
            found.setdefault(option.group, []).append(option)
    if OTHERS in found and not groups:
        found = {"Options": found.pop(OTHERS), **found}
    found[OTHERS] = found.pop(OTHERS, [])  # at the end
    return {
        title: sorted(members, key=lambda option: (option.default is not tyro.MISSING, option.name not in main))
        for title, members in found.items()
        if members
    }


def options_of(config: type, default: Any = None, group: str = OTHERS) -> Iterator[Option]:
    """All options of a dataclass and of those nested in it, whose options have no prefix."""
    types, texts = get_type_hints(config, include_extras=True), explanations(config)
    for item in dataclasses.fields(config):
        kind, notes = types[item.name], ()
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
        value = own_default(item) if default is None else getattr(default, item.name)
        if dataclasses.is_dataclass(kind):
            yield from options_of(kind, None if value is tyro.MISSING else value, title_of(kind))
        else:
            yield Option(item.name, kind, value, texts.get(item.name, ""), group, tyro.conf.Positional in notes)


def title_of(config: type) -> str:
    """What the options of a nested dataclass are listed under, unless a group names them."""
    if hasattr(config, "help_groups"):
        return OTHERS
    return getattr(config, "help_title", None) or inspect.getdoc(config).splitlines()[0].rstrip(".")


def explanations(config: type) -> dict[str, str]:
    """The docstring of each field of a dataclass; that of a base class where the class itself has none."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base):
            params = docstring_parser.parse_from_object(base).params
            texts |= {param.arg_name: param.description for param in params if param.description}
    return texts


def own_default(item: dataclasses.Field) -> Any:
    """The default of a dataclass's field; ``tyro.MISSING`` if it has none."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return tyro.MISSING if item.default is dataclasses.MISSING else item.default


def value_name(kind: Any) -> str:
    """What stands for a value of a type: ``PATH``, ``{adam,adamw}``, ``INT [INT ...]``."""
    if get_origin(kind) in (Union, UnionType):
        return "|".join(value_name(part) for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(kind) if choice is not None) + "}"
    if get_origin(kind) is tuple:
        one = value_name(get_args(kind)[0])
        return f"{one} [{one} ...]"
    return VALUE_NAMES[kind]


def as_typed(value: Any) -> str:
    """A default as it would be typed."""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return " ".join(map(as_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
