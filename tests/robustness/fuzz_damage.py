"""Damage for tests/robustness/fuzz.py: in a file's bytes, and in what a file of a known format holds."""

import copy
import csv
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**64 - 1)


def damage(content: bytes, others: list[bytes], draws: np.random.Generator) -> bytes:
    """One to three kinds of damage in a file's bytes."""
    data = bytearray(content)
    for _ in range(int(draws.integers(1, 4))):
        if not data:
            break
        # Half of the damage lies near the beginning, where headers are.
        place = int(draws.integers(len(data)))
        if draws.random() < 0.5:
            place = min(place, int(draws.integers(1, 2049)))
            place = min(place, len(data) - 1)
        length = int(min(len(data) - place, 2 ** draws.integers(0, 12)))
        kind = int(draws.integers(9))
        if kind == 0:
            for _ in range(int(draws.integers(1, 9))):
                data[int(draws.integers(len(data)))] ^= 1 << int(draws.integers(8))
        elif kind == 1:
            data[place : place + length] = draws.bytes(length)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length]
        elif kind == 5:
            other = others[int(draws.integers(len(others)))]
            start = int(draws.integers(max(1, len(other))))
            data[place : place + length] = other[start : start + length]
        elif kind == 6:
            data[place : place + length] = bytes([int(draws.choice([0, 255]))]) * length
        elif kind == 7:
            size = int(draws.choice([1, 2, 4, 8]))
            number = int(draws.choice(len(ABSURD)))
            value = (ABSURD[number] % 2 ** (8 * size)).to_bytes(size, draws.choice(["little", "big"]))
            data[place : place + size] = value
        else:
            data[place] = int(draws.integers(256))
    return bytes(data)


def change_store(path: Path, draws: np.random.Generator) -> None:
    """Replaces an attribute or an array of an HDF5 file by another value, type or shape, or removes it."""
    values = (
        "", "kd-clip-store", "[]", '["a", "a"]', "[1, 2]", "{}", "null", "[" * 3000, -1, 0, 1, 2**40, 1.5, float("nan"),
        np.arange(5), b"\xff\xfe", "\ud7ff" * 10, True,
    )  # fmt: skip
    with h5py.File(path, "r+") as file:
        for _ in range(int(draws.integers(1, 3))):
            names = [("attribute", name) for name in file.attrs] + [("array", name) for name in file]
            if not names:
                return
            kind, name = names[int(draws.integers(len(names)))]
            if kind == "attribute":
                del file.attrs[name]
                if draws.random() < 0.8:
                    file.attrs[name] = values[int(draws.integers(len(values)))]
                continue
            old, kept_type = np.atleast_1d(file[name][()]), file[name].dtype
            del file[name]
            change = int(draws.integers(7 if old.dtype.kind not in "OV" else 5))
            if change == 0:
                continue
            changed = {
                1: lambda old=old: old[: len(old) // 2],
                2: lambda old=old: np.concatenate([old, old]),
                3: lambda old=old: old[None],
                4: lambda old=old: old[::-1],
                5: lambda old=old: old.astype("S3") if old.dtype.kind == "S" else old.astype(np.float32),
                6: lambda old=old: np.asarray(old.reshape(-1)[0]),
            }[change]()
            file.create_dataset(name, data=changed, dtype=kept_type if changed.dtype.kind == "O" else None)


# -- Values in nested containers ---------------------------------------------------------------------------------------

ODD_TEXTS = (
    "", " ", "a", "nan", "-1", "0", "1e999", "٣", "a\nb", "a\rb", '"', "a,b", "a;b", "\t", "\0", "\x1b[2J", "\u202etxt", "null", "x" * 300,
    "../../../etc/passwd", "/etc/passwd", "..", ".", "C:\\x", "<script>alert(1)</script>", "&amp;", "ключ", "e\u0301", "\ufeff",
    "0.1", "1_000", "9" * 30, "train", "test", "=1+1", "%s", "{}", "$HOME",
)  # fmt: skip
ODD_NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 0.0, -0.5, 0.3, 1.0, 1e-9, 1e308, float("nan"), float("inf"), -float("inf"))  # fmt: skip
ODD_VALUES = (None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, ["a", "a"], [1, "a"], "\ud800")


