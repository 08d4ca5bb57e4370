"""The real mn04 exported in every form against PyTorch, on ESC-10's 400 clips: logits, first class, accuracy, file size.

    python benchmarks/export_agreement.py REFERENCE_DIR

REFERENCE_DIR holds ``data/checkpoints/mn04_as_mAP_432.pt``, ``data/labels`` and ``data/ESC-10``. Accuracy is that of choosing the
category whose AudioSet classes score highest (label map esc50_to_audioset). int8 activations are calibrated on 64 clips of fold 1
and judged on all clips, and on those of folds 2 to 5 alone.
"""

import copy
import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from audio_datasets.stores.class_lists import read_class_names, read_label_map
from audio_datasets.system.command import progress
from audio_datasets.system.text_tables import text_table
from kd.deploy.exporting.clips import clips_at
from kd.deploy.exporting.parity import pytorch_network
from kd.deploy.exporting.runtime import ExportedModel
from kd.deploy.exporting.subject import read_subject
from kd.deploy.graph.activations import quantize_activations
from kd.deploy.graph.network import ExportedNetwork, channels_of_weights
from kd.deploy.graph.onnx_file import onnx_model
from kd.deploy.graph.stored_weights import store_weights
from kd.evaluation.metrics import category_accuracy, category_columns


def main() -> int:
    data = Path(sys.argv[1]) / "data"
    names = read_class_names(data / "labels" / "audioset_class_labels_indices.csv")
    subject = read_subject(f"mn04@{data / 'checkpoints' / 'mn04_as_mAP_432.pt'}", names)
    clips = clips_at(data / "ESC-10", subject)
    with open(data / "ESC-10" / "meta" / "esc50.csv", encoding="utf-8") as file:
        listed = {row["filename"]: (row["category"], row["fold"]) for row in csv.DictReader(file)}
    categories, folds = zip(*(listed[Path(name).name] for name in clips.names), strict=True)
    network = ExportedNetwork(subject.student, subject.frontend, subject.label_space)
    graph = onnx_model(network, 0.1 * torch.randn(2, 64_000))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        calibration = [clips.windows(number)[:1] for number, fold in enumerate(folds) if fold == "1"][:64]
        forms, sizes = {"PyTorch": pytorch_network(subject.student, subject.frontend)}, {"PyTorch": 0}
        for weights, activations in (("fp32", "fp32"), ("fp16", "fp32"), ("int8", "fp32"), ("fp16", "int8")):
            model = copy.deepcopy(graph) if activations == "fp32" else quantize_activations(graph, calibration)
            store_weights(model, weights, channels_of_weights(network))
            path.write_bytes(model.SerializeToString())
            form = f"{weights} weights, {activations} activations"
            forms[form], sizes[form] = ExportedModel(path, subject.frontend), path.stat().st_size
    logits: dict[str, list[np.ndarray]] = {form: [] for form in forms}
    for number in progress(range(len(clips.names)), desc="compare", unit="clip"):
        windows = clips.windows(number)
        for form, run in forms.items():
            found = run(windows)
            logits[form].append((found[1] if isinstance(found, tuple) else found).mean(0))
    found = {form: np.stack(values) for form, values in logits.items()}
    columns = category_columns(names, categories, read_label_map("esc50_to_audioset"))
    other = [number for number, fold in enumerate(folds) if fold != "1"]
    rows = [("model", "MB", "largest difference", "same first class", "accuracy", "accuracy, folds 2-5")]
    for form, values in found.items():
        same = (values.argmax(1) == found["PyTorch"].argmax(1)).mean()
        kept = [categories[number] for number in other]
        rows.append(
            (
                form,
                f"{sizes[form] / 1e6:.2f}" if sizes[form] else "-",
                f"{np.abs(values - found['PyTorch']).max():.1e}",
                f"{same:.2%}",
                f"{category_accuracy(values, categories, columns):.2%}",
                f"{category_accuracy(values[other], kept, columns):.2%}",
            )
        )
    print(text_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
