"""The folder that ``kd export`` writes: what ``export.json`` says, and checks before its model is run.

The format is described in docs/export.md. Writer and reader of ``export.json`` are both here.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.files import read_json
from audio_datasets.system.messages import brief, listed
from audio_datasets.tasks.label_space import LabelSpace

FORMAT = "kd-export"
FORMAT_VERSION = 1
EXPORT_FILE = "export.json"
MODEL_FILE = "model.onnx"
ALLOWED_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Whose operators a model may have: ONNX's own, and those that ONNX Runtime brings."""


@dataclass(frozen=True)
class ExportCard:
    """The contents of ``export.json``, checked when made. Raises ValueError for a value that is not allowed."""

    label_space: LabelSpace
    """The classes, in the order of the outputs, and which exclude each other."""
    sample_rate_hz: int
    window_seconds: float
    """Length of the windows that the student was evaluated with."""
    short_clips: str = "pad"
    """What fills a window where a clip is shorter: "pad" (silence) or "repeat" (the clip again)."""
    thresholds: tuple[float, ...] = ()
    """For each class, on the scores."""
    thresholds_from: str = "default"
    """"validation" if they were chosen on validation clips, else "default"."""
    input: str = "waveform"
    """"waveform" or "mel"."""
    batch: int | None = None
    """The size of a batch, if it is fixed."""
    embedding_dim: int = 1
    frontend: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "fp32"
    activations: str = "fp32"
    weights_fingerprint: str = ""
    """Of the PyTorch weights that were exported."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``bytes`` and ``sha256`` of each file in the folder."""

    def __post_init__(self) -> None:
        ranges = {"sample_rate_hz": (1_000, 1_000_000), "window_seconds": (0.001, 3600.0), "embedding_dim": (1, 2**20)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} must lie between {low} and {high}; found {brief(value)}")
        choices = {
            "short_clips": ("pad", "repeat"),
            "thresholds_from": ("validation", "default"),
            "input": ("waveform", "mel"),
            "batch": (None, 1),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; found {brief(getattr(self, name))}")
        numbers = all(isinstance(value, int | float) and 0.0 <= value <= 1.0 for value in self.thresholds)
        if len(self.thresholds) != len(self.class_names) or not numbers:
            raise ValueError(f"thresholds must be {len(self.class_names)} numbers from 0 to 1, one for each class")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.label_space.class_names

    def to_json(self) -> dict[str, Any]:
        """The contents of ``export.json``."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        label_space = values.pop("label_space")
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": MODEL_FILE,
            "class_names": list(label_space.class_names),
            "label_groups": label_space.to_json(),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ExportCard":
        """The reverse of ``to_json``. ValueError for anything else."""
        if content.get("format") != FORMAT:
            raise ValueError(f"it does not describe an export (its format is not {FORMAT!r})")
        if content.get("version") != FORMAT_VERSION:
            raise ValueError(f"it has format version {content.get('version')!r}; only {FORMAT_VERSION} can be read")
        known = {item.name for item in dataclasses.fields(cls)} - {"label_space"}
        try:
            label_space = LabelSpace.from_json(content["label_groups"])
            names = check_class_names(content["class_names"])
            values = {name: content[name] for name in known}
            values["thresholds"] = tuple(values["thresholds"])
            for name in ("frontend", "student", "provenance", "files"):
                if not isinstance(values[name], dict):
                    raise TypeError(f"{name} must be an object")
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error
        except TypeError as error:
            raise ValueError(f"it is damaged: {error}") from error
        if names != label_space.class_names:
            raise ValueError("label_groups have other classes than class_names")
        return cls(label_space, **values)

    def metadata(self) -> dict[str, str]:
        """What the model file says of itself, as JSON text by name; enough for it to be a teacher without the folder."""
        content = self.to_json()
        del content["files"], content["model"]
        return {
            **{name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()},
            "clip_seconds": json.dumps(self.window_seconds),
        }


def is_export_folder(path: str | Path) -> bool:
    """Whether a folder claims to be one that ``kd export`` wrote."""
    return (Path(path) / EXPORT_FILE).is_file()


def read_export(folder: str | Path, check_files: bool = True) -> ExportCard:
    """The card of an export folder whose model may be run.

    Raises ValueError, in one plain message, if a file is missing or was changed, or if the model could read files outside
    the folder or run code that is not ONNX Runtime's.
    """
    folder = Path(folder)
    path = folder / EXPORT_FILE
    content = read_json(path)
    try:
        if not isinstance(content, dict):
            raise ValueError(f"it must hold an object; found {brief(content)}")
        card = ExportCard.from_json(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if not (folder / MODEL_FILE).is_file():
        raise ValueError(f"{folder} is incomplete: {MODEL_FILE} is missing; export again")
    if check_files:
        _refuse_changes(folder, card)
    check_model_file(folder / MODEL_FILE)
    return card


def file_facts(path: Path) -> dict[str, Any]:
    """Size and digest of a file, as ``export.json`` lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _refuse_changes(folder: Path, card: ExportCard) -> None:
    if MODEL_FILE not in card.files:
        raise ValueError(f"{folder / EXPORT_FILE} cannot be used: it does not list {MODEL_FILE}")
    for name, facts in card.files.items():
        if PurePath(name).name != name:
            raise ValueError(
                f"{folder / EXPORT_FILE} cannot be used: it lists a file outside its folder, {brief(name)}"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing; export again")
        if name.endswith(".onnx") and file_facts(folder / name) != facts:
            raise ValueError(f"{folder / name} was changed after the export: its SHA-256 digest is not the listed one")


def check_model_file(path: Path) -> None:
    """Raises ValueError unless an ONNX file stands alone and has operators of ONNX and ONNX Runtime only.

    A model may name files with its weights, anywhere, and libraries with operators of its own; one from a stranger must not.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX models need onnx: pip install 'audio-kd[export]' ({error})") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors, of several types
        raise ValueError(f"{path} is damaged, or no ONNX model: {brief(str(error), 200)}") from error
    domains = {node.domain for node in _nodes(model.graph)} | {function.domain for function in model.functions}
    if strange := sorted(domains - set(ALLOWED_DOMAINS)):
        raise ValueError(f"{path} needs custom operators ({listed(strange)}), whose code is not part of ONNX Runtime")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            raise ValueError(f"{path} keeps weights in another file, {brief(location)}; an export is one file")


def _graphs(graph: Any) -> list[Any]:
    """A graph and those inside its nodes."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                found += _graphs(inner)
    return found


def _nodes(graph: Any) -> list[Any]:
    return [node for one in _graphs(graph) for node in one.node]


def _tensors(graph: Any) -> list[Any]:
    constants = [
        tensor
        for node in _nodes(graph)
        for attribute in node.attribute
        for tensor in ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors)
    ]
    return [tensor for one in _graphs(graph) for tensor in one.initializer] + constants
