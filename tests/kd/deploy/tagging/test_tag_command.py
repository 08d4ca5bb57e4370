"""`kd tag` on files and folders: what it prints, writes and refuses."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from kd.deploy.tagging.tagger import Tagger
from kd.tag import main


@pytest.fixture(scope="module")
def tagger(tiny_run: Path) -> Tagger:
    return Tagger.load(tiny_run)


def test_the_table_has_the_top_classes_and_marks_those_at_their_thresholds(
    tiny_run: Path, tagger: Tagger, sounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sounds), "--tagger", str(tiny_run), "--top", "2", "--threshold", "0.4"]) == 0
    said = capsys.readouterr()
    heading, *lines = said.out.splitlines()
    assert heading.split() == ["file", "tags", "(*", "reaches", "its", "threshold)"]
    assert len(lines) == 5
    for line in lines:
        name = line.split("  ")[0]
        wanted = [f"{cls} {score:.3f}{'*' if score >= 0.4 else ''}" for cls, score in tagger(name).top(2)]
        assert [part.strip() for part in line.removeprefix(name).split("  ") if part.strip()] == wanted
    assert "*" in "".join(lines)
    assert "passed over 1 .txt" in said.err


def test_windows_make_a_time_line(tiny_run: Path, sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sounds / "stereo.wav"), "--tagger", str(tiny_run), "--windows"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[2:]] == [
        ["0.00", "to", "1.00", "s"],
        ["0.80", "to", "1.80", "s"],
        ["1.60", "to", "2.60", "s"],
    ]


def test_json_and_csv_have_every_score(
    tiny_run: Path, tagger: Tagger, sounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sounds / "long.ogg"
    tags = tagger(file)
    assert main([str(file), "--tagger", str(tiny_run), "--json", "--windows"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(file)
    assert found["duration_seconds"] == 4.4
    assert found["present"] == tags.present
    assert found["scores"] == pytest.approx(dict(tags.top(3)), abs=1e-5)
    assert len(found["windows"]) == 5
    assert found["windows"][2]["scores"] == pytest.approx(
        dict(zip(tagger.class_names, tags.windows[2].scores.tolist(), strict=True)), abs=1e-5
    )
    assert main([str(file), "--tagger", str(tiny_run), "--csv", "--windows"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 5
    assert float(rows[2]["start_seconds"]) == pytest.approx(tags.windows[2].start_seconds, abs=1e-3)
    assert [float(rows[2][name]) for name in tagger.class_names] == pytest.approx(tags.windows[2].scores, abs=1e-5)


def test_only_present_classes_if_asked(
    tiny_run: Path, tagger: Tagger, sounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sounds / "long.ogg"
    (_, first), (_, second) = tagger(file).top(2)
    between = str((first + second) / 2)
    command = [str(file), "--tagger", str(tiny_run), "--present", "--json", "--threshold", between]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["scores"]) == found["present"]
    assert len(found["present"]) == 1
    command[command.index("--json")] = "--windows"
    assert main([*command[:-1], "1"]) == 0
    assert "(no class reaches its threshold)" in capsys.readouterr().out


@pytest.mark.parametrize("windows", [False, True])
def test_embeddings_are_written(tiny_run: Path, tagger: Tagger, sounds: Path, tmp_path: Path, windows: bool) -> None:
    out, file = tmp_path / "new" / "e.npz", sounds / "long.ogg"
    command = [str(file), "--tagger", str(tiny_run), "--embeddings", str(out)]
    assert main(command + ["--windows"] * windows) == 0
    tags = tagger(file)
    with np.load(out) as found:
        wanted = np.stack([window.embedding for window in tags.windows]) if windows else tags.embedding[None]
        assert np.array_equal(found["embeddings"], wanted)
        assert found["files"].tolist() == [str(file)] * len(wanted)
        assert found["end_seconds"][-1] == pytest.approx(4.4)


def test_bad_files_are_listed_and_the_others_tagged(
    tiny_run: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF and so on")
    (tmp_path / "good.wav").symlink_to(sounds / "short.wav")
    (tmp_path / "nowhere.wav").symlink_to(tmp_path / "gone.wav")
    assert main([str(tmp_path), str(tmp_path / "good.wav"), "--tagger", str(tiny_run), "--json"]) == 2
    said = capsys.readouterr()
    assert [json.loads(line)["file"] for line in said.out.splitlines()] == [str(tmp_path / "good.wav")]
    assert "2 of 3 files could not be tagged" in said.err
    assert "bad.wav: audio is in no format that" in said.err
    assert "nowhere.wav: the symbolic link leads nowhere" in said.err
    assert "1 files are named more than once" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one audio file or folder"),
        (["nowhere.wav"], "no such file or folder: 'nowhere.wav'"),
        (["{empty}"], "no audio files in"),
        (["{file}", "--json", "--csv"], "--json and --csv exclude each other"),
        (["{file}", "--csv", "--top", "3"], "leave --top, --present and --threshold out"),
        (["{file}", "--top", "0"], "--top must be at least 1; found 0"),
        (["{file}", "--threshold", "1.5"], "--threshold must lie between 0 and 1; found 1.5"),
        (["{file}", "--embeddings", "e.csv"], "--embeddings must end in .npz; found e.csv"),
        (["{file}", "--class-names", "nowhere.txt"], "no such file: nowhere.txt"),
    ],
)
def test_a_wrong_command_ends_with_one_message(
    tiny_run: Path,
    sounds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = [argument.format(empty=tmp_path, file=sounds / "short.wav") for argument in arguments]
    try:
        code = main([*given, "--tagger", str(tiny_run)])
    except SystemExit as ended:  # of tyro, for values that the configuration refuses
        code = ended.code
    assert code == 2
    said = capsys.readouterr()
    assert message in " ".join(said.err.replace("│", " ").split())
    assert not said.out
