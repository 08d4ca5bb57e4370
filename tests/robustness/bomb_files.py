"""Files that are small on disk and huge inside. Each function writes one, in well under a second and with little memory."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import soundfile

HUGE = 4 * 10**9
"""Bytes that a deflated member becomes."""


# -- Audio -------------------------------------------------------------------------------------------------------------


def silent_flac(path: Path, hours: float = 24.0, claimed_samples: int | None = None, rate_hz: int = 44_100) -> Path:
    """A FLAC of 16-bit silence: frames of 65,535 samples, each of 16 bytes. ``claimed_samples`` is what its header says."""
    frames = round(hours * 3600 * rate_hz / 65_535)
    claimed = frames * 65_535 if claimed_samples is None else claimed_samples
    info = struct.pack(">HH6x", 65_535, 65_535) + (rate_hz << 44 | 15 << 36 | claimed).to_bytes(8) + bytes(16)
    with open(path, "wb") as file:
        file.write(b"fLaC\x80\x00\x00\x22" + info)
        for number in range(frames):
            head = b"\xff\xf8\x70\x08" + _coded_number(number) + b"\xff\xfe"
            frame = head + bytes([_crc(head, 8, 0x07)]) + bytes(3)
            file.write(frame + _crc(frame, 16, 0x8005).to_bytes(2))
    return path


def _coded_number(number: int) -> bytes:
    """As UTF-8 codes a character."""
    if number < 0x80:
        return bytes([number])
    if number < 0x800:
        return bytes([0xC0 | number >> 6, 0x80 | number & 0x3F])
    return bytes([0xE0 | number >> 12, 0x80 | number >> 6 & 0x3F, 0x80 | number & 0x3F])


_TABLES: dict[tuple[int, int], list[int]] = {}


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    if (bits, polynomial) not in _TABLES:
        table = []
        for value in range(256):
            value <<= bits - 8
            for _ in range(8):
                value = (value << 1) ^ (polynomial if value >> bits - 1 else 0)
                value &= (1 << bits) - 1
            table.append(value)
        _TABLES[bits, polynomial] = table
    table, crc = _TABLES[bits, polynomial], 0
    for byte in data:
        crc = (crc << 8 ^ table[crc >> bits - 8 ^ byte]) & (1 << bits) - 1
    return crc


def sparse_wav(path: Path, size: int = 4 * 2**30 - 2**20, rate_hz: int = 48_000) -> Path:
    """A WAV of 16-bit silence that takes a few kilobytes of the disk."""
    fields = (b"RIFF", size - 8, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, 2 * rate_hz, 2, 16, b"data", size - 44)
    path.write_bytes(struct.pack("<4sI4s4sIHHIIHH4sI", *fields))
    with open(path, "r+b") as file:
        file.truncate(size)
    return path


def long_mp3(path: Path, hours: float = 3.0, rate_hz: int = 32_000) -> Path:
    """An MP3 of noise at a constant bit rate: the frames of one minute, again and again."""
    noise = np.random.default_rng(3).standard_normal(60 * rate_hz) * 0.1
    content = io.BytesIO()
    settings = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": 0.9}
    soundfile.write(content, noise, rate_hz, **settings)
    frames = content.getvalue()
    with open(path, "wb") as file:
        for _ in range(round(hours * 60)):
            file.write(frames)
    return path


# -- Archives ----------------------------------------------------------------------------------------------------------


def _zeros(count: int) -> Iterator[bytes]:
    block = bytes(2**20)
    while count > 0:
        yield block[: min(count, len(block))]
        count -= len(block)


def _deflated_zeros(count: int) -> bytes:
    """The deflated bytes: zlib's work is done once for a block, and repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block, full = bytes(2**24), []
    full.append(packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH))  # starts afresh: can be repeated
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    blocks = count // len(block)
    full += [again] * (blocks - 1)
    end = packer.compress(bytes(count % len(block))) + packer.flush()
    return b"".join([*full, end])


def deflated_archive(path: Path, members: dict[str, bytes], huge: str, head: bytes = b"", size: int = HUGE) -> Path:
    """A zip archive in which the member ``huge`` is ``head`` and then ``size`` zeros."""
    first = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = first.compress(head) + first.flush(zlib.Z_FULL_FLUSH) + _deflated_zeros(size)
    crc = zlib.crc32(head)
    for block in _zeros(size):
        crc = zlib.crc32(block, crc)
    entries = [(name, content, content, zlib.crc32(content), 0, len(content)) for name, content in members.items()]
    entries.append((huge, None, data, crc, 8, len(head) + size))
    with open(path, "wb") as file:
        central = b""
        for name, _, stored, check, method, whole in entries:
            where, encoded = file.tell(), name.encode()
            sizes = (check, 0xFFFFFFFF, 0xFFFFFFFF)
            wide = struct.pack("<HHQQ", 1, 16, whole, len(stored))
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, method, 0, 33, *sizes, len(encoded), len(wide)))
            file.write(encoded + wide + stored)
            fields = (45, 45, 0, method, 0, 33, *sizes, len(encoded), len(wide), 0, 0, 0, 0, where)
            central += struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + encoded + wide
        where, count = file.tell(), len(entries)
        file.write(central)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(central), where, 0))
    return path


