"""Reports of runs: what is in them, that they stand by themselves, and how large they get."""

import base64
import io
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.files import read_json, write_json
from kd.report import LARGEST_REPORT_BYTES, audio_from, main, write_report
from kd.reports.run_reader import RunFolder
from kd.reports.sounds import audio_of_run, previews
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from students.profile import profile_student

Make = Callable[..., Path]
AWKWARD = ("<b>bold</b> & co", "$x$ | y_z", "雨音", 'id="x" url(#y)')


def titles(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def wave(seconds: float = 0.3, rate_hz: int = 22050) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.sin(np.arange(round(seconds * rate_hz)) / 9)[:, None] * [0.5, 0.2], rate_hz, format="WAV"
    )
    return buffer.getvalue()


def test_one_label_per_clip(make_run: Make) -> None:
    run = make_run("run", AWKWARD, folds=(1, 2), sharpness=0.8)
    page = write_report(run).read_text()
    text = (run / "report.md").read_text()
    assert titles(page) == [
        *("Parts of the run", "Learning curves", "Classes", "Confusions", "Most confident mistakes"),
        *("Student", "Command and versions", "Configuration"),
    ]
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == titles(page)
    headline = "80.5 ± 0.7%"
    assert headline in page
    assert f"**Accuracy: {headline}** mean and standard deviation over 2 folds; 80.0% to 81.0%" in text
    profile = profile_student(create_student("mn01", 4), 128, LogMelConfig().frames(5 * 32000))
    for shown in (page, text):
        assert f"{profile.parameters:,}" in shown
        assert f"{profile.macs:,}" in shown
        assert "kd finetune --task noises --data" in shown
        assert "2.14.1" in shown
        assert "loop.batch_size" in shown
    predictions = [np.load(run / f"fold{fold}" / "predictions.npz") for fold in (1, 2)]
    wrong = sum((part["logits"].argmax(1) != part["targets"].argmax(1)).sum() for part in predictions)
    assert wrong > 0
    cells = [
        int(found)
        for found in re.findall(r">(\d+)</text>", page[page.index("Confusion matrix of") :].partition("</svg>")[0])
    ]
    assert sum(cells) == 60


def test_charts_are_well_formed_and_names_are_text(make_run: Make) -> None:
    page = write_report(make_run("run", AWKWARD, one_label=False, folds=())).read_text()
    assert "<b>bold" not in page
    charts = re.findall("(?s)<svg .*?</svg>", page)
    assert len(charts) == 3 + len(AWKWARD)  # curves, bars, precision over recall; a small one for each class
    everything = ""
    ids: list[str] = []
    for chart in charts:
        root = ElementTree.fromstring(chart)
        everything += " ".join(root.itertext())
        ids += [element.get("id") for element in root.iter() if element.get("id")]
        for reference in re.findall(r"url\(#([^)]*)\)", " ".join(v for e in root.iter() for v in e.attrib.values())):
            assert reference in ids
    assert len(ids) == len(set(ids))
    for name in AWKWARD:
        assert name in everything
    assert "#010203" not in page
    assert "currentColor" in page


def test_nothing_in_a_page_comes_from_elsewhere(make_run: Make) -> None:
    page = write_report(make_run("run", devices=True), lambda clip_id: wave()).read_text()
    assert set(re.findall(r"""https?://[^"' <]*""", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for target in re.findall(r"""(?:src|href)="([^"]*)""", page):
        assert target.startswith(("#", "data:audio/mpeg;base64,"))
    assert "@import" not in page
    assert "Devices" in titles(page)
    assert "unseen devices" in page


def test_several_labels_per_clip(make_run: Make) -> None:
    run = make_run("run", AWKWARD, one_label=False, folds=(), seeds=(0, 1), masked=True)
    page = write_report(run).read_text()
    assert {"Precision, recall, thresholds", "Classes"} < set(titles(page))
    text = (run / "report.md").read_text()
    heading = next(line for line in text.splitlines() if line.startswith("| class") and "threshold" in line)
    columns = [cell.strip() for cell in heading.strip("|").split("|")]
    assert columns == [
        "class", "clips with it", "clips labelled", "AP", "± (parts)", "threshold", "F1", "F1 at 0.5",
    ]  # fmt: skip
    assert "cross-fitted" in text
    for folder in ("seed0", "seed1"):
        (run / folder / "validation_predictions.npz").write_bytes((run / folder / "predictions.npz").read_bytes())
    write_report(run)
    assert "highest F1 on the validation clips" in (run / "report.md").read_text()


def test_many_classes_stay_within_the_size(make_run: Make) -> None:
    names = [f"class number {index} with a rather long name" for index in range(527)]
    run = make_run("run", names, one_label=False, folds=(), clips=150, epochs=200)
    noise = np.random.Generator(np.random.Philox(0)).standard_normal((5 * 48000, 2)) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 48000, format="WAV")
    path = write_report(run, lambda clip_id: buffer.getvalue())
    page = path.read_text()
    assert len(page.encode()) < LARGEST_REPORT_BYTES
    assert page.count("<audio") > 0
    assert all(f"<td>{name}</td>" in page for name in names)
    assert "the 20 best of" in page
    assert "the 20 worst" in page


def test_mistakes_can_be_heard(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("run", sharpness=0.5)
    asked = []

    def audio(clip_id: str) -> bytes | None:
        asked.append(clip_id)
        return {0: wave(), 1: None, 2: b"no sound"}[len(asked) % 3]

    page = write_report(run, audio).read_text()
    players = re.findall('<audio controls preload="metadata" src="data:audio/mpeg;base64,([^"]*)"', page)
    assert len(asked) == len(set(asked)) == 12
    assert len(players) == 4
    sound, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(players[0])))
    assert rate_hz == 16000
    assert sound.ndim == 1
    assert 0.3 <= len(sound) / rate_hz < 0.5
    monkeypatch.setattr("kd.report.LARGEST_REPORT_BYTES", len(page))
    fewer = write_report(run, lambda clip_id: wave(5.0)).read_text()
    assert len(fewer) <= len(page)
    assert "<audio" not in write_report(run).read_text()


