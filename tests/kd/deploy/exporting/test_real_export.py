"""The public mn04, exported, on real recordings. Skipped where the reference data are absent."""

from pathlib import Path

import numpy as np
import pytest

from audio_datasets.stores.class_lists import read_class_names
from kd.deploy.exporting.clips import clips_at
from kd.deploy.exporting.parity import pytorch_network
from kd.deploy.exporting.runtime import ExportedModel
from kd.deploy.exporting.subject import read_subject
from kd.export import main


@pytest.mark.timeout(1200)  # tracing takes half a minute of processor time, and much longer on a busy machine
def test_mn04_with_int8_weights_agrees_on_real_clips_and_is_small(reference_dir: Path, tmp_path: Path) -> None:
    data = reference_dir / "data"
    weights, names = data / "checkpoints" / "mn04_as_mAP_432.pt", data / "labels" / "audioset_class_labels_indices.csv"
    if not weights.is_file() or not (data / "ESC-10").is_dir():
        pytest.skip(f"no reference data in {data}")
    out, spec = tmp_path / "mn04", f"mn04@{weights}"
    command = [spec, "--class-names", str(names), "--out", str(out), "--weights", "int8"]
    # The float32 graph is compared with PyTorch on the same clips, and refused if a logit differs by more than 1e-4.
    assert main([*command, "--clips", str(data / "ESC-10"), "--max-clips", "6"]) == 0
    assert (out / "model.onnx").stat().st_size < 1.5e6
    subject = read_subject(spec, read_class_names(names))
    exported, reference = (
        ExportedModel(out / "model.onnx", subject.frontend),
        pytorch_network(subject.student, subject.frontend),
    )
    clips = clips_at(data / "ESC-10", subject).first(6)
    pairs = [(reference(windows), exported(windows)[1]) for windows in map(clips.windows, range(6))]
    wanted, found = (np.concatenate(values) for values in zip(*pairs, strict=True))
    assert (wanted.argmax(1) == found.argmax(1)).mean() >= 5 / 6
    assert 1e-3 < np.abs(wanted - found).max() < 0.5
