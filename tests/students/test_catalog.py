"""Every student in the catalog does what every student must do."""

import copy
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from students import create_student, list_students
from students.card import load_student, save_student
from students.catalog import default_options, register
from students.families.passt import Passt
from students.frontend import LogMelConfig
from students.interface import Student, StudentConfig


@pytest.fixture(scope="module", params=list_students())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def student(name: str, as_if_trained) -> Student:
    torch.manual_seed(0)
    return as_if_trained(create_student(name, num_classes=3))


def different_clips(count: int, frames: int) -> torch.Tensor:
    """(count, 1, 128, frames): noise of another level and another slope over the bands in each clip."""
    level = torch.linspace(-1.0, 1.0, count).view(-1, 1, 1, 1)
    bands = torch.linspace(-1.0, 1.0, 128).view(-1, 1)
    return torch.randn(count, 1, 128, frames) + level + 2.0 * level * bands


def in_double_precision(student: Student) -> Student:
    """A copy in evaluation mode: what differs in float64 is no rounding, however untrained layers amplify it."""
    return copy.deepcopy(student).double().eval()


def test_trains_a_step_on_two_short_clips(student: Student) -> None:
    student = copy.deepcopy(student).train()  # running statistics change
    output = student(torch.randn(2, 1, 128, 32))
    assert output.logits.shape == (2, 3)
    assert output.embedding.shape == (2, student.embedding_dim)
    (output.logits.sum() + output.embedding.sum()).backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_a_batch_of_one_trains_and_equals_its_row_in_a_batch(student: Student) -> None:
    mel = different_clips(3, frames=61)
    assert copy.deepcopy(student).train()(mel[:1]).logits.isfinite().all()
    double, mel = in_double_precision(student), mel.double()
    with torch.inference_mode():
        logits = double(mel).logits
        torch.testing.assert_close(torch.cat([double(clip).logits for clip in mel.split(1)]), logits)
    assert not torch.allclose(logits[0], logits[1])


SMALLEST_OF_ITS_KIND = ("mn01", "dymn04", "mergenet16", "efficientnet_b2", "efficientnetv2_b2", "passt_tiny")


@pytest.mark.parametrize("frames", [32, 33, 250, 3000])
def test_takes_clips_of_any_length(student: Student, frames: int) -> None:
    if frames == 3000 and student.config.name in ("mn20", "mn30", "mn40", "passt_s"):
        pytest.skip("the same layers in a smaller student show it with less computing")
    student.eval()
    with torch.inference_mode():
        output = student(torch.randn(1, 1, 128, frames))
    assert output.logits.shape == (1, 3)
    assert output.logits.isfinite().all()


def test_one_class_keeps_both_axes(name: str) -> None:
    student = create_student(name, num_classes=1).eval()
    with torch.inference_mode():
        assert student(torch.randn(1, 1, 128, 32)).logits.shape == (1, 1)


def test_saved_and_loaded_it_gives_the_same(student: Student, tmp_path) -> None:
    frontend = LogMelConfig(hop_samples=500)
    save_student(tmp_path, student, ["a", "b", "c"], frontend, {"seed": 1})
    loaded = load_student(tmp_path)
    card = loaded.card
    assert loaded.config == card.config == student.config
    assert card.class_names == ("a", "b", "c")
    assert card.frontend == frontend
    assert card.provenance == {"seed": 1}
    assert not loaded.training
    mel = torch.randn(1, 1, 128, 40)
    student.eval()
    with torch.inference_mode():
        assert torch.equal(loaded(mel).logits, student(mel).logits)


def test_folded_it_gives_the_same(student: Student) -> None:
    double, mel = in_double_precision(student), different_clips(2, frames=61).double()
    fused = double.fuse()
    has_batch_norms = any("BatchNorm" in type(module).__name__ for module in double.modules())
    assert has_batch_norms == (not isinstance(student, Passt))
    assert not any("BatchNorm" in type(module).__name__ for module in fused.modules())
    with torch.inference_mode():
        for folded, expected in zip(fused(mel), double(mel), strict=True):
            # Untrained layers let maps grow to tens of thousands: a small value beside them has their rounding.
            tolerance = 1e-10 * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(folded, expected, atol=max(tolerance, 1e-7), rtol=1e-7)


