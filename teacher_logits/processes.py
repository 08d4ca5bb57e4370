"""Cooperation between the processes of one run."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn

from audio_datasets.system.command import USER_MISTAKE, plain_message
from audio_datasets.system.forks import fork_when_threads_rest
from audio_datasets.system.locks import locked
from audio_datasets.system.stop_signals import Stopped
from students.kept_memory import keep_freed_memory

if torch.distributed.is_available():
    # Before there is a process group: these functions take the group of that moment as the value of a parameter, and one
    # that they hold never ends (``start_accelerator``).
    import torch.distributed.nn.functional

Result = TypeVar("Result")

LONGEST_WAIT = timedelta(days=7)
"""How long processes wait for work of the main process, or for the slowest one. If a process dies, the launcher ends the rest."""


def start_accelerator(**options: Any) -> Accelerator:
    """``Accelerator(**options)``, which makes the process group of several, so that its threads do no harm.

    They enter Python when they free the tensors of an exchange. Where they do while Python shuts down, the process is
    aborted, if rarely: nothing must keep the group once
    ``audio_datasets.system.command.leave_process_group`` has left it, which this module sees to. Where they do while a data
    loader's process is forked, that one may hang (``audio_datasets.system.forks``). Freed memory is kept
    (``students.kept_memory``), which makes steps on a CPU 1.1 to 1.9 times as fast.
    """
    refuse_too_many_processes()
    refuse_settings_from_outside(options.get("mixed_precision"))
    keep_freed_memory()
    accelerator = Accelerator(**options)
    refuse_separate_processes(accelerator.num_processes)
    if accelerator.num_processes > 1:
        fork_when_threads_rest()
    return accelerator


def refuse_settings_from_outside(mixed_precision: str | None) -> None:
    """Refuses what Accelerate would do otherwise than this program says, or not at all.

    Raises ValueError for a compiler (a compiled student has other names and other bits), and for fp16 on a CPU, where Accelerate
    computes in float32 without a word. A launcher's mixed precision has no effect; a note says so.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise ValueError(
            f"a compiler was asked for (accelerate launch --dynamo_backend {backend.lower()}, its configuration, or "
            "ACCELERATE_DYNAMO_BACKEND); compiled students are not supported: choose the backend no"
        )
    has_device = torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if mixed_precision == "fp16" and not has_device:
        raise ValueError("--mixed-precision fp16 needs a GPU; on a CPU choose bf16 or no")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("", "no", mixed_precision) and int(os.environ.get("RANK", "0")) == 0:
        print(
            f"note: the launcher's mixed precision {launched} has no effect; this run computes with --mixed-precision {mixed_precision}",
            file=sys.stderr,
        )


def refuse_separate_processes(together: int) -> None:
    """Ends the command if a launcher started several processes but each would do all the work alone.

    Accelerate starts no process group without a GPU unless ``ACCELERATE_USE_CPU`` is set.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and together == 1:
        refuse_launch(
            f"{started} processes were started, but without a GPU each would do all of the work alone. To share it on CPUs, "
            f"run:\n  ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node {started} {this_command()}"
        )


def refuse_too_many_processes() -> None:
    """Ends the command if a launcher started more processes on this machine than it has GPUs."""
    started, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < started and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        refuse_launch(
            f"{started} processes were started on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}. Start one "
            f"process per GPU:\n  accelerate launch --num_processes {gpus} {this_command()}"
        )


def refuse_launch(message: str) -> NoReturn:
    """ValueError in the first process; the others end without a message of their own."""
    if int(os.environ.get("RANK", "0")) > 0:
        raise SystemExit(USER_MISTAKE)
    raise ValueError(message)


def this_command() -> str:
    """The running command as a launcher takes it: ``-m kd.pretrain --clips …`` or ``kd/pretrain.py --clips …``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = sys.argv[:1] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Runs a function on the main process and returns its result on every process.

    If it raises an error for a user's mistake, all processes end with one message. If it raises Stopped, so do all processes.
    """
    outcome: list[Any] = [None, None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = plain_message(error)
        except Stopped as stopped:
            outcome[2] = str(stopped)
    broadcast_object_list(outcome)
    result, mistake, stopped = outcome
    if mistake is not None:
        fail_together(accelerator, mistake)
    if stopped is not None:
        raise Stopped(stopped)
    return result


@contextmanager
def locked_by_main_process(accelerator: Accelerator, path: Path, what: str) -> Iterator[None]:
    """``audio_datasets.system.locks.locked`` for all processes of a run, of which the main one holds it."""
    with ExitStack() as stack:
        on_main_process(accelerator, lambda: stack.enter_context(locked(path, what)))
        yield


def fail_together(accelerator: Accelerator, message: str) -> None:
    """Ends every process, each of which calls this: the main one with a ValueError, the others in silence."""
    if accelerator.is_main_process:
        raise ValueError(message)
    raise SystemExit(USER_MISTAKE)


def any_process(accelerator: Accelerator, *flags: Tensor | bool) -> list[bool]:
    """For each flag, whether it is set on any process; all get the same answer, in one exchange."""
    mine = torch.stack([torch.as_tensor(flag, dtype=torch.float32, device=accelerator.device) for flag in flags])
    return [value > 0 for value in accelerator.reduce(mine, reduction="sum").tolist()]


def take_over_main_state(accelerator: Accelerator, module: nn.Module) -> None:
    """Gives ``module`` the main process's weights and buffers, on all processes.

    Training keeps the weights equal by itself, but each process's batch norms have seen clips of their own.
    """
    if accelerator.num_processes > 1:
        for value in module.state_dict().values():
            value.copy_(broadcast(value.detach().clone()))