def odd_value(draws: np.random.Generator) -> Any:
    """A value that hardly anybody expects."""
    values = (ODD_TEXTS, ODD_NUMBERS, ODD_VALUES)[int(draws.integers(3))]
    return copy.deepcopy(values[int(draws.integers(len(values)))])


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in nested dicts and lists."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def change_values(
    content: Any, draws: np.random.Generator, odd: Callable[[np.random.Generator], Any] = odd_value
) -> Any:
    """Nested dicts and lists with one to three values replaced, removed, doubled, exchanged or renamed."""
    content = [content]
    for _ in range(int(draws.integers(1, 4))):
        found = list(places(content))
        # Seldom the whole.
        container, key = (
            found[int(draws.integers(min(1, len(found) - 1), len(found)))] if draws.random() < 0.97 else found[0]
        )
        kind = int(draws.integers(6))
        if kind == 0 and container is not content:
            del container[key]
        elif kind == 1:
            other, place = found[int(draws.integers(len(found)))]
            container[key] = copy.deepcopy(other[place])  # which may hold the container
        elif kind == 2 and isinstance(container, dict):
            new = odd(draws)
            container[new if isinstance(new, str) else str(new)] = container.pop(key)
        elif kind == 3 and isinstance(container, list) and container is not content:
            container.insert(int(draws.integers(len(container) + 1)), container[key])
        else:
            container[key] = odd(draws)
    return content[0]


def change_json(path: Path, draws: np.random.Generator) -> None:
    """Changes values of a JSON file."""
    changed = change_values(json.loads(path.read_text(encoding="utf-8")), draws)
    path.write_text(json.dumps(changed, indent=2), encoding="utf-8")


