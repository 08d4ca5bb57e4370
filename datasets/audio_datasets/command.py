"""What all our commands share: arguments from a dataclass, plain errors with exit code 2, and progress bars."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

Config = TypeVar("Config")

USER_MISTAKE = 2
INTERRUPTED = 130


def parse(config: type[Config], arguments: Sequence[str] | None, program: str, default: Config | None = None) -> Config:
    """``config`` filled from the command line; a wrong flag or value is explained and ends with SystemExit 2.

    The same holds for values that ``config`` itself refuses with a ValueError. What the command line leaves out is taken
    from ``default``, if given.
    """
    settings = {} if default is None else {"default": default}
    return tyro.cli(config, args=arguments, prog=program, description=config.__doc__, **settings)


def run_command(function: Callable[[], Any]) -> int:
    """Runs a command's body and returns its exit code.

    ValueError and OSError are what our code raises for a user's mistake (wrong data, a missing file, a full disk): they
    become one plain message on standard error and exit code 2. Anything else is our bug and keeps its traceback. With
    ``KD_TRACEBACK=1`` in the environment the traceback is shown for these as well.
    """
    try:
        result = function()
    except (ValueError, OSError) as error:
        if os.environ.get("KD_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {plain_message(error)}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def plain_message(error: Exception) -> str:
    """The error's own words. One raised in a data-loading worker arrives with the worker's traceback in front of them."""
    message = str(error)
    if not message.startswith("Caught "):
        return message
    return message.rpartition(f"\n{type(error).__name__}: ")[2].strip()


def progress(iterable: Iterable | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on standard error with rate and time left; ``shown=False`` (other ranks) gives a silent one."""
    return tqdm(iterable, disable=not shown, dynamic_ncols=True, mininterval=0.5, **options)
