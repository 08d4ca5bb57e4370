"""Targets of tests/robustness/fuzz.py: published logits, compact stores, class maps, and networks of others as teachers."""

import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from fuzz_damage import change_content, odd_value
from fuzz_stores import CLASSES, clip_stores
from fuzz_targets import TREE, Target, in_its_place, need, noise
from safetensors.torch import save_file

from audio_datasets.audio.views import ViewConfig
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.files import write_json
from audio_datasets.system.randomness import generator
from students import create_student
from teacher_logits.compact import CompactConfig, compact, write_compact
from teacher_logits.import_logits import ImportConfig, import_logits, read_index
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.class_mapping import MappedTeacher, read_class_map
from teacher_logits.teachers.loaders import load_teacher
from teacher_logits.verify import VerifyConfig, verify

# -- Published logits --------------------------------------------------------------------------------------------------


def published_files(folder: Path) -> list[Path]:
    """An array, three kinds of index to it, and the list of classes."""
    root = folder / TREE
    root.mkdir()
    names = [f"00/{name}.mp3" for name in ("Ya", "Yb", "Yc", "Yü")]
    np.save(root / "logits.npy", (5 * generator(5, "fuzz published").standard_normal((4, 3))).astype(np.float32))
    index = {name: row for row, name in enumerate(reversed(names))}
    write_json(root / "index.json", index)
    (root / "index.csv").write_text("".join(f"{name},{row}\n" for name, row in index.items()), encoding="utf-8")
    (root / "index.pkl").write_bytes(pickle.dumps({name: np.int64(row) for name, row in index.items()}, protocol=4))
    write_json(root / "names.json", list(CLASSES))
    return [root / name for name in ("logits.npy", "index.json", "index.csv", "index.pkl", "names.json")]


def read_published(path: Path, good: Path) -> None:
    """Neither has a checksum: each clip must have the row that the index gives it, and finite logits."""
    by_stem = bool(len(path.read_bytes()) % 2)
    tree = in_its_place(path, good)
    index = tree / (good.name if good.stem == "index" else "index.json")
    store = import_logits(
        ImportConfig(
            logits=tree / "logits.npy",
            index=index,
            out=tree / "out.h5",
            class_names=tree / "names.json",
            ids="stem" if by_stem else "name",
        )
    )
    array = np.load(tree / "logits.npy")
    names, rows = read_index(index, len(array))
    ids = [name.replace("\\", "/").rpartition("/")[2].removesuffix(".mp3") if by_stem else name for name in names]
    read = store.read([clip_id for clip_id in ids if store.rows([clip_id])[0] >= 0])
    need(len(store) == len(names) == len(set(store.clip_ids)), "clips are lost")
    need(np.isfinite(read).all(), "logits that are not finite")
    kept = [row for clip_id, row in zip(ids, rows, strict=True) if store.rows([clip_id])[0] >= 0]
    need(np.array_equal(read, array[kept].astype(np.float16).astype(np.float32)), "other logits")
    need(store.class_names == read_class_names(tree / "names.json"), "other classes")


# -- Compact stores and stores of views --------------------------------------------------------------------------------


def compact_stores(folder: Path) -> list[Path]:
    """Stores of the two largest logits: of clips as they are, and of two views of each; and the dense ones."""
    root = folder / TREE
    root.mkdir()
    clips = ClipStore.open(clip_stores(root)[0])
    files = []
    for name, views in (("clips", None), ("views", ViewConfig(views=2))):
        count = len(clips) * (views.views if views else 1)
        dense = root / f"{name}-dense.h5"
        write_logit_store(
            dense,
            clip_ids=clips.clip_ids,
            audio_digests=clips.audio_digests(np.arange(len(clips))),
            logit_blocks=[generator(5, "fuzz compact").standard_normal((count, len(CLASSES))).astype(np.float16)],
            class_names=CLASSES,
            teacher={
                "name": "t",
                "fingerprint": "0" * 32,
                **({"views": vars(views), "link": "sigmoid"} if views else {}),
            },
            clip_store_fingerprint=clips.fingerprint,
        )
        write_compact(LogitStore.open(dense), root / f"{name}-compact.h5", 2)
        files += [root / f"{name}-compact.h5", dense]
    return files


