"""`Tagger` says of files and waveforms what evaluation says of them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator

import kd
from audio_datasets.audio import codec
from audio_datasets.audio.codec import decode
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from kd.data.windows import Window
from kd.deploy.tagging.audio import cut_file
from kd.deploy.tagging.tagger import Tagger, UnusableFile
from kd.evaluation.predict import ClipEvaluator
from kd.run_folder.predictions import VALIDATION_FILE, write_predictions
from students import create_student, save_student
from students.card import load_student
from students.frontend import LogMel, LogMelConfig


@pytest.fixture(scope="module")
def tagger(tiny_run: Path) -> Tagger:
    return Tagger.load(tiny_run)


def files_of(sounds: Path) -> list[Path]:
    return sorted(path for path in sounds.rglob("*") if path.is_file() and path.suffix != ".txt")


@pytest.mark.parametrize(("exclusive", "short_clips"), [(False, "repeat"), (True, "pad")])
def test_tags_are_those_of_evaluation(
    make_tagging_run: Callable[..., Path], sounds: Path, tmp_path: Path, exclusive: bool, short_clips: str
) -> None:
    """Of files of several rates, channels, lengths and formats; all windows of each."""
    run = make_tagging_run("run", exclusive=exclusive, short_clips=short_clips)
    tagger, files, student = Tagger.load(run), files_of(sounds), load_student(run)
    store = tmp_path / "clips.h5"
    write_clip_store(store, [ClipRecord(path.name, path.read_bytes()) for path in files], tagger.class_names)
    clips, log_mel = ClipStore.open(store), LogMel(student.card.frontend)
    evaluator = ClipEvaluator(
        Accelerator(cpu=True),
        clips,
        np.arange(len(clips)),
        Window(16000, 1.0, short_clips),
        batch_size=2,
        workers=0,
        description="",
    )
    logits = evaluator.predict(lambda waveform: student(log_mel(waveform)).logits)
    wanted = torch.from_numpy(logits).softmax(1) if exclusive else torch.from_numpy(logits).sigmoid()
    embeddings = evaluator.predict(lambda waveform: student(log_mel(waveform)).embedding)
    rows = {clips.clip_id(row): row for row in range(len(clips))}
    for path, tags in tagger.tag_files(files):
        row = rows[path.name]
        assert np.abs(tags.logits - logits[row]).max() < 1e-4
        assert np.abs(tags.scores - wanted[row].numpy()).max() < 1e-5
        assert np.abs(tags.embedding - embeddings[row]).max() < 1e-3
        assert len(tags.windows) == evaluator.windows.clip_of.count(row)
        best = int(np.argmax(logits[row]))
        assert tags.top(1) == [(tagger.class_names[best], float(tags.scores[best]))]
        alone = tagger(path)
        assert np.array_equal(alone.scores, tags.scores), "tags of a file depend on the files before it"
    assert np.ptp(logits, axis=0).max() > 0.5, "the sounds are all alike, so this test shows nothing"


def test_windows_have_their_own_times_and_scores(tagger: Tagger, sounds: Path) -> None:
    tags = tagger(sounds / "stereo.wav")
    spans = [(round(window.start_seconds, 6), round(window.end_seconds, 6)) for window in tags.windows]
    assert spans == [(0.0, 1.0), (0.8, 1.8), (1.6, 2.6)]
    middle = decode(sounds / "stereo.wav", 16000, 0.8, 1.0)
    assert np.abs(tagger(middle, 16000).scores - tags.windows[1].scores).max() < 1e-6
    short = tagger(sounds / "short.wav")
    assert (short.windows[0].start_seconds, round(short.windows[0].end_seconds, 6)) == (0.0, 0.3)


def test_a_file_takes_one_pass_and_is_not_kept_whole(
    tagger: Tagger, sounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In formats that cannot be entered in the middle, too."""
    read, blocks = [], codec.mono_blocks

    def counted(reader: object, first: int, count: int | None) -> Iterator[np.ndarray]:
        for block in blocks(reader, first, count):
            read.append(len(block))
            yield block

    monkeypatch.setattr(codec, "mono_blocks", counted)
    for name in ("long.ogg", "speech.mp3"):
        clip = cut_file(sounds / name, tagger.window)
        read.clear()
        assert len(list(clip.waveforms)) > 3
        rate = soundfile.info(sounds / name).samplerate
        assert sum(read) < 1.1 * clip.duration_seconds * rate
        assert max(read) < 1.2 * rate


