"""Inputs that change between stop and resume, or while a command uses them, always to content of the same name, size and time."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio_datasets import pack as packing
from audio_datasets import pack_sources
from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.system.files import read_json
from audio_datasets.system.paths import contents
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.cache import cache_path
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd.data.windows import EvaluationWindows
from kd.evaluate import main as evaluate
from kd.finetune import main as finetune
from kd.pretrain import main as pretrain
from kd.stages import cross_validation, pretraining
from kd.stages.cross_validation import CrossValidation
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits import precompute
from teacher_logits.precompute import main as teach
from teacher_logits.verify import main as verify

FRONTEND = ["--n-mels", "32", "--hop-samples", "640"]
SHORT = [
    "--student",
    "mn01",
    "--epochs",
    "1",
    "--clip-seconds",
    "0.2",
    "--workers",
    "0",
    "--batch-size",
    "4",
    *FRONTEND,
]
CLASSES = ("dog", "rain")
Write = Callable[[Path, int], object]


def write_sound(path: Path, seed: int, seconds: float = 0.2) -> None:
    """8-bit noise that depends on ``seed``; the size does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, generator(23, f"sound {seed}").uniform(-0.3, 0.3, round(8000 * seconds)), 8000)


def write_esc50(folder: Path) -> Path:
    """Two folds with two clips of each of two classes."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for number in range(8):
        fold, target = 1 + number // 4, number % 2
        name = f"{fold}-{100 + number}-A-{target}.wav"
        lines.append(f"{name},{fold},{target},{CLASSES[target]},True,{100 + number},A")
        write_sound(folder / "audio" / name, number)
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_store(path: Path, seed: int, labels: int = 0, clips: int = 12) -> Path:
    """A clip store whose audio depends on ``seed``, and whose labels are shifted by ``labels``."""
    noise = generator(29, f"store {seed}").integers(-9000, 9000, (clips, 6400), dtype=np.int16)
    records = [ClipRecord(f"clip-{i:02d}", noise[i], (CLASSES[(i + labels) % 2],)) for i in range(clips)]
    write_clip_store(path, records, CLASSES, audio_kind="pcm16", sample_rate_hz=32000)
    return path


def write_student(folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = create_student("mn01", 2, n_mels=32)
    save_student(folder, student, CLASSES, LogMelConfig(n_mels=32, hop_samples=640), {"clip_seconds": 0.2})
    return folder


def replace(path: Path, write: Write, seed: int, in_place: bool = False) -> None:
    """Puts other content at ``path``, of the same size and with the same time."""
    before = path.stat()
    other = path.with_name(f"other-{path.name}")
    write(other, seed)
    if in_place:
        path.write_bytes(other.read_bytes())
        other.unlink()
    else:
        os.replace(other, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def weights_of(folder: Path, seed: int) -> None:
    """``folder`` is the path of the weights' file."""
    run = write_student(folder.with_name(f"run-{seed}"), seed)
    shutil.copy(run / "student.safetensors", folder)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a data set, weights and impulse responses."""
    write_esc50(tmp_path / "esc50")
    weights_of(tmp_path / "weights.safetensors", 0)
    write_sound(tmp_path / "responses" / "phone.wav", 50)
    return tmp_path


def tune(place: Path, *more: str) -> int:
    options = ["--task", "esc50", "--data", str(place / "esc50"), "--out", str(place / "run"), "--no-report", *SHORT]
    return finetune([*options, *more])


# --- Between stop and resume -------------------------------------------------------------------------------------------


def test_a_fold_is_not_trained_on_other_inputs_than_the_last(place: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--weights", str(place / "weights.safetensors"), "--impulse-responses", str(place / "responses")]
    assert tune(place, "--fold", "1", *options, "--no-probe") == 0
    inputs: dict[str, tuple[Path, Write, int]] = {
        "start": (place / "weights.safetensors", weights_of, 0),
        "impulse_responses": (place / "responses" / "phone.wav", write_sound, 50),
        "audio": (place / "esc50" / "audio" / "1-101-A-1.wav", write_sound, 1),
    }
    for name, (path, write, seed) in inputs.items():
        replace(path, write, 99)
        capsys.readouterr()
        assert tune(place, "--fold", "2", *options, "--no-probe") == 2
        message = capsys.readouterr().err
        assert f"inputs.{name}: " in message
        assert message.count("inputs.") == 1
        assert not (place / "run" / "fold2").exists()
        replace(path, write, seed)
    assert tune(place, "--fold", "1", *options, "--no-probe") == 0
    assert "already finished" in capsys.readouterr().out


def test_a_fold_does_not_start_from_another_run_than_the_last(place: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--init", str(write_student(place / "init", 0)), "--no-probe"]
    assert tune(place, "--fold", "1", *options) == 0
    shutil.rmtree(place / "init")
    write_student(place / "init", 1)
    assert tune(place, "--fold", "2", *options) == 2
    assert "inputs.start: " in capsys.readouterr().err


@pytest.mark.parametrize("settled_ns", [10**18, -(10**18)])
def test_files_that_are_the_same_are_read_again_only_if_they_have_to_be(
    place: Path, settled_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "SETTLED_NS", settled_ns)
    read, original = [], contents.content_of
    monkeypatch.setattr(contents, "content_of", lambda path: read.append(path) or original(path))
    assert tune(place, "--fold", "1") == 0
    assert len(read) == 8
    read.clear()
    os.utime(place / "esc50" / "audio" / "1-101-A-1.wav", (7, 7))  # other times, and the same content
    shutil.move(place / "esc50" / "audio" / "1-100-A-0.wav", place / "moved.wav")
    shutil.copy(place / "moved.wav", place / "esc50" / "audio" / "1-100-A-0.wav")
    assert tune(place, "--fold", "2") == 0
    assert len(read) == (8 if settled_ns > 0 else 2)


def test_pretraining_notices_other_labels_of_the_validation_clips_and_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    clips, valid = write_store(tmp_path / "clips.h5", 0), write_store(tmp_path / "valid.h5", 1, clips=4)
    weights_of(tmp_path / "weights.safetensors", 0)
    (tmp_path / "more").mkdir()
    write_sound(tmp_path / "more" / "a.wav", 3)
    options = ["--clips", str(clips), "--valid-clips", str(valid), "--out", str(tmp_path / "run"), *SHORT]
    options += ["--label-weight", "1", "--weights", str(tmp_path / "weights.safetensors")]
    options += ["--unlabelled", str(tmp_path / "more"), "--objective", "mean-teacher"]
    assert pretrain(options) == 0
    changes: dict[str, Callable[[], object]] = {
        "inputs.validation_labels": lambda: write_store(valid, 1, labels=1, clips=4),
        "inputs.start": lambda: replace(tmp_path / "weights.safetensors", weights_of, 1),
        "inputs.audio": lambda: replace(tmp_path / "more" / "a.wav", write_sound, 4),
    }
    for name, change in changes.items():
        change()
        capsys.readouterr()
        assert pretrain(options) == 2
        assert f"{name}: " in capsys.readouterr().err


@pytest.mark.parametrize("settled_ns", [10**18, -(10**18)])
def test_packing_again_from_other_files(
    tmp_path: Path, settled_ns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(contents, "SETTLED_NS", settled_ns)
    files = [tmp_path / "sounds" / CLASSES[number % 2] / f"{number}.wav" for number in range(6)]
    for number, path in enumerate(files):
        write_sound(path, number)
    out = tmp_path / "clips.h5"
    options = [str(tmp_path / "sounds"), "--out", str(out), "--workers", "1", "--audio", "flac"]
    assert pack(options) == 0
    store = out.read_bytes()
    read, original = [], contents.content_of
    monkeypatch.setattr(pack_sources, "content_of", lambda path: read.append(path) or original(path))
    capsys.readouterr()
    assert pack(options) == 0
    assert "already packed from these files" in capsys.readouterr().out
    assert len(read) == (6 if settled_ns > 0 else 0)
    for number, path in enumerate(files):
        replace(path, write_sound, 10 + number)
    assert pack(options) == 2
    assert "has other content than this command would write" in capsys.readouterr().err
    assert out.read_bytes() == store
    out.with_suffix(".sources.npz").unlink()
    for number, path in enumerate(files):
        replace(path, write_sound, number)
    assert pack(options) == 0  # the list is a saving of time only
    assert out.read_bytes() == store


def test_finished_shards_whose_files_have_changed_are_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    files = [tmp_path / "sounds" / CLASSES[number % 2] / f"{number}.wav" for number in range(6)]
    for number, path in enumerate(files):
        write_sound(path, number)
    options = [str(tmp_path / "sounds"), "--out", str(tmp_path / "clips.h5"), "--workers", "1", "--shard-clips", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_merge", lambda *inputs: (_ for _ in ()).throw(ValueError("killed")))
        assert pack(options) == 2
    replace(files[3], write_sound, 13)
    assert pack(options) == 0
    assert "1 finished shards are packed again" in capsys.readouterr().err
    store = ClipStore.open(tmp_path / "clips.h5")
    for path in files:
        row = int(store.rows([f"{path.parent.name}/{path.name}"])[0])
        assert store.encoded(row) == path.read_bytes()


# --- While a command uses them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_place", "skip"), [(False, "skip"), (True, "refuse")])
def test_audio_that_changes_between_folds_ends_fine_tuning(
    place: Path, in_place: bool, skip: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original = cross_validation.train_fold

    def then_replaced(setup: Any, folder: Path, *inputs: Any) -> np.ndarray:
        found = original(setup, folder, *inputs)
        replace(place / "esc50" / "audio" / "1-101-A-1.wav", write_sound, 60, in_place)
        return found

    monkeypatch.setattr(cross_validation, "train_fold", then_replaced)
    assert tune(place, "--workers", "1", "--on-bad-clip", skip) == 2
    message = capsys.readouterr().err
    assert "error: the audio of clip '1-101-A-1' (" in message
    assert "Traceback" not in message
    assert "has changed since the command began to use it" in message
    assert (place / "run" / "fold1" / "result.json").exists()
    assert not (place / "run" / "fold2" / "result.json").exists()


def test_a_teacher_beside_the_student_does_not_change_between_folds(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    teacher, original = write_student(place / "teacher", 0), cross_validation.train_fold
    options = ["--objective", "embedding", "--objective-options", f"teacher={teacher}"]

    def then_replaced(*inputs: Any) -> np.ndarray:
        found = original(*inputs)
        shutil.rmtree(teacher)
        write_student(teacher, 1)
        return found

    monkeypatch.setattr(cross_validation, "train_fold", then_replaced)
    assert tune(place, *options) == 2
    assert f"the objective's teacher ({teacher}) has changed since the command began" in capsys.readouterr().err
    assert not (place / "run" / "fold2" / "result.json").exists()
    assert tune(place, *options) == 2
    assert "inputs.own_teacher: " in capsys.readouterr().err


def test_two_data_sets_of_the_same_names_sizes_and_times_have_caches_of_their_own(place: Path) -> None:
    assert tune(place, "--fold", "1", "--cache", str(place / "cache")) == 0
    clips, _ = read_task(get_task("esc50"), place / "esc50")
    first = cache_path(clips, place / "cache", 32000)
    assert first.exists()
    for number, path in enumerate(sorted((place / "esc50" / "audio").iterdir())):
        replace(path, write_sound, 70 + number)
    other, _ = read_task(get_task("esc50"), place / "esc50")
    assert cache_path(other, place / "cache", 32000) != first
    shutil.rmtree(place / "run")
    assert tune(place, "--fold", "1", "--cache", str(place / "cache")) == 0
    heard = ClipStore.open(cache_path(other, place / "cache", 32000)).waveform(0, 32000)
    np.testing.assert_allclose(heard, other.waveform(0, 32000), atol=1e-4)
    assert np.abs(heard - ClipStore.open(first).waveform(0, 32000)).max() > 0.1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_validation_store_that_is_replaced_ends_training(
    tmp_path: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clips, valid = write_store(tmp_path / "clips.h5", 0), write_store(tmp_path / "valid.h5", 1)
    original, seeds = EvaluationWindows.__init__, iter(range(2, 9))

    def then_replaced(windows: EvaluationWindows, *inputs: Any, **options: Any) -> None:
        original(windows, *inputs, **options)
        replace(valid, lambda path, seed: write_store(path, seed), next(seeds), in_place)

    monkeypatch.setattr(EvaluationWindows, "__init__", then_replaced)
    options = ["--clips", str(clips), "--valid-clips", str(valid), "--out", str(tmp_path / "run"), *SHORT]
    assert pretrain([*options, "--label-weight", "1", "--workers", "0" if in_place else "1"]) == 2
    message = capsys.readouterr().err
    assert message.count("error: the clip store (") == 1
    assert f"{valid}) has changed since the command began to use it" in message
    assert "Traceback" not in message
    tagger = write_student(tmp_path / "student", 0)  # kd evaluate opens the store in the same way
    assert evaluate(["--clips", str(valid), "--tagger", str(tagger), "--workers", "0" if in_place else "1"]) == 2
    assert f"{valid}) has changed since the command began to use it" in capsys.readouterr().err


def test_a_clip_store_that_only_moves_or_is_copied_is_the_same(tmp_path: Path) -> None:
    store = ClipStore.open(write_store(tmp_path / "clips.h5", 0))
    first = store.waveform(3, 32000)
    os.link(tmp_path / "clips.h5", tmp_path / "link.h5")  # another state of the same file
    shutil.copy(tmp_path / "clips.h5", tmp_path / "copy.h5")
    os.replace(tmp_path / "copy.h5", tmp_path / "clips.h5")
    np.testing.assert_array_equal(store.waveform(3, 32000), first)
    again = ClipStore(tmp_path / "clips.h5", None)
    again.__setstate__(store.__getstate__())  # as in a worker
    np.testing.assert_array_equal(again.waveform(3, 32000), first)
    with open(tmp_path / "clips.h5", "r+b") as file:  # the audio of one clip changes, and nothing else
        file.seek(again.contents._audio._offset)
        file.write(b"\1\2\3\4")
    np.testing.assert_array_equal(again.waveform(3, 32000), first)
    with pytest.raises(ValueError, match="the audio of clip 'clip-00' .* has changed"):
        again.waveform(0, 32000)


def test_a_file_of_terabytes_of_nothing_is_known_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sparse.wav"
    with open(path, "wb") as file:
        file.write(b"RIFF")
        file.truncate(2**42)
    first = contents.content_of(path)[1]
    with open(path, "r+b") as file:
        file.seek(2**41)
        file.write(b"x")
    assert contents.content_of(path)[1] != first


# --- Teaching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_a_clip_store_that_is_replaced_after_the_first_of_two_teachers(
    tmp_path: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clips = write_store(tmp_path / "clips.h5", 0)
    first, second = write_student(tmp_path / "first", 0), write_student(tmp_path / "second", 1)
    original = precompute.make_store

    def then_replaced(*inputs: Any, **options: Any) -> None:
        original(*inputs, **options)
        replace(clips, lambda path, seed: write_store(path, seed), 1, in_place)

    monkeypatch.setattr(precompute, "make_store", then_replaced)
    options = ["--clips", str(clips), "--teacher", str(first), str(second), "--out", str(tmp_path / "logits")]
    assert teach([*options, "--workers", "0" if in_place else "1"]) == 2
    assert f"the clip store ({clips}) has changed since the command began to use it" in capsys.readouterr().err
    assert not (tmp_path / "logits" / "second.h5").exists()
    assert verify(["--logits", str(tmp_path / "logits" / "first.h5"), "--clips", str(clips)]) == 2
    assert "it was made from another clip store" in capsys.readouterr().err


def test_a_folder_of_sounds_is_known_by_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(3):
        write_sound(tmp_path / "sounds" / f"{number}.wav", number)
    teacher = write_student(tmp_path / "teacher", 0)
    options = ["--clips", str(tmp_path / "sounds"), "--teacher", str(teacher), "--out", str(tmp_path / "logits")]
    options += ["--workers", "0"]
    assert teach(options) == 0
    assert teach(options) == 0
    assert "nothing to do" in capsys.readouterr().out
    replace(tmp_path / "sounds" / "1.wav", write_sound, 9)
    assert teach(options) == 2
    assert "was made with other clips" in capsys.readouterr().err


# --- What the last bits depend on --------------------------------------------------------------------------------------


def test_other_threads_are_said_once_by_each_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clips, logits = write_store(place / "clips.h5", 0), place / "logits"
    trained = ["--clips", str(clips), "--label-weight", "1", "--out", str(place / "pretrained"), *SHORT]
    taught = ["--clips", str(clips), "--teacher", str(write_student(place / "teacher", 0)), "--out", str(logits)]
    commands: list[tuple[Callable[[], int], Any, str, Path, str]] = [
        (lambda: pretrain(trained), pretraining, "save_result", place / "pretrained" / "config.json", "the run"),
        (lambda: tune(place, "--fold", "1"), CrossValidation, "keep", place / "run" / "config.json", "the run"),
        (
            lambda: teach([*taught, "--workers", "0"]),
            precompute.StoreInProgress,
            "merge",
            logits / "teacher.h5.partial" / "plan.json",
            str(logits / "teacher.h5"),
        ),
    ]

    def cut(*inputs: object) -> None:
        raise ValueError("cut off")

    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # kd teach uses one thread otherwise
    try:
        for command, owner, last_step, record, what in commands:
            said = f"{what} continues with threads 1 → 2: its last bits will differ from those of an uninterrupted run"
            for count, times in ((1, 0), (2, 1), (2, 0)):
                torch.set_num_threads(count)
                with monkeypatch.context() as patch:
                    patch.setattr(owner, last_step, cut)
                    assert command() == 2
                shown = capsys.readouterr().out
                assert shown.count(said) == shown.count("its last bits") == times
                assert read_json(record)["computed_with"]["threads"] == str(count)
            assert command() == 0
            assert "its last bits" not in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
