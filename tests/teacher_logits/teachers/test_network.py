"""Networks of ours as teachers: from run folders and bare weights, and what their fingerprint covers."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from audio_datasets.stores.class_lists import read_class_names
from students import create_student
from students.card import load_student, save_student
from students.frontend import LogMel, LogMelConfig
from teacher_logits.teachers.loaders import knows_its_classes, load_teacher
from teacher_logits.teachers.network import StudentTeacher

CLASSES = ("hiss", "hum, low", "click")


def test_a_run_folder_is_a_teacher(run_folder):
    teacher = load_teacher(run_folder)
    assert (teacher.name, teacher.class_names, teacher.sample_rate_hz) == ("small", CLASSES, 32000)
    assert teacher.clip_seconds == 0.5
    assert not teacher.training
    waveform = 0.1 * torch.randn(2, 16000)
    student = load_student(run_folder)
    card = student.card
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
    with pytest.raises(ValueError, match="have no class names; give them with --class-names"):
        load_teacher(f"mn01@{path}")
    with pytest.raises(ValueError, match="class"):
        load_teacher(f"mn01@{path}", class_names=CLASSES[:2])
    assert not knows_its_classes(f"mn01@{path}")
    assert knows_its_classes(tmp_path)
    assert knows_its_classes("module:function")


def test_bare_weights_hear_through_the_published_front_end(tmp_path):
    student = create_student("mergenet16", num_classes=3)
    torch.save(student.state_dict(), tmp_path / "w.pt")
    teacher = load_teacher(f"mergenet16@{tmp_path / 'w.pt'}", class_names=CLASSES)
    assert teacher.sample_rate_hz == 16000
    waveform = 0.1 * torch.randn(2, 16000)
    wanted = student.eval()(LogMel(type(student).published_frontend())(waveform)).logits
    torch.testing.assert_close(teacher(waveform), wanted)


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


def test_a_public_checkpoint_gives_its_reference_logits(reference_dir):
    names = read_class_names(reference_dir / "data/labels/audioset_class_labels_indices.csv")
    teacher = load_teacher(f"mn04@{reference_dir / 'data/checkpoints/mn04_as_mAP_432.pt'}", class_names=names)
    reference = np.load(reference_dir / "reference/mn04_as_esc10_clips.npz")
    waveform = torch.from_numpy(reference["waveform_int16_32k"].astype(np.float32) / 32768)
    with torch.inference_mode():
        logits = teacher(waveform).numpy()
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-3)


@pytest.mark.parametrize(
    ("provenance", "link"),
    [
        ({"link": "softmax"}, "softmax"),
        ({"link": [["softmax", 2], ["sigmoid", 1]]}, [["softmax", 2], ["sigmoid", 1]]),
        ({"config": {"loss": {"loss": "bce"}}}, "sigmoid"),
        ({"config": {"loss": {"loss": "cross-entropy"}}}, None),  # of an older version: of which groups is not told
        ({}, None),
    ],
)
def test_the_card_of_a_student_tells_its_link(tmp_path, provenance, link):
    save_student(tmp_path, create_student("mn01", 3), CLASSES, LogMelConfig(), provenance)
    teacher = load_teacher(tmp_path)
    assert teacher.describe().get("link") == link
    other = StudentTeacher("other", CLASSES, load_student(tmp_path), LogMelConfig())
    assert teacher.fingerprint == other.fingerprint  # it changes no logit
    if link is None:
        teacher.tell_link("softmax")
        assert teacher.describe()["link"] == "softmax"
    if link != "softmax":
        with (
            pytest.raises(ValueError, match="was trained with the link .*; found --teacher-link sigmoid")
            if link != "sigmoid"
            else nullcontext()
        ):
            teacher.tell_link("sigmoid")