def test_a_report_is_the_same_every_time(make_run: Make) -> None:
    run = make_run("run", one_label=False)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_run_that_has_not_finished_is_told_of_so_far(make_run: Make) -> None:
    run = make_run("run")
    (run / "results.json").unlink()
    (run / "fold2" / "predictions.npz").unlink()
    text = write_report(run).with_suffix(".md").read_text()
    assert "This run has not finished" in text
    assert "## Classes" in text
    assert "mean and standard deviation" not in text


def test_a_pretraining_run(make_run: Make) -> None:
    run = make_run("run", folds=(), one_label=False)
    (run / "results.json").unlink()
    (run / "predictions.npz").unlink()
    write_json(run / "config.json", {"student": "mn01", "weights": "imagenet", "loop": {"epochs": 6}})
    text = write_report(run).with_suffix(".md").read_text()
    assert text.startswith("# mn01, pretrained\n\nrun: started from the weights imagenet\n")
    value = re.search(r"\*\*mAP: (0\.\d+)\*\* of the last validation", text)
    assert value is not None
    assert "no predictions of test clips" in text
    assert "The command of this run was not recorded." in text


def test_several_seeds_and_a_probe(make_run: Make) -> None:
    run = make_run("run", seeds=(0, 1, 2), folds=(1, 2), clips=20)
    make_run("run/probe", clips=20)
    text = write_report(run).with_suffix(".md").read_text()
    note = "mean and standard deviation over 3 seeds, each the mean of 2 folds; 80.5% to 84.5%"
    assert f"**Accuracy: 82.5 ± 2.0%** {note}" in text
    assert "**Linear probe: 80.5 ± 0.7%** accuracy, on frozen embeddings" in text
    assert "seed 2, fold 1" in text


def test_a_fine_tuned_passt(make_run: Make) -> None:
    run = make_run("run", folds=(), one_label=False)
    network = create_student("passt_tiny", 3)
    save_student(run, network, ("hiss", "hum, low", "click"), LogMelConfig())
    text = write_report(run).with_suffix(".md").read_text()
    assert text.startswith("# passt_tiny on noises")
    assert f"{sum(value.numel() for value in network.parameters()):,}" in text


def test_one_training_has_an_interval(make_run: Make) -> None:
    run = make_run("run", folds=(), clips=90)
    write_report(run)
    # Wilson, by hand: centre (0.8 + 3.84146 / 180) / (1 + 3.84146 / 90), reach 1.95996 √(0.16 / 90 + 3.84146 / 32400) / (same).
    assert "95% interval for 90 clips: 70.6% to 87.0%" in (run / "report.md").read_text()


def test_classes_without_clips_are_named(make_run: Make) -> None:
    run = make_run("run", folds=(), clips=2)
    text = write_report(run).with_suffix(".md").read_text()
    assert "Classes without test clips are left out of means: 'click'." in text


