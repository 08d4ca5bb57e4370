"""The fine-tuning tasks by name. A new one is a file with a ``Task``, and one line here (docs/add_a_task.md)."""

from audio_datasets.corpora.dcase20 import DCASE20
from audio_datasets.corpora.esc50 import ESC50
from audio_datasets.corpora.fsd50k import FSD50K
from audio_datasets.corpora.openmic import OPENMIC
from audio_datasets.corpora.own_sounds import FOLDER, MANIFEST
from audio_datasets.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (ESC50, FSD50K, OPENMIC, DCASE20, FOLDER, MANIFEST)}


def list_tasks() -> list[str]:
    """The names that ``get_task`` knows."""
    return list(TASKS)


def get_task(name: str) -> Task:
    """A task by name; ValueError that lists the choices for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choices: {', '.join(TASKS)}")
    return TASKS[name]
