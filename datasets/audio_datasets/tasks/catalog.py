"""Tasks by name: each has its own file in ``audio_datasets.corpora``, or is in a module that the user names."""

import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from audio_datasets import corpora
from audio_datasets.system.imports import named_attribute
from audio_datasets.tasks.listing import Listing
from audio_datasets.tasks.task import Task

OTHER_NAMES = {"folders": "folder"}
"""Layouts (`kd pack --layout`) whose name differs from that of their task."""


@cache
def _tasks() -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for module in pkgutil.iter_modules(corpora.__path__, f"{corpora.__name__}."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, Task):
                assert tasks.setdefault(value.name, value) is value, f"two tasks are called {value.name}"
    return tasks


def list_tasks() -> list[str]:
    """The names of all tasks that come with the package, in alphabetical order."""
    return sorted(_tasks())


def get_task(name: str) -> Task:
    """A task by its name, or a task of the user's own as ``module:NAME``.

    Raises:
        ValueError: an unknown name (lists the choices); no such module, or nothing in it that is a ``Task``.
    """
    if ":" in name:
        return named_attribute(name, "task", Task)
    if name not in _tasks():
        raise ValueError(
            f"unknown task {name!r}; choices: {', '.join(list_tasks())}, or module:NAME for one of your own"
        )
    return _tasks()[name]


def task_of_layout(path: Path, layout: str = "auto") -> Task:
    """The task whose layout is called ``layout``; with "auto", the task whose layout ``path`` has.

    Raises:
        ValueError: an unknown layout; a path in no known layout, or in more than one.
    """
    if layout != "auto":
        name = OTHER_NAMES.get(layout, layout)
        if name not in _tasks():
            choices = sorted({*list_tasks(), *OTHER_NAMES} - set(OTHER_NAMES.values()))
            raise ValueError(f"layout must be auto or one of {choices}; found {layout!r}")
        return _tasks()[name]
    found = [task for task in _tasks().values() if task.recognises is not None and task.recognises(path)]
    found = [task for task in found if not task.is_fallback] or found
    if len(found) > 1:
        names = " and ".join(task.name for task in found)
        raise ValueError(f"{path} matches the layouts of {names}; choose one with --layout")
    if not found:
        layouts = "; ".join(f"{task.name}: {task.layout}" for task in _tasks().values())
        raise ValueError(f"{path} matches none of the known layouts ({layouts})")
    return found[0]


def read_listing(
    path: str | Path,
    layout: str = "auto",
    *,
    audio_root: Path | None = None,
    segments: Sequence[str] = (),
    allow_outside: bool = False,
    class_list: Path | None = None,
) -> Listing:
    """The clips at ``path``. ``layout`` is as for ``task_of_layout``, the other arguments as for ``Task.read_checked``.

    Listed files that do not exist are kept; packing reports them together with broken files. Raises ValueError if the path is
    missing, has no known layout or contains no clips, or if a clip id occurs twice.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    task = task_of_layout(path, layout)
    return task.read_checked(
        path, audio_root=audio_root, segments=segments, allow_outside=allow_outside, class_list=class_list
    )
