"""Students from outside this package, named ``module:Class``, and the rules for loading saved ones.

Importing a module runs its code, so a run folder from a stranger must not decide what is imported. A name that the caller
gives (``create_student``, ``--student my_toy:Toy``) is imported. A name from a run folder's card is imported only if

- the caller named the same student before in this process, for example on the command line, or
- the caller allows it (``load_student(folder, allow=["my_toy:Toy"])``), or
- the environment variable ``KD_ALLOW_STUDENTS`` contains it; several names are separated by commas.
"""

import functools
import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from students.interface import Student

ALLOW_VARIABLE = "KD_ALLOW_STUDENTS"

_named_by_caller: set[str] = set()
"""Names that the caller gave in this process."""


def is_outside(name: str) -> bool:
    """Whether a name has the form ``module:Class``."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name) is not None


def outside_family(name: str) -> type[Student]:
    """The class named ``module:Class``. From now on this process may load saved students of this class.

    Raises ValueError if there is no such class, or if it is not a Student with an options dataclass.
    """
    family = _outside_family(name)
    _named_by_caller.add(name)
    return family


@functools.cache
def _outside_family(name: str) -> type[Student]:
    family = _imported(name)
    if not (isinstance(family, type) and issubclass(family, Student)) or family is Student:
        found = f"the class {family.__name__}" if isinstance(family, type) else f"{family!r}"
        raise ValueError(f"student {name!r} must be a subclass of students.interface.Student; found {found}")
    if not (isinstance(family.Options, type) and is_dataclass(family.Options)):
        raise ValueError(f"student {name!r}: its attribute Options must be a dataclass; found {family.Options!r}")
    try:
        family.Options()
    except TypeError as error:
        raise ValueError(f"student {name!r}: every option needs a default value ({error})") from error
    return family


def _imported(name: str) -> Any:
    """The object named ``module:Class``. Errors raised inside the module are passed on unchanged."""
    module_name, _, class_name = name.partition(":")
    # As with `python -m`: the user's module is in the current directory, which is not the folder of our script.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise ValueError(f"student {name!r}: there is no module {error.name!r} (also looked in {folder})") from error
    if not hasattr(module, class_name):
        raise ValueError(f"student {name!r}: {module_name} has no class {class_name!r}")
    return getattr(module, class_name)


def check_allowed(name: str, path: Path, allow: Sequence[str] = ()) -> None:
    """Raises ValueError if the card at ``path`` names a student outside this package that nobody allowed."""
    if not is_outside(name):
        return
    in_environment = [allowed.strip() for allowed in os.environ.get(ALLOW_VARIABLE, "").split(",")]
    if name not in (*_named_by_caller, *allow, *in_environment):
        raise ValueError(
            f"{path} needs the student {name!r}, and loading it would run the code in {name.partition(':')[0]!r}. If you trust"
            f" this code, set {ALLOW_VARIABLE}={name} in the environment (in Python: allow=[{name!r}])"
        )
