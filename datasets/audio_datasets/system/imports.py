"""Imports objects that users name as MODULE:NAME on the command line: their own teachers, tasks, objectives."""

import importlib
import sys
from pathlib import Path
from typing import TypeVar

Kind = TypeVar("Kind")


def named_attribute(spec: str, what: str, kind: type[Kind] = object) -> Kind:
    """The attribute ``name`` of the module in ``module:name``.

    As with ``python -m``, modules are also searched for in the current directory.

    Args:
        what: the purpose, for the message: "teacher", "task", "objective".
        kind: the required type.

    Raises:
        ValueError: not of this form, no such module, or no object with this name and type in it.
    """
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"{what} {spec!r}: expected module:NAME, as in `from MODULE import NAME`")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise ValueError(f"{what} {spec!r}: there is no module {error.name!r} (also looked in {folder})") from error
    if kind is object and not hasattr(module, name):
        raise ValueError(f"{what} {spec!r}: {module_name} has no {name!r}")
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        has = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{what} {spec!r}: {name} must be a {kind.__name__}; {module_name} has {has} of that name")
    return found
