"""Objects that the user keeps in modules of their own, named ``module:NAME`` on the command line."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TypeVar

Kind = TypeVar("Kind")


def object_of_module(spec: str, kind: type[Kind], what: str) -> Kind:
    """The object ``NAME`` of a module, for ``spec`` "module:NAME"; ``what`` says what it is for, as "task".

    The module is looked for in the current directory too, as ``python -m`` does.

    Raises:
        ValueError: no such module, no such name in it, or an object of another kind.
    """
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ValueError(f"{what} {spec!r}: expected module:NAME, as in `from module import NAME`")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise ValueError(f"{what} {spec!r}: there is no module {error.name!r} (looked in {folder} too)") from error
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        has = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{what} {spec!r}: {name} must be a {kind.__name__}; {module_name} has {has} of that name")
    return found
