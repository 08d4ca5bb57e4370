"""What commands print where it cannot be shown or written, and names that a terminal or a spreadsheet would obey."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_datasets.command_line.terminal import SafeStream, printable, safe_output
from audio_datasets.pack import main as pack
from audio_datasets.system.command import run_command
from kd.deploy.tagging.output import TagText
from kd.report import main as report
from teacher_logits.verify import main as verify

sys.path.insert(0, str(Path(__file__).parent))
from test_workers import commands, place  # noqa: F401

# ruff: noqa: F811 (a fixture of the other file)


class Broken(io.StringIO):
    """Standard output whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("lost", ["ascii", "closed", "broken pipe", "full disk"])
def test_commands_go_on_without_a_terminal(
    lost: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In a folder whose name is not UTF-8, to a stream that cannot show it or cannot be written."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(place, odd)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    full = open("/dev/full", "w", encoding="utf-8", buffering=1) if Path("/dev/full").exists() else Broken()  # noqa: SIM115
    stream = {"ascii": ascii_only, "closed": None, "broken pipe": Broken(), "full disk": full}[lost]
    for name, (main, arguments) in commands(odd, odd, 0).items():
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            if lost in ("closed", "broken pipe"):
                patched.setattr(sys, "stderr", stream)
            assert main(arguments) == 0, name
        assert "Traceback" not in capsys.readouterr().err
    assert json.loads((odd / "run" / "student.json").read_text())["provenance"]["config"]["out"] == str(odd / "run")
    assert "mAP" in (odd / "results.json").read_text()
    if lost == "ascii":
        assert "caf\\udce9" in ascii_only.buffer.getvalue().decode("ascii")
        logits, clips = str(next((odd / "logits").glob("*.h5"))), str(odd / "clips.h5")
        assert verify(["--logits", logits, "--clips", clips, "--classes", "--table", str(odd / "t.csv")]) == 0
        assert report([str(odd / "run")]) == 0
        assert (odd / "run" / "report.html").stat().st_size > 1000


def test_a_lost_output_is_said_on_the_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert run_command(lambda: [print("result") for _ in range(3)]) == 0
    note = "note: standard output cannot be written (No space left on device); the command goes on without it\n"
    assert capsys.readouterr().err == note


def test_control_characters_reach_neither_terminal_nor_lists(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    for name in ("a", "b"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "sounds" / name / "x.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    (tmp_path / "sounds" / "a" / f"{evil}.wav").write_bytes(b"no audio")
    out = tmp_path / f"{evil}.h5"
    assert pack([str(tmp_path / "sounds"), "--out", str(out), "--workers", "1"]) == 0
    assert pack([str(tmp_path / evil), "--out", str(tmp_path / "c.h5")]) == 2
    assert verify(["--logits", str(tmp_path / evil), "--clips", str(out)]) == 2
    assert report([str(tmp_path / evil)]) == 2
    said = capsys.readouterr()
    listed = "".join(file.read_text() for file in tmp_path.glob("*.txt"))
    for text in (said.out, said.err.replace("\x1b[A", ""), listed):  # a progress bar moves the cursor up
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "\\x1b]0;owned\\x07" in said.err
    assert "\\x1b]0;owned\\x07" in listed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\n", "a\tb\n"),
        ("\rtrain: 3/4", "\rtrain: 3/4"),  # a progress bar
        ("\r      \r", "\r      \r"),
        ("\n\x1b[A", "\n\x1b[A"),
        ("\rname\rother", "\rname\\x0dother"),
        ("x\x1b[A", "x\\x1b[A"),
        ("\x9b31m é 🔑", "\\x9b31m é 🔑"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_streams_are_put_back(capsys: pytest.CaptureFixture) -> None:
    before = sys.stdout, sys.stderr
    with safe_output():
        outer = sys.stdout
        assert isinstance(outer, SafeStream)
        with safe_output():
            assert sys.stdout is outer
        print("x")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "x\n"


def test_class_names_are_no_formulas() -> None:
    text = TagText(('=HYPERLINK("x")', "@cat", "+1 dog", "-", "a-b"), "csv", False, None, False)
    heading = next(csv.reader([text.heading(10)]))
    assert heading[-5:] == ['\'=HYPERLINK("x")', "'@cat", "'+1 dog", "'-", "a-b"]