def test_the_command_finds_the_audio(
    make_run: Make, tmp_path: Path, tiny_store: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "sounds").mkdir()
    for index in range(60):
        (tmp_path / "sounds" / f"clip-{index:05d}.wav").write_bytes(wave())
    run = make_run("run", sharpness=0.5, sounds=tmp_path / "sounds", config={"data": str(tmp_path / "sounds")})
    assert main([str(run)]) == 0
    assert f"{run / 'report.html'} and report.md, 0." in capsys.readouterr().out
    assert (run / "report.html").read_text().count("<audio") == 12
    (tmp_path / "sounds").rename(tmp_path / "moved")
    assert main([str(run)]) == 0
    assert (run / "report.html").read_text().count("<audio") == 0
    assert "12 of 12 clips have no player: 12 are not there" in capsys.readouterr().out
    assert main([str(run), "--audio", str(tmp_path / "moved")]) == 0
    assert (run / "report.html").read_text().count("<audio") == 12
    assert main([str(run), "--audio", str(tiny_store)]) == 0
    assert (run / "report.html").read_text().count("<audio") == 0  # that store has other clips
    clips = ClipStore.open(tiny_store)
    sound, rate_hz = soundfile.read(io.BytesIO(audio_from(tiny_store)(clips.clip_id(3))))
    assert len(sound) / rate_hz == pytest.approx(clips.duration_seconds(3))


def write_sounds(folder: Path) -> Path:
    folder.mkdir()
    for index in range(60):
        (folder / f"clip-{index:05d}.wav").write_bytes(wave())
    return folder


def why_not(run: Path, **options: bool) -> str:
    """Why the first clip of a run has no player; "" if it has one."""
    return previews(["clip-00000"], audio_of_run(RunFolder.read(run), **options), 10**6).note.rpartition(": 1 ")[2]


def test_a_strangers_run_brings_no_other_sounds_of_this_disk_into_a_page(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine, theirs = write_sounds(tmp_path / "mine"), write_sounds(tmp_path / "theirs")
    run = make_run("outside", sharpness=0.5, sounds=mine, config={"data": str(theirs)})
    assert main([str(run)]) == 0
    why = "12 of 12 clips have no player: 12 lie outside of the run's data (--allow-outside takes them)"
    assert why in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert why.replace("'", "&#39;") in page
    assert "<audio" not in page
    assert main([str(run), "--allow-outside"]) == 0
    page = (run / "report.html").read_text()
    assert page.count("<audio") == 12
    assert "no player" not in page + capsys.readouterr().out

    up = make_run("up", sounds=theirs / ".." / "mine", config={"data": str(theirs)})
    assert why_not(up).startswith("lie outside of the run's data")
    # A run can call any folder its data, but it cannot know what is in a file of mine.
    unknown = make_run("unknown", sounds=mine, recorded=False, config={"data": "/"})
    assert why_not(unknown).startswith("are of a run that did not record what its files held")
    assert why_not(unknown, allow_outside=True) == ""
    guessed = make_run("guessed", sounds=mine, config={"data": "/"})
    assert why_not(guessed) == ""
    (mine / "clip-00000.wav").write_bytes(wave(0.4))
    assert why_not(guessed) == why_not(guessed, allow_outside=True) == "are not what the run heard"


def test_only_regular_files_of_bounded_size_are_played(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds = write_sounds(tmp_path / "sounds")
    run = make_run("run", sounds=sounds, config={"data": str(sounds)})
    with monkeypatch.context() as patch:
        patch.setattr("kd.reports.sounds.LARGEST_SOURCE_BYTES", len(wave()) - 1)
        assert why_not(run).startswith("are larger than")
        assert "1 are larger than" in previews(["clip-00000"], audio_from(sounds), 10**6).note
    (sounds / "clip-00000.wav").unlink()
    assert why_not(run) == "are not there"
    os.mkfifo(sounds / "clip-00000.wav")
    assert why_not(run) == why_not(run, allow_outside=True) == "are no regular files"
    (sounds / "clip-00000.wav").unlink()
    (sounds / "clip-00000.wav").symlink_to("/dev/zero")
    assert why_not(run) == "are no regular files"


def test_files_are_found_by_each_id_that_only_one_of_them_has(tmp_path: Path) -> None:
    for name in ("a/x.wav", "b/x.wav", "b/y.wav", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    audio = audio_from(tmp_path)
    assert audio("y") == audio("y.wav") == audio("b/y") == audio("b/y.wav") == b"b/y.wav"
    assert audio("a/x") == b"a/x.wav"
    assert audio("x") is None
    assert audio("notes") is None


@pytest.mark.parametrize("arguments", [("nowhere",), (".", "--audio", "nowhere.h5")])
def test_mistakes_of_users_get_one_message(
    make_run: Make, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(make_run("run"))
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "nowhere" in message
    assert "Traceback" not in message


def test_results_that_are_not_one_label_are_refused(make_run: Make, capsys: pytest.CaptureFixture) -> None:
    run = make_run("run", one_label=False, metric="accuracy")
    assert main([str(run)]) == 2
    assert "every clip must have exactly one class" in capsys.readouterr().err
    write_json(run / "results.json", {**read_json(run / "results.json"), "labels": "several"})
    assert main([str(run)]) == 0
