"""What can be a teacher, what its fingerprint covers, and specs that must be refused."""

import numpy as np
import pytest
import torch

from audio_datasets.stores.class_lists import read_class_names
from students import create_student
from students.frontend import LogMel, LogMelConfig
from students.weights import load_student, save_student
from teacher_logits.teachers.base import StudentTeacher, Teacher, knows_its_classes, load_teacher

CLASSES = ("hiss", "hum, low", "click")


def test_a_run_folder_is_a_teacher(run_folder):
    teacher = load_teacher(run_folder)
    assert (teacher.name, teacher.class_names, teacher.sample_rate_hz) == ("small", CLASSES, 32000)
    assert teacher.clip_seconds == 0.5
    assert not teacher.training
    waveform = 0.1 * torch.randn(2, 16000)
    student, card = load_student(run_folder)
    expected = student(LogMel(card.frontend)(waveform)).logits
    torch.testing.assert_close(teacher(waveform), expected)
    assert load_teacher(run_folder, clip_seconds=3).clip_seconds == 3.0


def test_a_clip_is_judged_by_itself(run_folder):
    teacher = load_teacher(run_folder)
    waveform = 0.1 * torch.randn(3, 16000)
    with torch.inference_mode():
        torch.testing.assert_close(teacher(waveform)[1:2], teacher(waveform[1:2]), atol=1e-5, rtol=1e-5)


def test_bare_weights_need_class_names(tmp_path):
    student = create_student("mn01", num_classes=3)
    path = tmp_path / "weights of mine.pt"
    torch.save(student.state_dict(), path)
    teacher = load_teacher(f"mn01@{path}", class_names=CLASSES)
    assert (teacher.name, teacher.class_names, teacher.clip_seconds) == ("weights of mine", CLASSES, 10.0)
    with pytest.raises(ValueError, match="carry no class names; give them with --class-names"):
        load_teacher(f"mn01@{path}")
    with pytest.raises(ValueError, match="class"):
        load_teacher(f"mn01@{path}", class_names=CLASSES[:2])
    assert not knows_its_classes(f"mn01@{path}")
    assert knows_its_classes(tmp_path)
    assert knows_its_classes("module:function")


def test_functions_as_teachers(own_teachers):
    teacher = load_teacher(f"{own_teachers}:good")
    assert isinstance(teacher, Teacher)
    assert teacher(torch.rand(2, 4000)).shape == (2, 3)
    assert load_teacher(f"{own_teachers}:Statistics").fingerprint == teacher.fingerprint
    with pytest.raises(ValueError, match="returned Linear"):
        load_teacher(f"{own_teachers}:no_teacher")
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        load_teacher(f"{own_teachers}:nothing")
    with pytest.raises(ValueError, match="no module 'not_there_at_all'"):
        load_teacher("not_there_at_all:teacher")
    with pytest.raises(ValueError, match=f"no module '{own_teachers}.sub'|not a package"):
        load_teacher(f"{own_teachers}.sub:teacher")


def test_an_import_that_fails_inside_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import something_not_installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_not_installed"):
        load_teacher("needs_more:teacher")


@pytest.mark.parametrize("spec", ["mn01", "no/such/run", "clips.h5"])
def test_specs_of_no_known_form_are_refused(spec):
    with pytest.raises(ValueError, match=r"none of: a run folder .* NAME@WEIGHTS .* module:function"):
        load_teacher(spec)


def test_other_wrong_specs(tmp_path, run_folder):
    with pytest.raises(ValueError, match=r"holds no student: there is no student\.json"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match="no such weights file"):
        load_teacher(f"mn01@{tmp_path / 'none.pt'}", class_names=CLASSES)
    with pytest.raises(ValueError, match="unknown student 'mn99'"):
        load_teacher(f"mn99@{tmp_path / 'none.pt'}", class_names=CLASSES)
    with pytest.raises(ValueError, match="clip_seconds must be above 0"):
        load_teacher(run_folder, clip_seconds=0)


def test_the_fingerprint_covers_what_decides_the_logits_and_nothing_else(tmp_path):
    student = create_student("mn01", num_classes=3)

    def fingerprint(name="t", classes=CLASSES, frontend=LogMelConfig(), seconds=10.0):  # noqa: B008 - frozen
        return StudentTeacher(name, classes, student, frontend, seconds).fingerprint

    first = fingerprint()
    assert fingerprint(name="another name") == first
    others = [
        fingerprint(classes=("hum, low", "hiss", "click")),
        fingerprint(frontend=LogMelConfig(hop_samples=160)),
        fingerprint(seconds=5.0),
    ]
    with torch.no_grad():
        student.get_parameter("classifier.5.bias")[0] += 1e-6
    others.append(fingerprint())
    assert len({first, *others}) == 5

    # A saved and reloaded teacher is the same one.
    save_student(tmp_path / "run", student, CLASSES, LogMelConfig(), {})
    assert load_teacher(tmp_path / "run").fingerprint == others[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ()}, "empty"),
        ({"class_names": ("a", "a")}, "unique"),
        ({"sample_rate_hz": 0}, "sample_rate_hz"),
        ({"clip_seconds": -1.0}, "clip_seconds"),
    ],
)
def test_teachers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Teacher(**{"name": "t", "class_names": ("a",), "sample_rate_hz": 32000, **arguments})


def test_a_public_checkpoint_gives_its_reference_logits(reference_dir):
    names = read_class_names(reference_dir / "data/labels/audioset_class_labels_indices.csv")
    teacher = load_teacher(f"mn04@{reference_dir / 'data/checkpoints/mn04_as_mAP_432.pt'}", class_names=names)
    reference = np.load(reference_dir / "reference/mn04_as_esc10_clips.npz")
    waveform = torch.from_numpy(reference["waveform_int16_32k"].astype(np.float32) / 32768)
    with torch.inference_mode():
        logits = teacher(waveform).numpy()
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-3)