def test_gives_maps_and_frames_on_request(student: Student) -> None:
    student.eval()
    mel = torch.randn(2, 1, 128, 70)
    if isinstance(student, Passt):  # its classifier takes the mean of two tokens, not a map
        with pytest.raises(ValueError, match="no feature maps"):
            student.feature_maps(mel)
        return
    with torch.inference_mode():
        maps, frames, output = student.feature_maps(mel), student.frame_logits(mel), student(mel)
        assert len(maps) > 5
        torch.testing.assert_close(maps[-1].mean((2, 3)), output.embedding)
        torch.testing.assert_close(student.classifier(maps[-1]), output.logits)
    assert all(earlier.shape[3] >= later.shape[3] for earlier, later in itertools.pairwise(maps))
    assert frames.shape == (2, 3, maps[-1].shape[3])
    assert frames.shape[2] > 1
    assert not torch.allclose(frames[..., 0], frames[..., 1])


def test_exports_without_a_graph_break(student: Student) -> None:
    if student.config.name not in SMALLEST_OF_ITS_KIND:
        pytest.skip("the same layers in a smaller student show it with less computing")
    student, mel = in_double_precision(student), different_clips(2, frames=50).double()
    exported = torch.export.export(student, (mel,), strict=True).module()  # strict: stops where torch.compile breaks
    with torch.inference_mode():
        logits = student(mel).logits
        torch.testing.assert_close(exported(mel).logits, logits)
    assert not torch.allclose(logits[0], logits[1])


def test_its_configuration_survives_json_and_builds_it_again(student: Student) -> None:
    config = StudentConfig(**json.loads(json.dumps(student.config.__dict__)))
    assert config == student.config
    assert default_options(config.name) | config.options == default_options(config.name)
    again = create_student(config.name, config.num_classes, **config.options)
    assert again.config == student.config
    assert [v.shape for v in again.state_dict().values()] == [v.shape for v in student.state_dict().values()]


def test_names_come_family_by_family_whichever_was_imported_first() -> None:
    """Families register themselves when they are imported, and here another order than the usual one is forced."""
    script = "import students.families.passt, students.families.mergenet; from students import list_students"
    shown = subprocess.run([sys.executable, "-c", f"{script}; print(*list_students())"], capture_output=True, text=True)
    assert shown.stdout.split() == list_students(), shown.stderr
    assert list_students()[:9] == ["mn01", "mn02", "mn04", "mn05", "mn10", "mn20", "mn30", "mn40", "dymn04"]
    assert list_students()[-4:] == ["efficientnet_b2", "efficientnetv2_b2", "passt_s", "passt_tiny"]


def test_a_name_belongs_to_one_family() -> None:
    @dataclass(frozen=True)
    class OtherOptions:
        depth: int = 1

    class Other(Student):
        Options = OtherOptions

    with pytest.raises(AssertionError, match="two families register 'mn01'"):
        register(Other, {"mn01": OtherOptions()})


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown student 'mn11'; choices: mn01, mn02"):
        create_student("mn11", num_classes=2)


def test_an_unknown_option_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'wdith' for mn01; choices: width, head, se_dims"):
        create_student("mn01", num_classes=2, wdith=1.0)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "10"])
def test_a_student_needs_a_class(num_classes: object) -> None:
    with pytest.raises(ValueError, match="at least one class"):
        create_student("mn01", num_classes=num_classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be above 0; found 0"),
        ({"width": "wide"}, "value of the wrong type"),
        ({"head": "conv"}, "unknown head 'conv'; choices: mlp, fully_convolutional, attention_pooling, linear"),
        ({"se_dims": ""}, "unknown se_dims"),
        ({"se_dims": "cc"}, "unknown se_dims"),
        ({"se_dims": "cx"}, "unknown se_dims 'cx'; choices: 'none' or any of 'c', 'f', 't'"),
        ({"se_agg": "median"}, "unknown se_agg 'median'; choices: max, avg, add, min"),
        ({"se_reduction": 0}, "se_reduction must be a whole number above 0"),
        ({"strides": (2, 2, 2)}, "strides must be four numbers"),
        ({"strides": (2, 2, 2, 3)}, "strides must be four numbers"),
        ({"strides": 2}, "value of the wrong type"),
        ({"n_mels": 0}, "n_mels must be a whole number above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_student("mn01", num_classes=2, **options)