def test_waveforms_are_tagged_as_files_of_the_same_samples(tagger: Tagger, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    waveforms = (0.2 * rng.standard_normal((2, 50000))).astype(np.float32)
    wanted = []
    for number, waveform in enumerate(waveforms):
        soundfile.write(tmp_path / f"{number}.wav", waveform, 44100, "FLOAT")
        wanted.append(tagger(tmp_path / f"{number}.wav"))
    one, many = tagger(waveforms[0], sample_rate_hz=44100), tagger(torch.from_numpy(waveforms), 44100)
    assert isinstance(many, list)
    for found, expected in ((one, wanted[0]), *zip(many, wanted, strict=True)):
        assert np.abs(found.logits - expected.logits).max() < 1e-4
        assert [w.start_seconds for w in found.windows] == [w.start_seconds for w in expected.windows]
    whole_numbers = np.round(waveforms[0] * 32768).astype(np.int16)
    assert np.abs(tagger(whole_numbers, 44100).scores - one.scores).max() < 1e-2


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros(100, np.float32), None, "needs its rate"),
        (np.zeros(100, np.float32), 0, "sample_rate_hz must be a whole number from 1000 to 1000000; found 0"),
        (np.zeros(100, np.float32), 44100.5, "must be a whole number"),
        (np.zeros((0,), np.float32), 16000, r"with samples; found \(0,\)"),
        (np.zeros((1, 2, 3), np.float32), 16000, r"found \(1, 2, 3\)"),
        (np.zeros(100, np.int32), 16000, "or int16; found int32"),
        (np.full(100, np.nan), 16000, "NaN or infinite"),
    ],
)
def test_waveforms_that_make_no_sense_are_refused(tagger: Tagger, waveform, rate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tagger(waveform, rate)


def test_bad_files_are_told_and_the_others_tagged(tagger: Tagger, sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    shutil.copy(sounds / "short.wav", tmp_path / "good.wav")
    soundfile.write(tmp_path / "nan.wav", np.full(40000, np.nan, np.float32), 16000, "FLOAT")
    names = ["empty.wav", "missing.wav", "good.wav", "nan.wav"]
    found = {path.name: tags for path, tags in tagger.tag_files([tmp_path / name for name in names])}
    assert list(found) == names
    assert found["empty.wav"] == UnusableFile("audio is empty: 0 bytes")
    assert found["missing.wav"] == UnusableFile("No such file or directory")
    assert found["nan.wav"] == UnusableFile("audio holds NaN or infinite samples")
    assert found["good.wav"].scores.shape == (3,)


def test_thresholds_are_those_of_the_runs_validation_clips(make_tagging_run: Callable[..., Path], sounds: Path) -> None:
    run = make_tagging_run("run")
    names = Tagger.load(run).class_names
    logits = np.linspace(-4, 4, 20)[:, None] + np.zeros((1, 3))
    write_predictions(
        run / VALIDATION_FILE,
        clip_ids=[f"clip {number}" for number in range(20)],
        logits=logits,
        targets=(logits > [2.0, 0.0, -2.0]).astype(np.float32),
        mask=np.ones((20, 3), bool),
        class_names=names,
        columns={"source": ["clip.wav"] * 20},
    )
    tagger = Tagger.load(run)
    assert tagger.model.thresholds_from == "validation"
    low, high = 1 / (1 + np.exp([-1.5, 0.5, 2.5])), 1 / (1 + np.exp([-2.5, -0.5, 1.5]))
    assert np.all((tagger.thresholds > low) & (tagger.thresholds < high))
    tags = tagger(sounds / "short.wav")
    assert set(tags.present) == {name for name, score, least in zip(names, tags.scores, tagger.thresholds, strict=True) if score >= least}  # fmt: skip
    assert np.all(Tagger.load(run, threshold=0.0).thresholds == 0)
    assert len(Tagger.load(run, threshold=0.0)(sounds / "short.wav").present) == 3


def test_the_window_may_be_another(tiny_run: Path, sounds: Path) -> None:
    tags = Tagger.load(tiny_run, window_seconds=0.5)(sounds / "stereo.wav")
    assert len(tags.windows) == 6
    assert round(tags.windows[1].start_seconds, 6) == 0.42
    with pytest.raises(ValueError, match="a window lasts more than 0"):
        Tagger.load(tiny_run, window_seconds=0.0)


def test_bare_weights_get_their_classes_from_the_list_beside_them_or_numbers(
    tmp_path: Path, sounds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = create_student("mn01", 3)
    save_student(tmp_path / "run", student, ["a", "b", "c"], LogMelConfig())
    weights = tmp_path / "run" / "student.safetensors"
    numbered = Tagger.load(f"mn01@{weights}")
    assert numbered.class_names == ("class 0", "class 1", "class 2")
    assert "classes are numbered" in caplog.text
    (weights.parent / "class_labels_indices.csv").write_text(
        "index,mid,display_name\n0,/m/0,Dog\n1,/m/1,Cat\n2,/m/2,Cow\n"
    )
    assert Tagger.load(f"mn01@{weights}").class_names == ("Dog", "Cat", "Cow")
    given = Tagger.load(f"mn01@{weights}", class_names=["x", "y", "z"])
    assert given.class_names == ("x", "y", "z")
    assert np.allclose(given(sounds / "short.wav").logits, numbered(sounds / "short.wav").logits)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("nowhere", {}, "'nowhere' is none of: a run folder"),
        ("mn01@nowhere.pt", {}, "no such weights file: nowhere.pt"),
        ("{run}", {"class_names": ["a"]}, "the run knows its classes"),
        ("{run}", {"threads": 0}, "threads must be at least 1; found 0"),
        ("{run}", {"device": "abacus"}, "device 'abacus' cannot be used"),
        ("{run}", {"threshold": 2.0}, "a threshold lies between 0 and 1; found 2"),
    ],
)
def test_a_wrong_model_is_refused_in_one_line(tiny_run: Path, spec: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Tagger.load(spec.format(run=tiny_run), **options)
    assert "\n" not in str(caught.value)


def test_importing_kd_is_light_and_gives_the_tagger() -> None:
    assert kd.Tagger is Tagger
    with pytest.raises(AttributeError, match="no attribute 'Tiger'"):
        _ = kd.Tiger
