"""Checkpoints of a training run: folders written under a temporary name and renamed, so that each is complete or absent.

``checkpoints/step-00000120/`` contains ``student.safetensors``, ``ema.safetensors`` (if there is a moving average),
``objective.safetensors`` (if the objective has weights), ``optimizer.pt`` (tensors and numbers only; read with
``weights_only=True``), ``state.json`` (the position of the run) and ``digests.json`` with a digest of each other file, because
none of their formats would reveal a changed number.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from audio_datasets.audio.bad_clips import refuse_system_fault
from audio_datasets.system.disk_space import require_space, told_as_os_error
from audio_datasets.system.files import errors_of, flush_folder, make_folder, read_json, remove_path, write_json
from audio_datasets.system.messages import brief
from kd.run_folder.metrics_log import MetricsLog
from kd.training.learner import Learner
from kd.training.optimization import load_optimizer
from kd.training.state import TrainState
from students.weight_files import save_tensors
from teacher_logits.processes import on_main_process

DIGESTS = "digests.json"
NAME = re.compile(r"step-(\d{8})")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    student: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    objective: dict[str, Tensor] | None = None,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint and removes all except the newest ``keep``. Called by one process only."""
    make_folder(folder)
    remove_leftovers(folder)
    aside = folder / f".step-{step:08d}.tmp"
    aside.mkdir()
    try:
        with told_as_os_error(aside):
            save_tensors({key: value.contiguous() for key, value in student.items()}, aside / "student.safetensors")
            if ema is not None:
                save_tensors({key: value.contiguous() for key, value in ema.items()}, aside / "ema.safetensors")
            if objective:
                state_of_objective = {key: value.contiguous() for key, value in objective.items()}
                save_tensors(state_of_objective, aside / "objective.safetensors")
            torch.save(optimizer, aside / "optimizer.pt")
            write_json(aside / "state.json", state)
            write_json(aside / DIGESTS, digests_of(aside))
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # half a checkpoint would take the space that the next one needs
        raise
    for file in aside.iterdir():
        with errors_of(file), open(file, "rb") as handle:
            os.fsync(handle.fileno())
    flush_folder(aside)
    final = folder / f"step-{step:08d}"
    if final.exists():
        discard(final)
    os.rename(aside, final)
    flush_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        discard(old)
    return final


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint. If the process is killed meanwhile, the remains do not look like a checkpoint."""
    leftover = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    os.rename(checkpoint, leftover)
    remove_path(leftover)


def remove_leftovers(folder: Path) -> None:
    """Removes files that a killed process was writing or removing in ``folder``."""
    for leftover in folder.glob(".step-*.tmp"):
        remove_path(leftover)


def digests_of(checkpoint: Path) -> dict[str, str]:
    """The digest of each file by name, except of the file with the digests."""
    digests = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name != DIGESTS:
            with errors_of(path), open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return digests


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The parts that were given to ``save_checkpoint``, with tensors on the CPU.

    Raises:
        ValueError: a part is missing or damaged; the message names the checkpoint.
    """
    try:
        # Absent in checkpoints of version 0.1.
        if (path / DIGESTS).exists() and read_json(path / DIGESTS) != digests_of(path):
            raise ValueError("its files have changed since they were written")
        ema, objective = path / "ema.safetensors", path / "objective.safetensors"
        return {
            "student": load_file(path / "student.safetensors"),
            "ema": load_file(ema) if ema.exists() else None,
            "objective": load_file(objective) if objective.exists() else {},
            "optimizer": torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            "state": read_json(path / "state.json"),
        }
    except PermissionError:
        raise
    except Exception as error:  # safetensors and torch.load have no common error for a damaged file
        refuse_system_fault(error, path)
        raise ValueError(
            f"checkpoint {path} is damaged ({type(error).__name__}: {error}); remove it to continue from the one before"
        ) from error


# -- The state of a run as a checkpoint ----------------------------------------------------------------------------------


