"""Checkpoints of a training run: folders written aside and renamed, so that each is whole or absent.

``checkpoints/step-00000120/`` holds ``student.safetensors``, ``ema.safetensors`` (if an average is kept), ``optimizer.pt``
(tensors and numbers only; read with ``weights_only=True``), ``state.json`` (where the run stands) and ``digests.json``,
one for each of the others: none of their formats would tell that a number in them has changed.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from audio_datasets.system.disk_space import told_as_os_error
from audio_datasets.system.files import flush_folder, make_folder, read_json, write_json

DIGESTS = "digests.json"
NAME = re.compile(r"step-(\d{8})")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    student: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint and removes all but the newest ``keep``. Called by one process only."""
    make_folder(folder)
    remove_leftovers(folder)
    aside = folder / f".step-{step:08d}.tmp"
    aside.mkdir()
    try:
        with told_as_os_error(aside):
            save_file({key: value.contiguous() for key, value in student.items()}, aside / "student.safetensors")
            if ema is not None:
                save_file({key: value.contiguous() for key, value in ema.items()}, aside / "ema.safetensors")
            torch.save(optimizer, aside / "optimizer.pt")
            write_json(aside / "state.json", state)
            write_json(aside / DIGESTS, digests_of(aside))
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # half a checkpoint would take the room that the next one needs
        raise
    for file in aside.iterdir():
        with open(file, "rb") as handle:
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
    """Removes a checkpoint; if it is killed meanwhile, what is left does not look like one."""
    leftover = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    os.rename(checkpoint, leftover)
    shutil.rmtree(leftover)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process was writing or removing in ``folder`` when it was killed."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def digests_of(checkpoint: Path) -> dict[str, str]:
    """A digest of each file, by name; apart from the file that holds them."""
    digests = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name != DIGESTS:
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return digests


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The parts given to ``save_checkpoint``, tensors on the CPU.

    Raises:
        ValueError: a part is missing or damaged; names the checkpoint.
    """
    try:
        # Absent in checkpoints of version 0.1.
        if (path / DIGESTS).exists() and read_json(path / DIGESTS) != digests_of(path):
            raise ValueError("its files are not those that were written")
        ema = path / "ema.safetensors"
        return {
            "student": load_file(path / "student.safetensors"),
            "ema": load_file(ema) if ema.exists() else None,
            "optimizer": torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            "state": read_json(path / "state.json"),
        }
    except PermissionError:
        raise
    except Exception as error:  # safetensors and torch.load have no common error for a damaged file
        raise ValueError(
            f"checkpoint {path} is damaged ({type(error).__name__}: {error}); remove it to go on from the one before"
        ) from error
