"""Reading weights files into tensors. Nothing is ever loaded that could run code, or that takes far more memory than its file.

A few hundred bytes can ask for any amount of memory or time: a deflated or sparse file, a tensor that repeats one number (strides
of 0), a key that takes for ever to hash. Such files are refused before memory is taken.
"""

import math
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from students.interface import StateDict
from students.public_weights import find_weights

CONTAINERS = ("state_dict", "model_state_dict", "model")
"""Names under which training loops keep the weights beside their other state."""

LARGEST_VARIABLE = "KD_LARGEST_INPUT_GB"
"""Environment variable: how much one input may take in memory (10^9 bytes) if its file takes less than half of it on the disk."""
LARGEST_GB = 0.25
BLOCK_BYTES = 512  # the unit of st_blocks
MOST_NESTED = 100
MOST_STEPS_OF_A_KEY = 10**6
LEGACY_PICKLES = 5  # magic number, version, system, objects, keys of storages


def read_bytes(path: Path) -> bytes:
    """The content of a file. OSError that names it, also where the disk fails while it is read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors, by name, in a .safetensors file or in a PyTorch checkpoint that contains a plain state dict.

    If a checkpoint has an entry "state_dict", "model_state_dict" or "model" beside other state of a training loop, that entry is
    used.

    ``path`` may be the name of a file in the folder that ``KD_WEIGHTS_DIR`` names, such as "mn04_as" (``find_weights``).

    Raises ValueError for a missing file, for one with other contents, and for one that would take far more memory than it has
    on the disk (``require_room``).
    """
    path = find_weights(path)
    require_room_for_file(path)
    state = _safetensors(path) if path.suffix == ".safetensors" else _checkpoint(path)
    require_plain_tensors(path, state)
    return dict(state)


def _safetensors(path: Path) -> StateDict:
    content = read_bytes(path)  # so that a failure below can only mean that the content is damaged
    try:
        return load(content)
    except KeyError as error:  # of torch's types by safetensors' names
        raise ValueError(f"{path} holds numbers of a type that is not known here: {error}") from error
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _checkpoint(path: Path) -> Mapping[str, Tensor]:
    with open(path, "rb") as file:
        _refuse_endless_keys(path, file)
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a text file read as a pickle raises an IndexError, for example
            # We do not show torch's message: it suggests loading the file in a way that can run code.
            raise ValueError(
                f"{path} is truncated, is not a PyTorch checkpoint, or contains more than plain tensors"
            ) from error
    if isinstance(state, Mapping):
        inner = next((state[name] for name in CONTAINERS if isinstance(state.get(name), Mapping) and state[name]), None)
        state = state if inner is None else inner
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        found = f"a dict with {', '.join(map(_shown, list(state)[:5]))}" if isinstance(state, Mapping) else type(state)
        raise ValueError(f"{path} is not a state dict (tensors by name); found {found}")
    return state


def _shown(key: Any) -> str:
    return repr(key)[:80] if isinstance(key, str | int | float) else f"a {type(key).__name__}"


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file. OSError that names it, for a disk that is full or fails.

    safetensors itself would write a temporary file of its own beside it, which a killed process leaves and which only its owner
    may read.
    """
    content = save(dict(state), metadata=None if metadata is None else dict(metadata))
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- Size -------------------------------------------------------------------------------------------------------------


def require_room_for_file(path: Path) -> None:
    """Raises ValueError for a weights file that is much larger inside than on the disk: sparse, or a deflated archive."""
    require_room(path, path.stat().st_size, "its content")
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
            return  # torch says so
        require_room(path, size, "what the archive holds")


def require_plain_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all are ordinary tensors, of real numbers, whose shapes ask for no more than the file may take."""
    size = 0
    for name, value in state.items():
        if (kind := _special_kind(value)) is not None:
            raise ValueError(f"{path}: {name!r} is {kind}; expected a plain tensor with numbers")
        size += value.numel() * value.element_size()
    require_room(path, size, "what the shapes of its tensors ask for")


def _special_kind(value: Tensor) -> str | None:
    if value.is_meta:
        return "a tensor without content (device meta)"
    if value.is_nested or value.layout != torch.strided:
        return "a sparse or nested tensor"
    if value.is_quantized:
        return "a quantised tensor"
    if value.dtype.is_complex:
        return "a tensor of complex numbers"
    return None


def require_room(path: Path, needed_bytes: float, what: str) -> None:
    """Raises ValueError if ``what`` would take more than twice what the file takes on the disk, and more than the bound."""
    allowed = largest_bytes()
    if needed_bytes <= allowed:
        return
    status = os.stat(path)
    blocks = getattr(status, "st_blocks", None)
    on_disk = status.st_size if blocks is None else min(status.st_size, blocks * BLOCK_BYTES)
    if needed_bytes > 2 * on_disk:
        raise ValueError(
            f"{path}: {what} would take {needed_bytes / 1e9:,.1f} GB of memory, but the file takes {on_disk / 1e9:.3f} GB on the "
            f"disk; at most {allowed / 1e9:g} GB are allowed for such a file (if you trust it, set {LARGEST_VARIABLE}="
            f"{math.ceil(needed_bytes / 1e9)})"
        )


def largest_bytes() -> int:
    """The bound in force. ValueError for a value of the variable that is not a positive number."""
    text = os.environ.get(LARGEST_VARIABLE, "")
    if not text.strip():
        return round(LARGEST_GB * 1e9)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < 1e9:
        raise ValueError(f"{LARGEST_VARIABLE} must be a positive number of gigabytes; found {text!r}")
    return round(limit * 1e9)


# --- Pickles ------------------------------------------------------------------------------------------------------------


def _refuse_endless_keys(path: Path, file: BinaryIO) -> None:
    """Raises ValueError for a checkpoint whose pickle builds tuples that lie too deep to be hashed, or that never end.

    torch's reader hashes keys as it goes. Sixty tuples, each of which holds the one before twice, take 2^60 steps.
    """
    for pickled in _pickles(file):
        try:
            _follow_tuples(pickled)
        except _EndlessError:
            raise ValueError(f"{path} is not a state dict: it holds tuples that are nested too deeply") from None
        except Exception:  # damaged; torch says so
            return


def _pickles(file: BinaryIO) -> Iterator[bytes | BinaryIO]:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        yield from (file for _ in range(LEGACY_PICKLES))
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield archive.read(name)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return


class _EndlessError(Exception):
    pass


def _follow_tuples(pickled: bytes | BinaryIO) -> None:
    """Follows a pickle with, in place of each value, (steps to hash it, how deep it is nested)."""
    plain, mark = (1, 0), None
    stack: list[tuple[int, int] | None] = []
    memo: dict[int, tuple[int, int]] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument, plain))
        elif name == "MARK":
            stack.append(mark)
        else:
            taken = []
            for needed in reversed(opcode.stack_before):
                if needed is pickletools.stackslice:
                    while stack and stack[-1] is not mark:
                        taken.append(stack.pop())
                else:
                    taken.append(stack.pop() if stack else plain)
            result = plain
            if name.startswith("TUPLE") or name in ("REDUCE", "NEWOBJ", "BUILD"):
                inside = [value for value in taken if value is not mark]
                result = (1 + sum(steps for steps, _ in inside), 1 + max((deep for _, deep in inside), default=0))
                if result[0] > MOST_STEPS_OF_A_KEY or result[1] > MOST_NESTED:
                    raise _EndlessError
            stack.extend(result for _ in opcode.stack_after)