def read_compact(path: Path, good: Path) -> None:
    """`kd verify` accepts nothing but what was written, and a damaged dense store is not made a compact one."""
    tree = in_its_place(path, good)
    damaged, original = LogitStore.open(tree / good.name), LogitStore.open(good)
    if damaged.keep is None:
        verify(VerifyConfig(logits=(str(damaged.path),), clips=(tree / "pcm.h5",), classes=True, table=tree / "t.csv"))
        compact(CompactConfig(damaged.path, tree / "new.h5", keep=2))
        original = LogitStore.open(good.with_name(good.name.replace("dense", "compact")))
        damaged = LogitStore.open(tree / "new.h5")
    verify(VerifyConfig(logits=(str(damaged.path),), clips=(tree / "pcm.h5",)))
    need(damaged.num_views == original.num_views and damaged.keep == original.keep, "another storage")
    ids = ClipStore.open(tree / "pcm.h5").clip_ids
    for views in (None, np.full(len(ids), original.num_views - 1)):
        need(np.array_equal(damaged.read(ids, views), original.read(ids, views)), "other logits")


# -- Class maps --------------------------------------------------------------------------------------------------------


class ThreeClasses(Teacher):
    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        return waveform[:, :3]


def class_maps(folder: Path) -> list[Path]:
    text = 'teacher_class,class\na,hiss\nb,"hum, ""low"""\nc,"hum, ""low"""\nc,ключ\n'
    (folder / "map.csv").write_text(text, encoding="utf-8")
    return [folder / "map.csv"]


def read_mapping(path: Path, good: Path) -> None:
    """Every class is the maximum of what the map says."""
    class_map = read_class_map(path)
    for name, sources in class_map.items():
        need(name.strip() and sources and all(source.strip() for source in sources), "an empty entry")
    try:
        teacher = MappedTeacher(ThreeClasses("t", ("a", "b", "c"), sample_rate_hz=8000), CLASSES, class_map)
    except ValueError as error:  # said of the map by who has its path
        raise ValueError(f"{path}: {error}") from error
    waveform = torch.from_numpy(noise(3, 8)).reshape(2, 4)
    columns = {name: waveform[:, index] for index, name in enumerate("abc")}
    for index, name in enumerate(CLASSES):
        expected = torch.stack([columns[source] for source in class_map[name]]).amax(0)
        need(torch.equal(teacher(waveform)[:, index], expected), "another maximum")


# -- Networks of others ------------------------------------------------------------------------------------------------


def heard(teacher: Teacher, seconds: float = 0.3) -> None:
    """Bare weights have no checksum: a teacher that is accepted gives a logit for each class, or says why it cannot."""
    waveform = torch.from_numpy(np.stack([noise(number, round(seconds * 32000)) for number in range(2)]))
    logits = teacher(waveform)
    need(
        logits.shape == (2, len(teacher.class_names)) and logits.is_floating_point(), "logits of another shape or type"
    )


