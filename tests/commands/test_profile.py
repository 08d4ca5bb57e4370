"""`kd profile`: the numbers, the files whose size it tells, the chart, and wrong input."""

import json
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import pytest
import torch

from audio_datasets.system.command import parse
from kd.profile_students import ProfileConfig, distinct_students, main, quantize_weights
from students import create_student
from students.card import save_student
from students.families.mergenet import mergenet_frontend
from students.frontend import LogMelConfig
from students.profile import profile_student


def profiled(tmp_path: Path, *arguments: object) -> list[dict]:
    out = tmp_path / "profile.json"
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    return json.loads(out.read_text())["students"]


def test_tells_what_a_student_costs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ("--num-classes", 7, "--clip-seconds", 2.5, "--n-mels", 64, "--repeats", 1)
    (found,) = profiled(tmp_path, "--student", "mn01", "--student-options", "head=attention_pooling", *arguments)
    student = create_student("mn01", 7, head="attention_pooling", n_mels=64)
    expected = profile_student(student, n_mels=64, frames=250)
    assert found["parameters"] == expected.parameters
    assert found["macs"] == expected.macs
    assert found["activation_bytes"] == expected.activation_bytes
    assert found["seconds"] > 0
    assert found["fused_seconds"] > 0
    shown = capsys.readouterr().out
    assert "a clip of 2.5 s (64 mels × 250 frames), 7 classes; time: median of 1" in shown
    assert f"{expected.parameters:,}  " in shown


def test_a_file_has_the_size_that_it_tells(tmp_path: Path) -> None:
    (found,) = profiled(tmp_path, "--student", "mn04", "--num-classes", 3, "--clip-seconds", 1, "--repeats", 0)
    save_student(tmp_path / "run", create_student("mn04", 3), ["a", "b", "c"], LogMelConfig())
    assert found["fp32_bytes"] == (tmp_path / "run" / "student.safetensors").stat().st_size
    assert 0.50 < found["fp16_bytes"] / found["fp32_bytes"] < 0.55
    assert 0.25 < found["int8_bytes"] / found["fp32_bytes"] < 0.35
    assert found["seconds"] is None


def test_eight_bits_are_what_the_weights_can_be_read_from() -> None:
    state = create_student("mn01", 3).state_dict()
    state["zeros"] = torch.zeros(2, 5)
    quantized = quantize_weights(state)
    for name, value in state.items():
        if value.ndim < 2:
            assert torch.equal(quantized[name], value)
            continue
        assert quantized[name].dtype == torch.int8
        scale = quantized[f"{name}.scale"].view(-1, *[1] * (value.ndim - 1))
        assert scale.shape[0] == value.shape[0]
        assert ((quantized[name] * scale - value).abs() <= 0.5001 * scale).all(), name
    bits = sum(8 * value.nbytes for name, value in quantized.items() if state.get(name, value).ndim > 1)
    assert bits == 8 * sum(value.numel() for value in state.values() if value.ndim > 1)


def test_a_trained_student_is_profiled_with_its_own_front_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    student = create_student("mn01", 2, n_mels=40)
    save_student(tmp_path / "run", student, ["a", "b"], LogMelConfig(n_mels=40, hop_samples=640))
    arguments = ("--repeats", 0, "--clip-seconds", 4, "--num-classes", 3)
    found, _ = profiled(tmp_path, "--student", tmp_path / "run", "mn01", *arguments)
    assert found["macs"] == profile_student(student, n_mels=40, frames=200).macs
    shown = capsys.readouterr().out
    assert "a clip of 4 s (128 mels × 400 frames or 40 mels × 200 frames), 2 classes or 3 classes\n" in shown
    assert main(["--student", str(tmp_path / "run"), "--student-options", "width=1"]) == 2


def test_draws_a_chart_with_a_colour_for_each_family(tmp_path: Path) -> None:
    def families_drawn(*names: str) -> list[bool]:
        path = tmp_path / "chart.png"
        assert main(["--student", *names, "--repeats", "0", "--clip-seconds", "1", "--chart", str(path)]) == 0
        pixels = matplotlib.image.imread(path)[..., :3]
        colours = [matplotlib.colors.to_rgb(f"C{index}") for index in range(3)]
        return [bool((abs(pixels - colour).max(-1) < 0.01).sum() > 100) for colour in colours]

    assert families_drawn("mn01") == [True, False, False]
    assert families_drawn("mn01", "mn02", "mergenet32", "mergenet16") == [True, True, False]


def test_all_students_are_the_catalog_without_second_names() -> None:
    names = distinct_students()
    assert {"mn01", "dymn10", "mergenet_baseline", "efficientnet_b2", "efficientnetv2_b2"} <= set(names)
    assert not {"dymn_s", "dymn_m", "dymn_l"} & set(names)


def test_the_documented_arguments_give_mergenets_front_end() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "students.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("    --sample-rate-hz 16000"))
    arguments = " ".join(lines[first : first + 2]).split()
    assert parse(ProfileConfig, arguments, "kd profile").frontend == mergenet_frontend()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "mn11"], "unknown student 'mn11'; choices: mn01"),
        (["--student", "mn01", "--student-options", "wdith=1"], "unknown option 'wdith' for mn01"),
        (["--student", "mn01", "mergenet32", "--student-options", "split=16"], "unknown option 'split' for mn01"),
    ],
)
def test_a_wrong_name_is_one_plain_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip-seconds", "0"], "clip_seconds must be positive"),
        (["--repeats", "-1"], "repeats must be at least 0"),
        (["--threads", "0"], "threads at least 1"),
        (["--chart", "chart.txt"], ".png, .svg, .pdf"),
    ],
)
def test_a_wrong_value_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in message.split())  # the message may be broken into lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["--student", "mn01", "--device", "cuda"]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
