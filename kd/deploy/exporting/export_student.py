"""``kd export``: a student as a folder with a model file, its description and the proof that it agrees with PyTorch."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from audio_datasets.audio.bad_clips import BadClipError
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.system.files import folder_written_aside, write_json
from audio_datasets.system.messages import brief, listed
from audio_datasets.system.paths.outputs import check_output_folder
from kd.deploy.exporting.clips import ClipSet, clips_at, parity_clips, synthetic_clips, training_clips
from kd.deploy.exporting.pages import write_pages
from kd.deploy.exporting.parity import (
    Parity,
    compare,
    effect_of_rounding,
    lost_too_much,
    pytorch_network,
    refuse_float_difference,
)
from kd.deploy.exporting.runtime import ExportedModel, measure_costs
from kd.deploy.exporting.subject import Subject, read_subject
from kd.deploy.formats.catalog import FormatName, describe, refuse_formats, write_formats
from kd.deploy.graph.activations import quantize_activations
from kd.deploy.graph.network import ExportedNetwork, Input, channels_of_weights
from kd.deploy.graph.onnx_file import onnx_model, require_packages, set_metadata
from kd.deploy.graph.stored_weights import Weights, store_weights
from kd.deploy.web.onnxruntime_web import find_onnxruntime_web
from kd.deploy.web.page import PAGE_FILE, WEB_FOLDER, write_page, write_web_folder
from students.frontend import LogMel
from students.weights import weights_fingerprint
from teacher_logits.teachers.export_folder import (
    EXPORT_FILE,
    MODEL_FILE,
    ExportCard,
    file_facts,
    is_export_folder,
    read_export,
)

EXAMPLE_SECONDS = 2.0
_ABSOLUTE_PATH = re.compile(r"(?<![\w./:])/(?:[^\s'\":,/]+/)+([^\s'\":,/]+)")
CALIBRATION_CLIPS = 64
FLOAT_CLIPS = 16
"""Clips on which the float32 graph is compared, before its weights are stored in fewer bits."""


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained student as a folder that needs neither PyTorch nor this package."""

    student: Annotated[str, tyro.conf.Positional]
    """A run folder, or NAME@WEIGHTS (as mn04@mn04_as_mAP_432.pt)."""
    out: Path
    """Folder to write."""
    class_names: Path | None = None
    """Class list for weights that carry none (AudioSet's class_labels_indices.csv, or one name a line)."""
    input: Input = "waveform"
    """What the model takes: a waveform (the front end is part of the model), or our log-mel."""
    weights: Weights = "fp16"
    """How weights are stored. int8: those of linear layers and 1×1 convolutions; the others as fp16."""
    activations: Literal["fp32", "int8"] = "fp32"
    """int8: quantised convolutions and linear layers, for hardware that needs them; calibrated on training clips."""
    calibration_clips: Path | None = None
    """Clip store or folder of audio that calibrates int8 activations (the run's training clips if left out)."""
    batch: Literal[1] | None = None
    """1 fixes the batch, which makes DyMN faster; free if left out."""
    clips: Path | None = None
    """Clip store or folder of audio on which the export is compared with PyTorch (the run's validation clips if left out)."""
    format: tuple[FormatName, ...] = ()
    """Also write other formats, each run in its own runtime and compared: ort, litert, coreml, huggingface."""
    web: bool = False
    """Also write page.html: a page that opens from disk, tags dropped files and the microphone, and loads nothing."""
    web_folder: bool = False
    """Also write the same page as a folder for a static server, web/."""
    onnxruntime_web: Path | None = None
    """Folder or archive (from `npm pack onnxruntime-web`) with the page's runtime; fetched through npm if left out."""
    max_clips: int | None = None
    """Compare on at most so many clips (all if left out)."""
    allow_difference: bool = False
    """Write a model with fp16 or int8 numbers even if it loses more than it should."""
    replace: bool = False
    """Replace an export that is in the folder already."""

    def __post_init__(self) -> None:
        if self.max_clips is not None and self.max_clips < 1:
            raise ValueError(f"max_clips must be at least 1; found {self.max_clips}")
        if self.allow_difference and (self.weights, self.activations) == ("fp32", "fp32"):
            raise ValueError("--allow-difference is for fp16 and int8; a float32 export must agree with PyTorch")
        if self.calibration_clips is not None and self.activations == "fp32":
            raise ValueError("--calibration-clips would not be used without --activations int8; leave it out")
        if self.onnxruntime_web is not None and not (self.web or self.web_folder):
            raise ValueError("--onnxruntime-web would not be used without --web or --web-folder; leave it out")
        if (self.web or self.web_folder) and self.input != "waveform":
            raise ValueError(
                "a page needs a model with its front end; leave out --input mel, or --web and --web-folder"
            )