def deflated_npz(path: Path, name: str, others: dict[str, np.ndarray] | None = None, size: int = HUGE) -> Path:
    """Arrays of which one is of zeros, float64 (size / 8,)."""
    members = {}
    for other, array in (others or {}).items():
        content = io.BytesIO()
        np.save(content, array)
        members[f"{other}.npy"] = content.getvalue()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (size // 8,)})
    return deflated_archive(path, members, f"{name}.npy", head.getvalue(), size // 8 * 8)


def _torch_pickle(tensors: dict[str, tuple[str, int, tuple[int, ...], tuple[int, ...]]]) -> bytes:
    """The pickle of a state dict: name -> (key of the storage, its elements, shape, strides), all float32."""
    parts = [b"\x80\x02}("]

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    for name, (key, elements, shape, strides) in tensors.items():
        parts += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        parts += [text("storage"), b"ctorch\nFloatStorage\n", text(key), text("cpu"), number(elements), b"tQ"]
        parts += [number(0), b"(", *map(number, shape), b"t(", *map(number, strides), b"t"]
        parts += [b"\x89", b"ccollections\nOrderedDict\n)R", b"tR"]
    return b"".join([*parts, b"u."])


def deflated_checkpoint(path: Path, size: int = HUGE) -> Path:
    """A PyTorch checkpoint of one tensor of zeros, deflated."""
    pickled = _torch_pickle({"weight": ("0", size // 4, (size // 4,), (1,))})
    members = {"bomb/data.pkl": pickled, "bomb/byteorder": b"little", "bomb/version": b"3\n"}
    return deflated_archive(path, members, "bomb/data/0", size=size // 4 * 4)


def stored_checkpoint(path: Path, tensors: dict[str, tuple[str, int, tuple[int, ...], tuple[int, ...]]]) -> Path:
    """A PyTorch checkpoint of tensors with any shapes and strides, over storages of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("bomb/data.pkl", _torch_pickle(tensors))
        archive.writestr("bomb/byteorder", b"little")
        for key, elements in {key: elements for key, elements, *_ in tensors.values()}.items():
            archive.writestr(f"bomb/data/{key}", bytes(4 * elements))
        archive.writestr("bomb/version", b"3\n")
    return path


def slow_checkpoint(path: Path) -> Path:
    """A PyTorch checkpoint with a key that takes for ever to hash."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("bomb/data.pkl", slow_pickle())
        archive.writestr("bomb/byteorder", b"little")
        archive.writestr("bomb/version", b"3\n")
    return path


def sparse_safetensors(path: Path, size: int = HUGE) -> Path:
    """One tensor of zeros that takes no room on the disk."""
    size -= size % 4
    header = json.dumps({"weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + size)
    return path


# -- Pickles and JSON --------------------------------------------------------------------------------------------------


def slow_pickle() -> bytes:
    """A dict whose key is a tuple of two, each a tuple of two, … 60 deep: 2^60 steps to hash."""
    return b"\x80\x02}(K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x00u."


def repeating_pickle() -> bytes:
    """A dict whose value is a list of two, each a list of two, … 60 deep: its text would have 2^60 characters."""
    return b"\x80\x02}(X\x05\x00\x00\x00a.wav" + b"K\x01q\x000" + b"](h\x00h\x00eq\x000" * 60 + b"h\x00u."


def nested_json(depth: int = 100_000) -> str:
    return '{"a": ' + "[" * depth + "]" * depth + "}"


# -- HDF5 --------------------------------------------------------------------------------------------------------------


def clip_store_of_nothing(path: Path, clips: int = 10**9, layout: str = "unwritten") -> Path:
    """A clip store of 10^9 clips in our own layout, in a few kilobytes. Layouts: unwritten, chunked, sparse."""
    arrays = {
        "clip_id": ("S20", (clips,)),
        "clip_id_order": ("<i8", (clips,)),
        "offset": ("<i8", (clips + 1,)),
        "audio": ("<i2", (0,)),
        "target": ("u1", (clips, 1)),
        "audio_digest": ("u1", (clips, 16)),
    }
    attributes = {"format": "kd-clip-store", "format_version": 1, "class_names": '["a", "b", "c"]'}
    return _hollow_file(path, arrays, attributes | {"audio_kind": "pcm16", "sample_rate_hz": 32_000}, layout)


def logit_store_of_nothing(path: Path, clips: int = 10**9, layout: str = "unwritten") -> Path:
    """A logit store of 10^9 clips in a few kilobytes."""
    arrays = {
        "clip_id": ("S20", (clips,)),
        "clip_id_order": ("<i8", (clips,)),
        "audio_digest": ("u1", (clips, 16)),
        "logits": ("<f2", (clips, 3)),
    }
    texts = {"class_names": '["hiss", "hum, low", "click"]', "teacher": '{"name": "x", "link": "sigmoid"}'}
    texts |= {"clip_store_fingerprint": "0" * 32, "fingerprint": "0" * 32}
    return _hollow_file(path, arrays, {"format": "kd-logit-store", "format_version": 1, **texts}, layout)


def passt_store_of_nothing(path: Path, clips: int = 10**9) -> Path:
    """A file in the layout of PaSST and EfficientAT with 10^9 clips, in chunks that were never written."""
    with h5py.File(path, "w") as file:
        chunks = (2**16,)
        file.create_dataset("audio_name", (clips,), "S20", chunks=chunks)
        file.create_dataset("mp3", (clips,), h5py.vlen_dtype(np.uint8), chunks=chunks)
        file.create_dataset("target", (clips, 1), np.uint8, chunks=(2**16, 1))
    return path


def panns_of_nothing(path: Path, clips: int = 10**9) -> Path:
    """A file in PANNs' layout with 10^9 clips, in chunks that were never written."""
    with h5py.File(path, "w") as file:
        file.create_dataset("audio_name", (clips,), "S20", chunks=(2**16,))
        file.create_dataset("waveform", (clips, 320_000), np.int16, chunks=(1, 2**16))
        file.create_dataset("target", (clips, 3), bool, chunks=(2**16, 3))
        file.attrs["sample_rate"] = np.int32(32_000)
    return path


def panns_of_one_chunk(path: Path, samples: int = 15 * 10**8) -> Path:
    """One clip of 13 hours in a single deflated chunk of 3 GB (3 MB on disk)."""
    with h5py.File(path, "w") as file:
        file.create_dataset("audio_name", data=np.array([b"Yabcdefgh-0_.wav"], "S20"))
        waveform = file.create_dataset("waveform", (1, samples), np.int16, chunks=(1, samples), compression="gzip")
        adler = 1
        for block in _zeros(2 * samples):
            adler = zlib.adler32(block, adler)
        waveform.id.write_direct_chunk((0, 0), b"\x78\x9c" + _deflated_zeros(2 * samples) + adler.to_bytes(4))
        file.create_dataset("target", data=np.ones((1, 3), bool))
        file.attrs["sample_rate"] = np.int32(32_000)
    return path


def _hollow_file(path: Path, arrays: dict, attributes: dict, layout: str) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        for name, (dtype, shape) in arrays.items():
            chunks = None if layout != "chunked" or not shape[0] else (2**16, *shape[1:])
            if layout == "sparse":
                properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
                h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), properties)
            else:
                file.create_dataset(name, shape, dtype, chunks=chunks)
    return path


# -- ONNX --------------------------------------------------------------------------------------------------------------


def onnx_constant(path: Path, elements: int = 5 * 10**9, operator: str = "ConstantOfShape") -> Path:
    """A model of 300 bytes that makes a constant of 20 GB out of a shape: ConstantOfShape, Expand, Tile or Range."""
    from onnx import TensorProto, helper

    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [elements])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    start, end, step = (
        helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        for name, value in (("start", 0.0), ("end", float(elements)), ("step", 1.0))
    )
    inputs = {"ConstantOfShape": ["shape"], "Expand": ["one", "shape"], "Tile": ["one", "shape"]}
    inputs["Range"] = ["start", "end", "step"]
    nodes = [
        helper.make_node(operator, inputs[operator], ["big"]),
        helper.make_node("ReduceMean", ["big"], ["mean"], keepdims=0),
        helper.make_node("ReduceMean", ["x"], ["rows"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["rows", "rows", "rows"], ["three"], axis=1),
        helper.make_node("Add", ["three", "mean"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bomb",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16_000])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [shape, one, start, end, step],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    entries = {
        "class_names": json.dumps(["hiss", "hum, low", "click"]),
        "sample_rate_hz": "32000",
        "clip_seconds": "0.5",
    }
    for key, value in entries.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    return path


# -- Parquet -----------------------------------------------------------------------------------------------------------


def parquet_of_one_row(path: Path, rows: int = 10**9, text: str = "a" * 100) -> Path:
    """A list of 10^9 equal rows in a few kilobytes: run lengths of a dictionary's single entry."""
    import pyarrow
    import pyarrow.parquet

    at_once = 10**7
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(at_once, np.int32)), pyarrow.array([text]))
    table = pyarrow.table({"clip_id": column, "path": column, "labels": column})
    with pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd", store_schema=False) as writer:
        for _ in range(rows // at_once):
            writer.write_table(table, row_group_size=at_once)
    return path