def passt_files(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    network = create_student("passt_s", 3, width=64, depth=1, heads=1, stride=16, time_positions=2)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    wrapped = {"state_dict": {f"net.{name}": value for name, value in state.items()}, "epoch": 3}
    torch.save(wrapped, folder / "wrapped.pt")
    save_file(state, folder / "plain.safetensors")
    return [folder / "wrapped.pt", folder / "plain.safetensors"]


def read_passt(path: Path, good: Path) -> None:
    heard(load_teacher(f"passt@{path}", CLASSES))


def onnx_files(folder: Path) -> list[Path]:
    """From waveforms and from log-mels, with metadata and without."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    metadata = {
        "class_names": json.dumps(CLASSES, ensure_ascii=False),
        "sample_rate_hz": "32000",
        "clip_seconds": "0.3",
        "frontend": json.dumps({"n_mels": 64}),
    }
    for name, shape, told in (
        ("waveform", ["batch", "samples"], metadata),
        ("mel", ["batch", 1, 64, "frames"], metadata),
        ("bare", ["batch", "samples"], {}),
    ):
        constants = {"grouping": np.array([0, 3, -1]), "last": np.array([2]), "scale": np.array(2, dtype=np.float32)}
        nodes = [
            helper.make_node("Mul", ["audio", "audio"], ["power"]),
            helper.make_node("Slice", ["power", *(["zero", "count", "axis"])], ["cut"]),
            helper.make_node("Reshape", ["cut", "grouping"], ["groups"]),
            helper.make_node("ReduceMean", ["groups", "last"], ["means"], keepdims=0),
            helper.make_node("Mul", ["means", "scale"], ["logits"]),
        ]
        constants |= {"zero": np.array([0]), "count": np.array([27]), "axis": np.array([len(shape) - 1])}
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("audio", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
            [numpy_helper.from_array(value, constant) for constant, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        helper.set_model_props(model, told)
        onnx.save(model, folder / f"{name}.onnx")
    return [folder / f"{name}.onnx" for name in ("waveform", "mel", "bare")]


def change_onnx(path: Path, draws: np.random.Generator) -> None:
    """Changes nodes, constants, shapes and metadata of a model."""
    import onnx
    from onnx import helper, numpy_helper

    def one_of(items):
        return items[int(draws.integers(len(items)))]

    model = onnx.load(path)
    graph = model.graph
    for _ in range(int(draws.integers(1, 4))):
        kind = int(draws.integers(8))
        if kind == 0:
            operators = ("Add", "Div", "Reshape", "MatMul", "Softmax", "Loop", "NoSuch", "Concat", "Resize", "Cast", "Gather", "Tile", "Exp")  # fmt: skip
            one_of(graph.node).op_type = one_of(operators)
        elif kind == 1:
            node = one_of(graph.node)
            if node.input:
                names = ("audio", "power", "cut", "groups", "logits", "grouping", "last", "scale", "", "nothing")
                node.input[int(draws.integers(len(node.input)))] = one_of(names)
        elif kind == 2 and graph.initializer:
            constant = one_of(graph.initializer)
            value = numpy_helper.to_array(constant)
            values = (value * 0, value - 1, value * 10**9, value.astype(np.float64), value[None], value.reshape(-1)[:0], value + 2**31)  # fmt: skip
            constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(one_of(values)), constant.name))
        elif kind == 3:
            shape = one_of([graph.input[0], graph.output[0]]).type.tensor_type.shape
            if shape.dim:
                one_of(shape.dim).dim_value = one_of((-1, 0, 1, 2, 3, 5, 64, 2**40))
        elif kind == 4:
            one_of([graph.input[0], graph.output[0]]).type.tensor_type.elem_type = int(draws.integers(0, 20))
        elif kind == 5:
            del one_of([graph.node, graph.initializer, graph.input, graph.output])[-1:]
            if not graph.node or not graph.input or not graph.output:
                break
        elif kind == 6:
            model.opset_import[0].version = one_of((0, 1, 7, 99, 2**40))
        else:
            props = {prop.key: prop.value for prop in model.metadata_props}
            key = one_of(["class_names", "sample_rate_hz", "clip_seconds", "frontend"])
            value = odd_value(draws)
            if draws.random() < 0.3 and key == "frontend":
                value = {one_of(["n_mels", "n_fft", "hop_samples", "sample_rate_hz", "fmin_hz", "a"]): value}
            props[key] = value if isinstance(value, str) and draws.random() < 0.5 else json.dumps(value)
            if draws.random() < 0.2:
                del props[key]
            del model.metadata_props[:]
            helper.set_model_props(
                model, {key: value.encode("utf-8", "replace").decode() for key, value in props.items()}
            )
    path.write_bytes(model.SerializeToString())


def read_onnx(path: Path, good: Path) -> None:
    teacher = load_teacher(str(path), CLASSES)
    if not 0.001 < teacher.clip_seconds < 10:
        return
    heard(teacher, teacher.clip_seconds * teacher.sample_rate_hz / 32000 if teacher.sample_rate_hz < 10**6 else 0.3)


def ast_files(folder: Path) -> list[Path]:
    """A small AST with random weights, as transformers keeps it."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    root = folder / TREE
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ASTConfig(
        **sizes, num_mel_bins=32, max_length=64, num_labels=3, id2label=dict(enumerate(CLASSES)), label2id={}
    )
    torch.manual_seed(0)
    ASTForAudioClassification(config).save_pretrained(root)
    ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(root)
    return [root / name for name in ("config.json", "preprocessor_config.json", "model.safetensors")]


def read_ast(path: Path, good: Path) -> None:
    tree = in_its_place(path, good)
    teacher = load_teacher(f"ast:{tree}")
    need(len(teacher.class_names) > 0, "no classes")
    heard(teacher)


TARGETS = {
    "published logits": Target(published_files, read_published, 8, change=change_content),
    "compact store": Target(compact_stores, read_compact, 5, change=change_content),
    "class map": Target(class_maps, read_mapping, 3, change=change_content),
    "passt": Target(passt_files, read_passt, 5, change=change_content),
}
if find_spec("onnx") and find_spec("onnxruntime"):
    TARGETS["onnx"] = Target(onnx_files, read_onnx, 6, change=change_onnx)
if find_spec("transformers"):
    TARGETS["ast"] = Target(ast_files, read_ast, 4, change=change_content)
