"""Pickles read without being able to do anything but hold plain data."""

import collections
import contextlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_datasets.system.plain_pickle import read_plain_pickle

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_subnormal=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_of_every_protocol(tmp_path_factory: pytest.TempPathFactory, content: object, protocol: int) -> None:
    path = tmp_path_factory.mktemp("pickle") / "plain.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_plain_pickle(path)
    assert found == content
    assert type(found) is type(content)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_many_entries_and_numpy_s_whole_numbers(tmp_path: Path, protocol: int) -> None:
    content = {f"Y{index:011d}": index for index in range(3000)}
    content |= {str(kind): np.dtype(kind).type(-3 if kind[-2] == "i" else 250) for kind in ("<i8", "<i4", "<i2", "|u1")}
    content["big-endian"] = np.frombuffer(b"\x01\x02", ">i2")[0]
    path = tmp_path / "index.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_plain_pickle(path)
    assert found == content
    assert {type(value) for value in found.values()} == {int}


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


class State:
    pass


def attacks(touched: Path) -> dict[str, bytes]:
    command = f"touch {touched}"
    with_state = State()
    with_state.value = 1
    return {
        "a call": pickle.dumps({"a": Malicious(touched)}),
        "a call, old protocol": pickle.dumps({"a": Malicious(touched)}, protocol=0),
        "a call by INST": f"(S'{command}'\nios\nsystem\n.".encode(),
        "a call by OBJ": f"(cos\nsystem\nS'{command}'\no.".encode(),
        "a call by NEWOBJ": f"cos\nsystem\n(S'{command}'\nt\x81.".encode("latin1"),
        "eval": f'cbuiltins\neval\n(S\'__import__("os").system("{command}")\'\ntR.'.encode(),
        "a call of what a name resolves to": f"cnumpy._core.multiarray\nscalar\n(cos\nsystem\nS'{command}'\ntR.".encode(),
        "an object with state": pickle.dumps({"a": with_state}),
        "a persistent id": b"Psomething\n.",
        "an extension": b"\x82\x01.",
        "a name alone": b"cos\nsystem\n.",
        "an ordered dict": pickle.dumps(collections.OrderedDict(a=1)),
        "an array": pickle.dumps({"a": np.zeros(3)}),
        "a float of NumPy": pickle.dumps({"a": np.float64(1.5)}),
        "a huge memo": b"\x80\x04}r\xff\xff\xff\x7f",
        "a huge text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        "nothing": b"",
        "text": b"file,row\na.mp3,0\n",
        "no mark": b"\x80\x04}u.",
        "an unhashable key": b"\x80\x04}]K\x01s.",
        "two values": b"K\x01K\x02.",
        "a mark alone": b"(.",
        "a key that takes for ever to hash": b"}(" + doubled(b")", b"\x86") + b"tK\x01s.",
        "a key nested so deep that hashing it crashes": b"})" + b"\x85" * 200_000 + b"K\x01s.",
        "keys that collide": b"}("
        + b"".join(pickle.dumps(n * (2**61 - 1), 2)[2:-1] + b"N" for n in range(1, 99))
        + b"u.",
        "lists that no walk comes to the end of": b"(" + doubled(b"]", b"\x86") + b"l.",
        "a list nested too deep": b"]" * 200_000 + b"a" * 199_999 + b".",
        "a list in itself": b"]q\x00h\x00a.",
    }


def doubled(first: bytes, pair: bytes) -> bytes:
    """60 values, each the pair of the one before with itself; below them the mark that the last is to be taken with."""
    return first + b"q\x00" + b"".join(b"h%ch%c%sq%c" % (n, n, pair, n + 1) for n in range(60))


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_what_is_no_plain_data_is_refused_and_nothing_is_executed(tmp_path: Path, name: str) -> None:
    touched = tmp_path / "touched"
    path = tmp_path / "attack.pkl"
    path.write_bytes(attacks(touched)[name])
    with pytest.raises(ValueError, match="attack.pkl is not a pickle of plain data"):
        read_plain_pickle(path)
    assert not touched.exists()


def test_the_attacks_would_work(tmp_path: Path) -> None:
    for name in ("a call", "a call by INST", "a call by OBJ", "eval"):
        touched = tmp_path / name.replace(" ", "-")
        pickle.loads(attacks(touched)[name])
        assert touched.exists(), name


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_pickle_ends_in_a_plain_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = pickle.dumps({"a": np.int64(1), "b": [2, (3, "x")]}, data.draw(st.integers(0, pickle.HIGHEST_PROTOCOL)))
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("pickle") / "damaged.pkl"
    path.write_bytes(bytes(damaged) + data.draw(st.binary(max_size=8)))
    with contextlib.suppress(ValueError):
        read_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_array_of_objects_is_a_list(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "array.pkl"
    path.write_bytes(pickle.dumps(np.array(["a", "ü", None, b"c"], dtype=object), protocol=protocol))
    assert read_plain_pickle(path) == ["a", "ü", None, b"c"]
    for other in (np.array([["a"]], dtype=object), np.array(["a"]), np.arange(3)):
        path.write_bytes(pickle.dumps(other, protocol=protocol))
        with pytest.raises(ValueError, match="nothing was executed|does not need"):
            read_plain_pickle(path)
