"""The public mn04, exported, on real recordings. Skipped where the reference data are absent."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.stores.class_lists import read_class_names
from kd.deploy.exporting.clips import clips_at
from kd.deploy.exporting.parity import pytorch_network
from kd.deploy.exporting.runtime import ExportedModel
from kd.deploy.exporting.subject import read_subject
from kd.deploy.tagging.tagger import Tagger
from kd.deploy.web.onnxruntime_web import find_onnxruntime_web
from kd.deploy.web.page import write_page
from kd.export import main
from teacher_logits.teachers.export_folder import read_export


@pytest.fixture(scope="module")
def data(reference_dir: Path) -> Path:
    folder = reference_dir / "data"
    if not (folder / "checkpoints" / "mn04_as_mAP_432.pt").is_file() or not (folder / "ESC-10").is_dir():
        pytest.skip(f"no reference data in {folder}")
    return folder


@pytest.fixture(scope="module")
def mn04(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with int8 weights.

    The float32 graph is compared with PyTorch on the same clips, and refused if a logit differs by more than 1e-4.
    """
    out = tmp_path_factory.mktemp("exports") / "mn04"
    weights, names = data / "checkpoints" / "mn04_as_mAP_432.pt", data / "labels" / "audioset_class_labels_indices.csv"
    command = [f"mn04@{weights}", "--class-names", str(names), "--out", str(out), "--weights", "int8"]
    assert main([*command, "--clips", str(data / "ESC-10"), "--max-clips", "6"]) == 0
    return out


@pytest.mark.timeout(1200)  # tracing takes half a minute of processor time, and much longer on a busy machine
def test_mn04_with_int8_weights_agrees_on_real_clips_and_is_small(data: Path, mn04: Path) -> None:
    assert (mn04 / "model.onnx").stat().st_size < 1.5e6
    names = data / "labels" / "audioset_class_labels_indices.csv"
    spec = f"mn04@{data / 'checkpoints' / 'mn04_as_mAP_432.pt'}"
    subject = read_subject(spec, read_class_names(names))
    exported, reference = (
        ExportedModel(mn04 / "model.onnx", subject.frontend),
        pytorch_network(subject.student, subject.frontend),
    )
    clips = clips_at(data / "ESC-10", subject).first(6)
    pairs = [(reference(windows), exported(windows)[1]) for windows in map(clips.windows, range(6))]
    wanted, found = (np.concatenate(values) for values in zip(*pairs, strict=True))
    assert (wanted.argmax(1) == found.argmax(1)).mean() >= 5 / 6
    assert 1e-3 < np.abs(wanted - found).max() < 0.5


@pytest.mark.timeout(1200)
def test_the_page_of_mn04_tags_real_clips_as_python_does(
    data: Path, mn04: Path, onnxruntime_web: Path | None, drop_on_page: Callable
) -> None:
    try:
        runtime = find_onnxruntime_web(onnxruntime_web)
    except ValueError as error:
        pytest.skip(f"no onnxruntime-web: {error}")
    page = write_page(mn04, read_export(mn04), "mn04", runtime)
    assert page.stat().st_size < 8e6
    clips = sorted((data / "ESC-10" / "audio").glob("*.ogg"))[:40:20]
    rows, said = drop_on_page(page, clips)
    assert said == "Done."
    tagger = Tagger.load(mn04, threads=1)
    for row, clip in zip(rows, clips, strict=True):
        wanted = tagger(clip)
        assert list(row["scores"])[:5] == [name for name, _ in wanted.top(5)]
        assert np.abs([row["scores"][name] - score for name, score in wanted.top(527)]).max() < 1e-3
