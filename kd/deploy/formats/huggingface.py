"""A folder for Hugging Face's transformers: configuration, safetensors, and a modelling file of its own.

The modelling file is written from the traced network, operator by operator, so it needs neither this package nor a file for each
family of students, and its weights can be trained further. ``pipeline("audio-classification", trust_remote_code=True)`` runs it.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from audio_datasets.system.files import write_json, write_text
from kd.deploy.exporting.subject import Subject
from kd.deploy.formats.base import Converted, Format, Source
from kd.deploy.graph.network import ExportedNetwork

FOLDER = "huggingface"
CODE = "modeling_audio_tagger.py"
_INDENT = " " * 8


class _Named(nn.Module):
    """Waveform (B, N) -> logits (B, C), embedding (B, E)."""

    def __init__(self, network: ExportedNetwork) -> None:
        super().__init__()
        self.tagger = network

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.tagger(waveform)
        return found.logits, found.embedding


def convert(source: Source) -> Converted:
    subject, card = source.subject, source.card
    network = ExportedNetwork(subject.student, subject.frontend, subject.label_space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                _Named(network), (source.example(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
        except Exception as error:  # the tracer's errors have no common type
            raise ValueError(f"this student cannot be traced: {str(error).strip().partition(chr(10))[0]}") from error
    body, tensors, trained = source_code(program)
    folder = source.folder / FOLDER
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "trained": name in trained,
        }
        for name, tensor in tensors.items()
    }
    write_json(folder / "config.json", _config(source, facts))
    write_json(
        folder / "preprocessor_config.json",
        {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "padding_value": 0.0,
            "do_normalize": False,
            "return_attention_mask": True,
            "sampling_rate": card.sample_rate_hz,
        },
    )
    template = (
        resources.files("kd.deploy").joinpath("templates", "modeling_audio_tagger.jinja").read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    name = "".join(letter for letter in subject.name if letter.isprintable() and letter not in '"\\')
    values = {"name": name, "student": card.student.get("name", "a student"), "body": body}
    write_text(folder / CODE, environment.from_string(template).render(values))
    return Converted(folder, _in_transformers(folder), "pipeline('audio-classification', trust_remote_code=True)")


def refusal(subject: Subject) -> str:
    """Why the pipeline cannot show a student's scores."""
    if len(subject.label_space.groups) > 1:
        return f"it has {len(subject.label_space.groups)} groups of classes, and the pipeline one sigmoid or softmax for all"
    return ""


def _config(source: Source, tensors: dict[str, Any]) -> dict[str, Any]:
    card = source.card
    labels = dict(enumerate(card.class_names))
    exclusive = card.label_space.groups[0].exclusive
    module = CODE.removesuffix(".py")
    return {
        "architectures": ["AudioTagger"],
        "model_type": "kd-audio-tagger",
        "auto_map": {
            "AutoConfig": f"{module}.AudioTaggerConfig",
            "AutoModelForAudioClassification": f"{module}.AudioTagger",
        },
        "problem_type": "single_label_classification" if exclusive else "multi_label_classification",
        "id2label": {str(index): name for index, name in labels.items()},
        "label2id": {name: index for index, name in labels.items()},
        "sampling_rate": card.sample_rate_hz,
        "window_seconds": card.window_seconds,
        "short_clips": card.short_clips,
        "embedding_dim": card.embedding_dim,
        "dtype": "float32",
        "tensors": tensors,
    }


def source_code(program: torch.export.ExportedProgram) -> tuple[str, dict[str, torch.Tensor], set[str]]:
    """A traced network as the lines of a method, its tensors by name, and the names of those that are trained."""
    signature = program.graph_signature
    attributes = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    stored = {**program.state_dict, **program.constants}
    tensors, trained, lines = {}, set(), []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in attributes:
                lines.append(f"{node.name} = waveform")
                continue
            if not node.users:
                continue
            name = attributes[node.name].replace(".", "__")
            tensors[name] = stored[attributes[node.name]].detach().clone().contiguous()
            if node.name in signature.inputs_to_parameters and tensors[name].is_floating_point():
                trained.add(name)
            lines.append(f"{node.name} = self.{name}")
        elif node.op == "call_function":
            if not node.users and "assert" in str(node.target):
                continue
            lines.append(f"{node.name} = {_function(node.target)}({', '.join(_arguments(node))})")
        else:
            (outputs,) = node.args
            lines.append(f"return {', '.join(map(str, outputs))}")
    return "\n".join(_INDENT + line for line in lines), tensors, trained


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return f"torch.ops.{space}.{name}.{target._overloadname}".replace("torch.ops.aten.", "aten.")
    return f"operator.{target.__name__}"


def _arguments(node: torch.fx.Node) -> Iterator[str]:
    yield from map(_text, node.args)
    yield from (f"{name}={_text(value)}" for name, value in node.kwargs.items())


def _text(value: Any) -> str:
    """Python for an argument. Whatever was traced on one device is computed on that of the input."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, torch.device):
        return "device"
    return (
        str(value)
        if isinstance(value, torch.fx.Node | torch.dtype | torch.layout | torch.memory_format)
        else repr(value)
    )


def _in_transformers(folder: Path) -> Any:
    """The model as transformers loads it: windows (B, N) -> logits (B, C)."""
    import transformers

    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()):
        model = transformers.AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()

    def network(windows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(windows)).logits.numpy()

    return network


FORMAT = Format("huggingface", convert, ("transformers",), "pip install 'audio-kd[ast]'", refusal)
