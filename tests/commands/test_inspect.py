"""`kd inspect`: table, numbers and charts of a DyMN on tiny clips, the same every time, and wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audio_datasets.stores.clip_store import ClipStore
from kd.evaluate import main as evaluate
from kd.inspect_student import main
from students import create_student
from students.card import save_student
from students.frontend import LogMel, LogMelConfig

METHODS = 11


def saved_student(folder: Path, store: Path, name: str, **options: object) -> Path:
    """A student whose batch norms know the store's clips, so that its outputs differ from clip to clip."""
    clips, frontend = ClipStore.open(store), LogMelConfig()
    torch.manual_seed(0)
    student = create_student(name, len(clips.class_names), **options).train()
    for layer in student.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    waveforms = np.stack([clips.waveform(row, frontend.sample_rate_hz) for row in range(len(clips))])
    with torch.no_grad():
        student(LogMel(frontend)(torch.from_numpy(waveforms)))
    save_student(folder, student, clips.class_names, frontend, {"clip_seconds": 0.5})
    return folder


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_student(tmp_path_factory.mktemp("runs") / "run", tiny_store, "dymn04", width=0.2)


def inspect(out: Path, *arguments: object) -> dict:
    assert main([*map(str, arguments), "--workers", "0", "--out", str(out)]) == 0
    return json.loads((out / "inspect.json").read_text())


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_table_numbers_and_charts(
    run: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--tagger", run, "--clips", tiny_store, "--folds", 1, 3)
    assert evaluate([*map(str, wanted), "--workers", "0", "--out", str(tmp_path / "evaluated.json")]) == 0
    capsys.readouterr()
    found = inspect(tmp_path / "out", *wanted, "--batch-size", 7, "--repeats", 2, "--points", 50, "--blocks", 1, 15)
    printed = capsys.readouterr().out
    assert found["num_clips"] == 8
    expected = json.loads((tmp_path / "evaluated.json").read_text())["mAP"]
    assert found["untouched"]["mAP"] == pytest.approx(expected, abs=1e-6)
    rows = found["interventions"]
    assert len(rows) == METHODS
    for row in rows:
        assert len(row["mAP_of_draws"]) == (1 if row["method"] in ("uniform attention", "max attention") else 2)
        assert row["mAP"] == pytest.approx(np.mean(row["mAP_of_draws"]))
        assert row["difference"] == pytest.approx(row["mAP"] - expected, abs=1e-6)
    assert any(abs(row["difference"]) > 1e-3 for row in rows)
    assert [(place["block"], place["points"]) for place in found["dyrelu"]] == [(1, 50), (15, 50)]

    table = (tmp_path / "out" / "inspect.md").read_text()
    assert table.strip() in printed
    assert len(table.splitlines()) == METHODS + 4
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert f"| {rows[0]['mAP']:.4f} | " in table
    assert f"{rows[-1]['difference']:+.4f}" in table.splitlines()[-1]
    assert is_png(tmp_path / "out" / "inspect_map.png")
    assert is_png(tmp_path / "out" / "inspect_dyrelu.png")


def test_two_clips_are_enough_and_results_come_again(
    run: Path, make_tiny_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_tiny_store("two.h5", clips=2)
    arguments = ("--tagger", f"{run}", "--clips", store, "--repeats", 1, "--points", 10)
    first, again = (inspect(tmp_path / name, *arguments, "--batch-size", 2) for name in ("first", "again"))
    first["config"].pop("out"), again["config"].pop("out")
    assert first == again
    assert [place["block"] for place in first["dyrelu"]] == [1, 3, 13, 15]


def test_no_clip_is_left_alone(run: Path, make_tiny_store: Callable[..., Path], tmp_path: Path) -> None:
    store = make_tiny_store("three.h5", clips=3)
    found = inspect(tmp_path / "out", "--tagger", run, "--clips", store, "--repeats", 1, "--batch-size", 2)
    assert found["num_clips"] == 3


def test_weights_with_a_name(tiny_store: Path, tmp_path: Path) -> None:
    run = saved_student(tmp_path / "run", tiny_store, "dymn04")
    spec = f"dymn04@{run / 'student.safetensors'}"
    found = inspect(tmp_path / "out", "--tagger", spec, "--clips", tiny_store, "--clip-seconds", 0.5, "--repeats", 1,
                    "--split", "valid", "--points", 5)  # fmt: skip
    assert found["num_clips"] == 4


def test_a_variant_without_dynamic_relu(tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved_student(tmp_path / "run", tiny_store, "dymn04", width=0.2, dyrelu=False, coord_attention=False)
    found = inspect(tmp_path / "out", "--tagger", run, "--clips", tiny_store, "--repeats", 1)
    assert {row["part"] for row in found["interventions"]} == {"Dy-Conv"}
    assert "no dynamic ReLU" in capsys.readouterr().out
    assert not (tmp_path / "out" / "inspect_dyrelu.png").exists()


def test_wrong_input(
    run: Path,
    tiny_store: Path,
    make_tiny_store: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*arguments: object) -> str:
        assert main([*map(str, arguments), "--workers", "0", "--out", str(tmp_path / "out")]) == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        return shown

    mn = saved_student(tmp_path / "mn", tiny_store, "mn01")
    message = fails("--tagger", mn, "--clips", tiny_store)
    assert "only a DyMN" in message
    assert "found MN" in message
    static = saved_student(
        tmp_path / "static", tiny_store, "dymn04", width=0.2, dyconv=False, dyrelu=False, coord_attention=False
    )
    assert "no dynamic part" in fails("--tagger", static, "--clips", tiny_store)
    first = saved_student(tmp_path / "first", tiny_store, "dymn04", width=0.2, dynamic_blocks="first5")
    assert "choices: 1, 2, 3, 4, 5" in fails("--tagger", first, "--clips", tiny_store, "--blocks", 1, 15)
    assert "at least two" in fails("--tagger", run, "--clips", make_tiny_store("one.h5", clips=1))
    assert "absent.h5" in fails("--tagger", run, "--clips", tmp_path / "absent.h5")
    for flag in ("--batch-size", "--repeats", "--points"):
        with pytest.raises(SystemExit) as stopped:
            fails("--tagger", run, "--clips", tiny_store, flag, 0)
        assert stopped.value.code == 2
    assert not (tmp_path / "out").exists()