def change_lines(path: Path, draws: np.random.Generator) -> None:
    """Changes values of a file with a JSON object in each line, or the lines' order and number."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    changed = change_values(records, draws)
    lines = [json.dumps(record) for record in changed] if isinstance(changed, list) else [json.dumps(changed)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def change_table(path: Path, draws: np.random.Generator) -> None:
    """Changes cells, rows or columns of a text file of rows."""
    text = path.read_text(encoding="utf-8")
    tab = "\t" in text
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tab else ","))
    for _ in range(int(draws.integers(1, 4))):
        if not rows:
            break
        row = int(draws.integers(len(rows)))
        column = int(draws.integers(max(1, len(rows[row]))))
        kind = int(draws.integers(7))
        if kind == 0:
            del rows[row]
        elif kind == 1:
            rows.insert(int(draws.integers(len(rows) + 1)), list(rows[row]))
        elif kind == 2:
            rows = [[cell for index, cell in enumerate(cells) if index != column] for cells in rows]
        elif kind == 3 and rows[row]:
            other = rows[int(draws.integers(len(rows)))]
            rows[row][column] = other[column % len(other)] if other else ""
        elif rows[row]:
            rows[row][column] = ODD_TEXTS[int(draws.integers(len(ODD_TEXTS)))]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter="\t" if tab else ",", lineterminator="\n").writerows(rows)
    path.write_text(buffer.getvalue(), encoding="utf-8")


def change_parquet(path: Path, draws: np.random.Generator) -> None:
    """Changes cells and columns of a Parquet file, as far as a column of them can be written."""
    columns = change_values(pyarrow.parquet.read_table(path).to_pydict(), draws)
    columns = columns if isinstance(columns, dict) else {"a": columns}
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except Exception:  # values of several types, columns of several lengths, and what Parquet has no types for
        texts = {ascii(name): [ascii(values)] for name, values in columns.items()}
        pyarrow.parquet.write_table(pyarrow.table(texts), path)


def change_pickle(path: Path, draws: np.random.Generator) -> None:
    """Changes values of a pickled dict, and the protocol."""

    def odd(draws: np.random.Generator) -> Any:
        others = (
            np.int64(3),
            np.float32(1.5),
            np.arange(3),
            b"a",
            b"\xff",
            (),
            (1, 2),
            {1},
            Path("a"),
            1 + 2j,
            bytearray(b"x"),
        )
        return others[int(draws.integers(len(others)))] if draws.random() < 0.4 else odd_value(draws)

    changed = change_values(pickle.loads(path.read_bytes()), draws, odd)
    path.write_bytes(pickle.dumps(changed, protocol=int(draws.integers(pickle.HIGHEST_PROTOCOL + 1))))


# -- Arrays and tensors ------------------------------------------------------------------------------------------------


def change_array(array: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """An array of another shape, type or content."""
    changes: tuple[Callable[[], np.ndarray], ...] = (
        lambda: array[: len(array) // 2] if array.ndim else array[None],
        lambda: np.concatenate([array, array]) if array.ndim else array,
        lambda: array[None],
        lambda: array.reshape(-1),
        lambda: array[:0] if array.ndim else array,
        lambda: np.asarray(array.reshape(-1)[0] if array.size else 0),
        lambda: array.astype(object),
        lambda: np.char.encode(array.astype("U4"), "utf-8") if array.dtype.kind in "USO" else array.astype(np.float16),
        lambda: array.astype("U2"),
        lambda: np.arange(array.size).reshape(array.shape),
        lambda: np.full(array.shape, (np.nan, np.inf, -1.0, 2.0, 1e300)[int(draws.integers(5))]),
        lambda: np.full(array.shape, 1 + 1j),
        lambda: np.full(array.shape, b"\xff\xfe"),
        lambda: np.full(array.shape, ODD_TEXTS[int(draws.integers(len(ODD_TEXTS)))]),
        lambda: np.array([odd_value(draws) for _ in range(max(1, array.size))] + [None], dtype=object)[:-1],
        lambda: np.zeros(array.shape, dtype=[("a", "f4"), ("b", "O")]),
        lambda: np.zeros(array.shape, dtype="M8[s]"),
        lambda: array.astype(array.dtype.newbyteorder(">")),
        lambda: np.asfortranarray(array),
    )  # fmt: skip
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return changes[int(draws.integers(len(changes)))]()
        except (TypeError, ValueError):  # of a kind that cannot become the other
            return np.zeros(array.shape)


def change_arrays(path: Path, draws: np.random.Generator) -> None:
    """Changes arrays of an .npy or .npz file."""
    loaded = np.load(path, allow_pickle=True)
    if isinstance(loaded, np.ndarray):
        np.save(path, change_array(np.array(loaded), draws))
        return
    arrays = {name: loaded[name] for name in loaded.files}
    for _ in range(int(draws.integers(1, 3))):
        if not arrays:
            break
        name = sorted(arrays)[int(draws.integers(len(arrays)))]
        if draws.random() < 0.15:
            del arrays[name]
        else:
            arrays[name] = change_array(arrays[name], draws)
    np.savez(path, **arrays)


def change_tensor(tensor: torch.Tensor, draws: np.random.Generator) -> torch.Tensor:
    """A tensor of another shape, type or content."""
    changes: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: tensor[: len(tensor) // 2] if tensor.ndim else tensor[None],
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        lambda: tensor[None],
        lambda: tensor.reshape(-1),
        lambda: tensor[:0] if tensor.ndim else tensor,
        lambda: tensor.reshape(-1)[0] if tensor.numel() else tensor,
        lambda: tensor.to(torch.bfloat16),
        lambda: tensor.to(torch.float64),
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.bool),
        lambda: tensor.to(torch.complex64),
        lambda: torch.full_like(tensor, (0, 1, 7)[int(draws.integers(3))]),
        lambda: tensor.float() * (float("nan"), float("inf"), -1.0, 1e30)[int(draws.integers(4))],
        lambda: tensor.flip(0) if tensor.ndim else tensor + 1,
    )
    return changes[int(draws.integers(len(changes)))]().contiguous()


def change_state_dict(path: Path, draws: np.random.Generator) -> None:
    """Changes tensors of a .safetensors file or a PyTorch checkpoint, and what is around them."""
    is_plain = path.suffix == ".safetensors"
    state = load_file(path) if is_plain else torch.load(path, weights_only=True)
    for _ in range(int(draws.integers(1, 4))):
        found = [(holder, key) for holder, key in places(state) if isinstance(holder[key], torch.Tensor)]
        if not found:
            break
        holder, key = found[int(draws.integers(len(found)))]
        kind = int(draws.integers(6))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(key, str):
            holder[(key + "x", "net." + key, key.partition(".")[2], "")[int(draws.integers(4))]] = holder.pop(key)
        else:
            holder[key] = change_tensor(holder[key], draws)
    if is_plain:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({name: value.clone() for name, value in state.items()}, path, metadata)
        return
    torch.save(change_values(state, draws) if draws.random() < 0.3 else state, path)


def change_content(path: Path, draws: np.random.Generator) -> None:
    """Changes what a file holds, by its suffix."""
    {
        ".csv": change_table,
        ".h5": change_store,
        ".json": change_json,
        ".jsonl": change_lines,
        ".npy": change_arrays,
        ".npz": change_arrays,
        ".parquet": change_parquet,
        ".pkl": change_pickle,
        ".pt": change_state_dict,
        ".safetensors": change_state_dict,
        ".txt": change_table,
    }[path.suffix](path, draws)
