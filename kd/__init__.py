"""Training, evaluation and the command line of the knowledge-distillation pipeline. ``from kd import Tagger`` tags audio."""

from importlib import import_module
from typing import Any

__all__ = ["Tagger"]


def __getattr__(name: str) -> Any:
    """``Tagger`` is loaded when it is asked for, since it needs PyTorch, which takes seconds to import."""
    if name == "Tagger":
        return import_module("kd.deploy.tagging.tagger").Tagger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