def save_state(accelerator: Accelerator, state: TrainState, folder: Path, keep: int, log: MetricsLog) -> None:
    """Writes a checkpoint from the main process; the others wait until it is complete."""
    sums = state.losses.per_process(accelerator)
    log.flush()
    if accelerator.is_main_process:
        scaler = accelerator.scaler
        learner = state.trained(accelerator)
        save_checkpoint(
            folder,
            state.step,
            student=learner.student.state_dict(),
            ema=state.ema.module.student.state_dict() if state.ema is not None else None,
            objective=_objective_state(state, learner),
            optimizer={
                "optimizer": state.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            state={
                "epoch": state.epoch,
                "step_in_epoch": state.step_in_epoch,
                "step": state.step,
                "skipped_steps": state.skipped_steps,
                "loss_sums": sums,
                "loss_batches": state.losses.batches,
                "metrics_bytes": log.size(),
                "metrics_digest": log.digest(),
            },
            keep=keep,
        )
    accelerator.wait_for_everyone()


def _objective_state(state: TrainState, learner: Learner) -> dict[str, Tensor]:
    """An objective's own tensors and their moving averages. Most objectives have none."""
    tensors = {f"now.{name}": value for name, value in learner.objective.state_dict().items()}
    if state.ema is not None:
        tensors |= {f"average.{name}": value for name, value in state.ema.module.objective.state_dict().items()}
    return tensors


def resume_state(accelerator: Accelerator, state: TrainState, folder: Path, log: MetricsLog) -> bool:
    """Restores ``state`` from the newest checkpoint in ``folder`` and truncates the log accordingly; False if there is none.

    Raises:
        ValueError: a checkpoint that is damaged or does not fit this student, objective and optimizer.
    """
    found = checkpoints(folder)
    if not found:
        log.cut_back(0)
        return False
    parts = load_checkpoint(found[-1])
    try:
        _fill(accelerator, state, parts)
        metrics = parts["state"]["metrics_bytes"], parts["state"].get("metrics_digest")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint {found[-1]} does not fit this run ({type(error).__name__}: {error}); remove it to continue from the "
            "one before"
        ) from error
    log.cut_back(*metrics)
    accelerator.wait_for_everyone()
    return True


def _fill(accelerator: Accelerator, state: TrainState, parts: dict[str, Any]) -> None:
    """Restores everything except the log from a checkpoint's parts. Raises various errors if they do not fit."""
    learner, objective = state.trained(accelerator), parts["objective"]
    learner.student.load_state_dict(parts["student"])
    learner.objective.load_state_dict(_under("now.", objective))
    if state.ema is not None:
        if parts["ema"] is None:
            raise ValueError("it has no moving average of the weights")
        state.ema.module.student.load_state_dict(parts["ema"])
        state.ema.module.objective.load_state_dict(_under("average.", objective))
    load_optimizer(state.optimizer, parts["optimizer"]["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(parts["optimizer"]["scaler"])
    saved = parts["state"]
    # Checkpoints of version 0.1 have neither the number of skipped steps nor the log's digest.
    for name in ("epoch", "step_in_epoch", "step", "skipped_steps", "loss_batches", "metrics_bytes"):
        if type(saved.get(name, 0)) is not int or saved.get(name, 0) < 0:
            raise ValueError(f"{name} must be a whole number, at least 0; found {brief(saved[name])}")
    state.epoch, state.step_in_epoch, state.step = saved["epoch"], saved["step_in_epoch"], saved["step"]
    state.skipped_steps = saved.get("skipped_steps", 0)
    state.losses.restore(saved["loss_sums"], saved["loss_batches"], accelerator)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def require_checkpoint_space(
    accelerator: Accelerator, state: TrainState, folder: Path, keep: int, further_runs: int = 0
) -> None:
    """Raises an error if there is not enough disk space for the checkpoints of a run and of ``further_runs`` after it."""
    to_write = max(1, keep + 1 - len(checkpoints(folder))) + further_runs * keep
    needed = to_write * checkpoint_bytes(state)
    on_main_process(accelerator, lambda: require_space(folder.parent, needed, f"keeping {to_write} more checkpoints"))


def checkpoint_bytes(state: TrainState) -> int:
    """Approximate size of a checkpoint: weights, their moving average if there is one, and Adam's two moments per parameter.

    Headers, less than a kilobyte for each tensor, are not counted.
    """

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(value.numel() * value.element_size() for value in tensors)

    weights = size(state.learner.state_dict().values())
    return weights * (1 + (state.ema is not None)) + 2 * size(state.learner.parameters())
