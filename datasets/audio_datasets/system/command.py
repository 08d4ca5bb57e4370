"""Code shared by all commands: arguments from a dataclass, plain errors with exit code 2, and progress bars."""

import gc
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from itertools import dropwhile, takewhile
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

from audio_datasets.command_line.help_pages import help_page, wants_help
from audio_datasets.command_line.numbers import check_numbers
from audio_datasets.command_line.terminal import safe_output
from audio_datasets.system.paths.inputs import refuse_special_inputs
from audio_datasets.system.stop_signals import Stopped, StopRequested, interrupt_once, raised_stop_signals
from audio_datasets.system.workers.faults import fault_message, system_hint

Config = TypeVar("Config")

USER_MISTAKE = 2
STOPPED = 75
"""Stopped on request; long computations are saved, so start the command again. (EX_TEMPFAIL in sysexits.h: "try again later".)"""
INTERRUPTED = 130


def parse(
    config: type[Config],
    arguments: Sequence[str] | None,
    program: str,
    default: Config | None = None,
    help_note: str = "",
) -> Config:
    """Fills ``config`` from the command line. A wrong flag or value is explained and ends with SystemExit 2.

    The same holds for values that ``config`` itself refuses with a ValueError. What the command line leaves out is taken
    from ``default``, if given. ``--help`` and ``--help-all`` print a page of options and end with SystemExit 0.

    Args:
        help_note: a sentence for that page, such as which task the defaults are for.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if wants_help(arguments):
        print(help_page(config, program, default=default, everything="--help-all" in arguments, note=help_note), end="")
        raise SystemExit(0)
    settings = {} if default is None else {"default": default}
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            filled = tyro.cli(config, args=arguments, prog=program, description=config.__doc__, **settings)
    except OverflowError as error:  # of a configuration that computes with infinity
        raise ValueError(f"a number on the command line is too large: {error}") from error
    except SystemExit:
        print(without_box(shown.getvalue()), end="", file=sys.stderr)
        raise
    check_numbers(filled)
    refuse_special_inputs(filled)
    return filled


def without_box(message: str) -> str:
    """tyro's report of a value that a configuration refused as one line; all other reports as they are.

    tyro draws a box around it and names the Python class: "Error parsing EvaluateConfig: batch_size must be …".
    """
    lines = [line.strip("│| ") for line in message.splitlines()]
    if not lines or "Value error" not in lines[0]:
        return message
    inside = dropwhile(lambda line: not line.strip("─-"), lines[1:])  # a box in ASCII has a line under its title
    report = " ".join(takewhile(lambda line: line.strip("─-"), inside)).removeprefix("Error parsing ")
    for found, plain in (
        (r"^[A-Za-z_]\w*: ", ""),
        (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
        (r"could not convert string to float: (.*)", r"\1 is not a number"),
    ):
        report = re.sub(found, plain, report)
    return f"error: {report}\n"


def run_command(function: Callable[[], Any]) -> int:
    """Runs a command's body and returns its exit code.

    ValueError and OSError are what our code raises for a user's mistake (wrong data, a missing file, a full disk): they
    become one plain message on standard error and exit code 2. So do a worker that was killed and memory that ran out
    (``audio_datasets.system.workers.faults``). Anything else is our bug and keeps its traceback. With
    ``KD_TRACEBACK=1`` in the environment the traceback is shown for these as well. A stop signal (``stop_signals``) ends the
    command with exit code 75, whatever it is doing.
    """
    interrupt_once()
    with safe_output():
        code, with_others = _run(function)
    if with_others:  # here, because no exception's frames refer to the group any more
        leave_process_group()
    return code


def _run(function: Callable[[], Any]) -> tuple[int, bool]:
    """The exit code, and whether the other processes of a run end in the same place."""
    rank = int(os.environ.get("RANK", "0"))  # set for every process of several
    try:
        with raised_stop_signals():
            result = function()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = fault_message(error) if isinstance(error, RuntimeError | MemoryError) else plain_message(error)
        if message is None:
            raise
        if os.environ.get("KD_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error{f' in process {rank}' if rank else ''}: {message}", file=sys.stderr)
        return USER_MISTAKE, False
    except Stopped as stopped:
        if rank == 0:
            print(f"stopped: {stopped}", file=sys.stderr)
        return STOPPED, True
    except StopRequested as request:
        if rank == 0:
            print(f"stopped: {request}; the same command starts from the beginning", file=sys.stderr)
        return STOPPED, False
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED, False
    return result if isinstance(result, int) else 0, True


def leave_process_group() -> None:
    """Leaves the process group, if there is one, and thereby ends its threads.

    A thread that requests Python's lock while Python shuts down is terminated, and C++ then aborts the process although all
    work is done. Not called after an error, because the group would wait for an exchange that other processes may never enter.
    """
    if "torch.distributed" not in sys.modules:
        return
    from torch import distributed  # here, because not every command needs it

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a wrapped student refers to the group and is part of a reference cycle
        distributed.destroy_process_group()


def plain_message(error: Exception) -> str:
    """The error's own message. For errors from data-loading workers, the worker's traceback before it is removed."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        hint = system_hint(error.errno)
        return where + error.strerror + (f". {hint}" if hint else "")
    message = str(error)
    if not message.startswith("Caught "):
        return message
    last = list(re.finditer(rf"\n(?:\w+\.)*{type(error).__name__}: ", message))
    return message[last[-1].end() :].strip() if last else message


def progress(iterable: Iterable | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on standard error with rate and remaining time; silent with ``shown=False`` (on other ranks)."""
    return tqdm(iterable, disable=not shown, dynamic_ncols=True, mininterval=0.5, **options)