def export_student(config: ExportConfig) -> Path:
    """Exports, compares with PyTorch, and writes the folder; prints what it found.

    Raises ValueError for a student that cannot be exported, an export that disagrees with PyTorch, and a folder that holds
    something else.
    """
    require_packages()
    check_output_folder(config, config.out, lambda name: True)
    _check_target(config)
    runtime = find_onnxruntime_web(config.onnxruntime_web) if config.web or config.web_folder else None
    torch.set_flush_denormal(True)
    subject = read_subject(config.student, read_class_names(config.class_names) if config.class_names else None)
    refuse_formats(config.format, subject)
    clips = parity_clips(subject, config.clips).first(config.max_clips)
    calibrating = _calibration_clips(subject, config)
    print(f"exporting {subject.student.config.name} ({len(subject.label_space.class_names)} classes) to ONNX")
    network = ExportedNetwork(
        subject.student, subject.frontend, subject.label_space, takes=config.input, one_clip=config.batch == 1
    )
    model = onnx_model(network, _example(subject, config), fixed_length=subject.student.clip_seconds is not None)
    card = _card(subject, config)
    set_metadata(model, card.metadata())
    with folder_written_aside(config.out) as folder:
        path = folder / MODEL_FILE
        float_parity = _float_parity(subject, model, path, clips)
        if config.activations == "int8":
            model = quantize_activations(model, _calibration_inputs(subject, calibrating, path))
            set_metadata(model, card.metadata())
        store_weights(model, config.weights, channels_of_weights(network))
        path.write_bytes(model.SerializeToString())
        parity = _final_parity(subject, config, path, clips, float_parity)
        report = _report(subject, config, path, parity, float_parity)
        report["formats"] = write_formats(config.format, subject, card, folder, clips)
        write_pages(folder, subject, card, report)
        if config.web:
            write_page(folder, card, subject.name, runtime)
        if config.web_folder:
            write_web_folder(folder, card, subject.name, runtime)
        files = {file.name: file_facts(file) for file in sorted(folder.iterdir()) if file.is_file()}
        write_json(folder / EXPORT_FILE, card.to_json() | {"files": files})
        read_export(folder)
    print(_summary(config, report))
    for row in report["formats"].values():
        print(f"{config.out}/{describe(row)}")
    if config.web:
        print(f"{config.out / PAGE_FILE}: {(config.out / PAGE_FILE).stat().st_size / 1e6:.2f} MB, opens from disk")
    if config.web_folder:
        print(
            f"{config.out / WEB_FOLDER}: for a static server, as `python -m http.server -d {config.out / WEB_FOLDER}`"
        )
    return config.out


def _check_target(config: ExportConfig) -> None:
    out = config.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out must be a folder")
    if out.is_dir() and any(out.iterdir()):
        if not is_export_folder(out):
            raise ValueError(f"{out} holds something else than an export; give another --out")
        if not config.replace:
            raise ValueError(f"{out} holds an export already; give --replace, or another --out")


def _example(subject: Subject, config: ExportConfig) -> torch.Tensor:
    """An input of the kind that the model takes."""
    seconds = subject.window.seconds
    if subject.student.clip_seconds is None:  # any length will do
        seconds = min(EXAMPLE_SECONDS, seconds)
    samples = max(round(seconds * subject.frontend.sample_rate_hz), subject.frontend.minimum_samples)
    waveform = 0.1 * torch.randn(config.batch or 2, samples, generator=torch.Generator().manual_seed(0))
    return waveform if config.input == "waveform" else LogMel(subject.frontend)(waveform)


def _card(subject: Subject, config: ExportConfig) -> ExportCard:
    student = subject.student.config
    return ExportCard(
        label_space=subject.label_space,
        sample_rate_hz=subject.frontend.sample_rate_hz,
        window_seconds=subject.window.seconds,
        short_clips=subject.window.short_clips,
        thresholds=subject.thresholds,
        thresholds_from=subject.thresholds_from,
        input=config.input,
        batch=config.batch,
        embedding_dim=subject.student.embedding_dim,
        frontend=subject.frontend.to_dict(),
        student={"name": student.name, "num_classes": student.num_classes, "options": student.options},
        weights=config.weights,
        activations=config.activations,
        weights_fingerprint=weights_fingerprint(subject.student),
        provenance=without_local_paths(subject.provenance),
    )


def without_local_paths(value: Any) -> Any:
    """JSON with only the last part of each absolute path: an export is passed on, and where it was made is nobody's business."""
    if isinstance(value, dict):
        return {key: without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(inner) for inner in value]
    return _ABSOLUTE_PATH.sub(r"\1", value) if isinstance(value, str) else value


def _float_parity(subject: Subject, model: Any, path: Path, clips: ClipSet) -> Parity:
    """Compares the float32 graph with PyTorch, and refuses one that disagrees or is not finite at the extremes."""
    path.write_bytes(model.SerializeToString())
    exported = ExportedModel(path, subject.frontend)
    reference = pytorch_network(subject.student, subject.frontend)
    for found in (clips.first(FLOAT_CLIPS), _extremes(subject)):
        parity = compare(reference, lambda windows: exported(windows)[1], found, subject.label_space, "float32")
        refuse_float_difference(
            parity,
            "the float32 model",
            lambda found=found: effect_of_rounding(subject.student, subject.frontend, found),
        )
        if found.description != _EXTREMES:
            kept = parity
    return kept


_EXTREMES = "silence and other extremes"


def _extremes(subject: Subject) -> ClipSet:
    """Silence, denormal numbers, a click, full scale: whatever is heard, outputs are finite and agree."""
    samples = subject.window.samples
    noise = synthetic_clips(subject.window).windows(0)[0]
    click = np.zeros(samples, np.float32)
    click[samples // 2] = 1.0
    signals = {
        "silence": np.zeros(samples, np.float32),
        "denormal numbers": np.full(samples, 1e-40, np.float32),
        "a click": click,
        "full scale": np.sign(noise).astype(np.float32),
    }
    names = tuple(signals)
    return ClipSet(_EXTREMES, names, lambda number: signals[names[number]][None])


def _calibration_clips(subject: Subject, config: ExportConfig) -> ClipSet | None:
    """What calibrates int8 activations; None for float ones. ValueError if the run's training clips cannot be found."""
    if config.activations == "fp32":
        return None
    given = config.calibration_clips
    clips = training_clips(subject) if given is None else clips_at(given, subject)
    if clips is None:
        raise ValueError(
            "--activations int8 is calibrated on training clips, and the run's cannot be found; give some with --calibration-clips"
        )
    return clips.first(CALIBRATION_CLIPS)


def _calibration_inputs(subject: Subject, clips: ClipSet, path: Path) -> list[np.ndarray]:
    """Inputs of the model: the first window of each clip. Clips that cannot be decoded are counted and left out."""
    print(f"calibrating int8 activations on {clips.description}")
    model = ExportedModel(path, subject.frontend)
    inputs, bad = [], []
    for number, name in enumerate(clips.names):
        try:
            inputs.append(model.inputs(clips.windows(number)[:1]))
        except BadClipError:
            bad.append(name)
    if bad:
        print(f"left out {len(bad)} clips that cannot be decoded: {listed(bad)}")
    if not inputs:
        raise ValueError(f"none of {clips.description} can be decoded")
    return inputs


def _final_parity(subject: Subject, config: ExportConfig, path: Path, clips: ClipSet, float_parity: Parity) -> Parity:
    """Compares the file as it is with PyTorch. ValueError if it loses too much, unless that is allowed."""
    exported = ExportedModel(path, subject.frontend)
    reference = pytorch_network(subject.student, subject.frontend)
    parity = compare(reference, lambda windows: exported(windows)[1], clips, subject.label_space, "compare")
    if (config.weights, config.activations) == ("fp32", "fp32"):
        refuse_float_difference(
            parity, "the model", lambda: effect_of_rounding(subject.student, subject.frontend, clips)
        )
    lost = lost_too_much(parity, config.weights, config.activations)
    form = f"{config.weights} weights, {config.activations} activations"
    if lost and not config.allow_difference:
        raise ValueError(
            f"the model with {form} loses too much on {parity.description}: {lost}. Nothing was written; use more bits, or "
            "accept it with --allow-difference"
        )
    if lost:
        print(f"accepted with --allow-difference: {lost}")
    return parity


def _report(subject: Subject, config: ExportConfig, path: Path, parity: Parity, float_parity: Parity) -> dict[str, Any]:
    """The contents of ``parity.json``."""
    return {
        "weights": config.weights,
        "activations": config.activations,
        **parity.to_json(),
        "float_graph_difference": float_parity.largest_difference,
        "accepted_difference": config.allow_difference,
        "costs": measure_costs(path, subject.frontend, subject.window.samples),
    }


def _summary(config: ExportConfig, report: dict[str, Any]) -> str:
    costs = report["costs"]
    lines = [
        f"{config.out}: {costs['bytes'] / 1e6:.2f} MB, {1000 * costs['latency_seconds']['1']:.1f} ms for "
        f"{costs['window_seconds']:g} s with one thread",
        f"compared with PyTorch on {report['clips']}: logits differ by at most {report['largest_logit_difference']:.2g} "
        f"(float32 graph: {report['float_graph_difference']:.2g}), same first class in {report['top1_agreement']:.2%}",
    ]
    metrics = report["metrics"].get("drop", {})
    for name in ("accuracy", "mAP"):
        if name in metrics:
            found = report["metrics"]
            lines.append(f"{name}: {found['pytorch'][name]:.4f} in PyTorch, {found['exported'][name]:.4f} exported")
    if report["skipped_clips"]:
        lines.append(f"skipped {len(report['skipped_clips'])} clips: {brief(json.dumps(report['skipped_clips']), 300)}")
    return "\n".join(lines)
