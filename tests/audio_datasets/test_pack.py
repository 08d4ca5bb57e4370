"""`kd pack`: formats, labels, broken files, and runs that were killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio_datasets
from audio_datasets import pack as packing
from audio_datasets import pack_audio, pack_shards
from audio_datasets.audio.codec import decode, to_pcm16
from audio_datasets.pack import PackConfig, PackResult, main, pack
from audio_datasets.stores import clip_writer
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import select_rows
from audio_datasets.system.command import STOPPED
from audio_datasets.system.locks import locked
from audio_datasets.system.randomness import generator

LABELS = ("dog", "cat", "rain")


def write_source(folder: Path, clips: int = 12, sample_rate_hz: int = 16000) -> Path:
    """A folder with one sub-folder per class of short noises, mono and stereo."""
    for index in range(clips):
        wave = 0.1 * generator(3, "pack test", 0, index).standard_normal((1600 + 10 * index, 1 + index % 2))
        path = folder / LABELS[index % 3] / f"{index:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, sample_rate_hz)
    return folder


def run_pack(source: Path, out: Path, **options) -> PackResult:
    options.setdefault("workers", 1)
    return pack(PackConfig(source=source, out=out, **options), show_progress=False)


@pytest.mark.parametrize("audio", ["keep", "mp3", "flac", "pcm16"])
def test_each_kind_of_audio(tmp_path: Path, audio: str) -> None:
    source = write_source(tmp_path / "source")
    result = run_pack(source, tmp_path / "clips.h5", audio=audio, shard_clips=5)
    assert (result.clips, result.skipped, result.already_there) == (12, (), False)
    store = ClipStore.open(tmp_path / "clips.h5")
    assert store.class_names == ("cat", "dog", "rain")
    assert store.audio_kind == ("pcm16" if audio == "pcm16" else "encoded")
    assert store.sample_rate_hz == (0 if audio == "keep" else 32000)
    row = int(store.rows(["dog/003.wav"])[0])
    original = source / "dog" / "003.wav"
    np.testing.assert_array_equal(store.targets([row]), [[0, 1, 0]])
    if audio == "keep":
        assert store.encoded(row) == original.read_bytes()
    else:
        waveform = store.waveform(row, 32000)
        assert len(waveform) == 2 * 1630
        if audio != "mp3":
            np.testing.assert_array_equal(to_pcm16(waveform), to_pcm16(decode(original, 32000)))
    entry = store.manifest().to_pylist()[row]
    assert entry["source"] == "dog/003.wav"
    assert entry["labels"] == entry["source_labels"] == ["dog"]
    assert (entry["sample_rate_hz"], entry["channels"]) == (16000, 2)
    assert entry["duration_seconds"] == pytest.approx(1630 / 16000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clips.h5",
        "clips.parquet",
        "clips.sources.npz",
        "source",
    ]


def test_the_store_does_not_depend_on_shards_workers_place_or_times(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    run_pack(source, tmp_path / "a.h5", audio="flac")
    moved = source.rename(tmp_path / "moved")
    for path in moved.rglob("*.wav"):
        os.utime(path, (1, 1))
    run_pack(moved, tmp_path / "b.h5", audio="flac", shard_clips=1, workers=2)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_manifest_with_a_class_list_a_label_map_splits_and_folds(tmp_path: Path) -> None:
    write_source(tmp_path)
    (tmp_path / "clips.csv").write_text(
        "clip_id,path,labels,split,fold,group\n"
        "one,dog/000.wav,dog;rain,train,1,garden\ntwo,cat/001.wav,,test,2,\nthree,rain/002.wav,rain,train,2,\n"
    )
    (tmp_path / "classes.txt").write_text("Rain\nCat\nDog\nBark\n")
    (tmp_path / "map.csv").write_text("label,class\ndog,Dog\ndog,Bark\nrain,Rain\n")
    run_pack(
        tmp_path / "clips.csv",
        tmp_path / "clips.h5",
        class_names=tmp_path / "classes.txt",
        label_map=str(tmp_path / "map.csv"),
    )
    store = ClipStore.open(tmp_path / "clips.h5")
    assert store.clip_ids == ["one", "two", "three"]
    np.testing.assert_array_equal(store.targets(range(3)), [[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert store.mask(range(3)).all(axis=1).tolist() == [True, False, True]  # an empty cell: unknown
    assert select_rows(store, split="train", folds=[2]).tolist() == [2]
    first = store.manifest().to_pylist()[0]
    assert (first["labels"], first["source_labels"], first["group"]) == (
        ["Dog", "Bark", "Rain"],
        ["dog", "rain"],
        "garden",
    )


def test_labels_outside_the_lists_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_source(tmp_path / "source")
    (tmp_path / "classes.txt").write_text("dog\nrain\n")
    (tmp_path / "map.csv").write_text("label,class\ndog,Dog\ncat,Cat\n")
    out = ["--out", str(tmp_path / "clips.h5")]
    assert main([str(source), *out, "--class-names", str(tmp_path / "classes.txt")]) == 2
    assert "1 labels are not in" in (message := capsys.readouterr().err)
    assert "'cat'" in message
    assert main([str(source), *out, "--label-map", str(tmp_path / "map.csv")]) == 2
    assert "no entry for 1 labels: 'rain'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "clips" in path.name] == []


def break_some(source: Path) -> None:
    (source / "dog" / "000.wav").write_bytes(b"")
    (source / "cat" / "004.wav").write_bytes(b"RIFF and then nothing")
    soundfile.write(source / "rain" / "005.wav", np.zeros((0, 1)), 16000)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_broken_files_are_skipped_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture, workers: str) -> None:
    source = write_source(tmp_path / "source")
    break_some(source)
    out = tmp_path / "clips.h5"
    command = [str(source), "--out", str(out), "--workers", workers, "--shard-clips", "4"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "packed: 9 clips" in printed
    assert "(3 skipped: 3 .wav)" in printed
    lines = (tmp_path / "clips.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["cat/004.wav", "dog/000.wav", "rain/005.wav"]
    assert "empty" in lines[1]
    store = ClipStore.open(out)
    assert len(store) == 9
    assert "dog/000.wav" not in store.clip_ids
    assert main(command) == 0
    assert "already packed" in (again := capsys.readouterr().out)
    assert "skipped dog/000.wav: " in again
    assert main([*command, "--on-bad-clip", "refuse"]) == 2


def test_broken_files_are_refused_on_request_and_the_work_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_source(tmp_path / "source")
    break_some(source)
    command = [str(source), "--out", str(tmp_path / "clips.h5"), "--workers", "1"]
    assert main([*command, "--on-bad-clip", "refuse"]) == 2
    message = capsys.readouterr().err
    assert "3 of 12 clips cannot be used" in message
    assert "cat/004.wav" in message
    assert not (tmp_path / "clips.h5").exists()
    assert main(command) == 0


def test_missing_files_count_as_broken(tmp_path: Path) -> None:
    write_source(tmp_path)
    (tmp_path / "clips.csv").write_text("clip_id,path,labels\na,absent.wav,dog\nb,dog/000.wav,dog\n")
    result = run_pack(tmp_path / "clips.csv", tmp_path / "clips.h5")
    assert result.clips == 1
    assert result.skipped == (("absent.wav", "No such file or directory"),)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_clip_that_the_machine_cannot_read_is_not_skipped(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with it, so the same command goes on when the disk is back."""
    source = write_source(tmp_path / "source", clips=4)
    failing, read = source / "cat" / "001.wav", pack_audio.read_regular

    def read_regular(path: Path) -> bytes:
        if path == failing:
            raise OSError(number, os.strerror(number))
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(pack_audio, "read_regular", read_regular)
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '{failing}'"):
            run_pack(source, tmp_path / "clips.h5", shard_clips=1)
    result = run_pack(source, tmp_path / "clips.h5", shard_clips=1)
    assert (result.clips, result.skipped) == (4, ())


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source" / "dog").mkdir(parents=True)
    (tmp_path / "source" / "dog" / "a.wav").write_bytes(b"x")
    with pytest.raises(ValueError, match="nothing is left to pack"):
        run_pack(tmp_path / "source", tmp_path / "clips.h5")


def test_two_runs_do_not_write_one_store(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    with locked(tmp_path / "clips.h5.lock", "the store"):
        with pytest.raises(ValueError, match=r"clips\.h5 is in use by process"):
            run_pack(source, tmp_path / "clips.h5")
        assert not (tmp_path / "clips.h5.partial").exists()
    assert run_pack(source, tmp_path / "clips.h5").clips == 12


def test_an_existing_store_is_replaced_only_on_request(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    out = tmp_path / "clips.h5"
    run_pack(source, out)
    before = out.read_bytes()
    assert run_pack(source, out, shard_clips=3).already_there
    with pytest.raises(ValueError, match="--overwrite"):
        run_pack(source, out, audio="pcm16")
    assert out.read_bytes() == before
    assert not run_pack(source, out, audio="pcm16", overwrite=True).already_there
    assert ClipStore.open(out).audio_kind == "pcm16"
    out.write_bytes(b"something else")
    with pytest.raises(ValueError, match="--overwrite"):
        run_pack(source, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": Path("clips.wav")}, "must end in"),
        ({"sample_rate_hz": 16000}, "no effect"),
        ({"audio": "pcm16", "sample_rate_hz": 0}, "positive"),
        ({"audio": "mp3", "sample_rate_hz": 31999}, "cannot encode"),
        ({"shard_clips": 0}, "1 or more"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackConfig(**({"source": Path("x"), "out": Path("clips.h5")} | options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["absent", "--out", "x.h5"], "no such file or folder: absent"), (["absent", "--out", "x.wav"], "must end in")],
)
def test_user_mistakes_end_with_exit_code_2(tmp_path: Path, arguments: list, message: str) -> None:
    run = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert run.returncode == 2
    assert message in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr


# -- Interrupted runs --------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "audio_datasets.pack", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(audio_datasets.__file__).parents[1])}


@pytest.mark.parametrize(
    "step", ["_pack_shard", "ClipList", "concatenate", "write_manifest", "flush_folder", "remove_path"]
)
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = write_source(tmp_path / "source")
    break_some(source)
    run_pack(source, tmp_path / "whole.h5", shard_clips=3)
    owner, _, name = step.rpartition(".")
    module = pack_shards if name == "_pack_shard" else getattr(packing, owner) if owner else packing
    original, calls = getattr(module, name), []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == (3 if name == "_pack_shard" else 1):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            run_pack(source, tmp_path / "clips.h5", shard_clips=3)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips.h5.partial").glob("shard-*.h5")}
    assert len(shards) == (2 if name == "_pack_shard" else 4)
    if step in ("ClipList", "concatenate", "write_manifest"):
        with monkeypatch.context() as patched:
            patched.setattr(pack_shards, "_pack_shard", lambda task: pytest.fail("a finished shard was packed again"))
            run_pack(source, tmp_path / "clips.h5", shard_clips=3)
    else:
        run_pack(source, tmp_path / "clips.h5", shard_clips=3)
    for suffix in (".h5", ".parquet", ".skipped.txt"):
        assert (tmp_path / f"clips{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not (tmp_path / "clips.h5.partial").exists()


def test_unfinished_work_of_another_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    with monkeypatch.context() as patched:
        patched.setattr(packing, "concatenate", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pack(source, tmp_path / "clips.h5")
    with pytest.raises(ValueError, match=r"changed: audio, sample_rate_hz\); discard it with --restart"):
        run_pack(source, tmp_path / "clips.h5", audio="pcm16")
    os.utime(source / "dog" / "000.wav", (5, 5))
    with pytest.raises(ValueError, match="changed: times of the files"):
        run_pack(source, tmp_path / "clips.h5")
    assert run_pack(source, tmp_path / "clips.h5", audio="pcm16", restart=True).clips == 12


def test_shards_without_a_plan_are_not_used(tmp_path: Path) -> None:
    """What is left by a run that was killed while it removed its work folder."""
    source = write_source(tmp_path / "source")
    stale = tmp_path / "clips.h5.partial" / "shard-00000.h5"
    stale.parent.mkdir()
    stale.write_bytes(b"of other clips")
    assert run_pack(source, tmp_path / "clips.h5").clips == 12


@pytest.mark.parametrize(
    ("workers", "shards_before_kill"),
    [pytest.param(1, 2, marks=pytest.mark.sweep), pytest.param(1, 40, marks=pytest.mark.sweep), (2, 10)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, workers: int, shards_before_kill: int) -> None:
    source = write_source(tmp_path / "source", clips=150)
    run_pack(source, tmp_path / "whole.h5", audio="flac")
    arguments = command(
        *(source, "--out", tmp_path / "clips.h5", "--audio", "flac", "--shard-clips", 1, "--workers", workers)
    )
    work = tmp_path / "clips.h5.partial"
    run = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(list(work.glob("shard-*.h5"))) < shards_before_kill:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    children = children_of(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "clips.h5").exists()
    assert len(list(work.glob("shard-*.h5"))) < 150
    if workers > 1 and children:
        assert_end(children)
    subprocess.run(arguments, env=environment(), check=True, capture_output=True)
    assert (tmp_path / "clips.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert (tmp_path / "clips.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not work.exists()


@pytest.mark.parametrize(
    ("number", "step", "call", "shards"),
    [
        (signal.SIGTERM, "stored_audio", 8, 2),  # inside the third shard
        (signal.SIGUSR1, "_digest", 4, 1),  # while the second one is written
        (signal.SIGTERM, "_write_arrays", 5, 4),  # while the four shards are merged
    ],
)
def test_a_signal_ends_packing_and_the_same_command_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    number: signal.Signals,
    step: str,
    call: int,
    shards: int,
) -> None:
    source, work = write_source(tmp_path / "source"), tmp_path / "clips.h5.partial"
    run_pack(source, tmp_path / "whole.h5", shard_clips=3)
    arguments = [str(source), "--out", str(tmp_path / "clips.h5"), "--workers", "1", "--shard-clips", "3"]
    module = pack_shards if step == "stored_audio" else clip_writer
    original, calls = getattr(module, step), []

    def signalled(*values, **settings):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*values, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, signalled)
        assert main(arguments) == STOPPED
    assert f"received {number.name}; finished shards are kept in {work}" in capsys.readouterr().err
    assert len(list(work.glob("shard-*.h5"))) == shards
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "clips.h5").exists()
    assert main(arguments) == 0
    assert (tmp_path / "clips.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_signal_to_all_processes_ends_them(tmp_path: Path) -> None:
    """As launchers and schedulers send it. The workers, hit as well, are neither taken for killed nor left behind."""
    source, work = write_source(tmp_path / "source", clips=60), tmp_path / "clips.h5.partial"
    arguments = command(
        source, *("--out", tmp_path / "clips.h5", "--audio", "flac", "--shard-clips", 1, "--workers", 2)
    )
    run = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    while len(list(work.glob("shard-*.h5"))) < 3:
        assert run.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.002)
    children = children_of(run.pid)
    for process in (*children, run.pid):
        os.kill(int(process), signal.SIGTERM)
    message = run.communicate()[1]
    assert run.returncode == STOPPED, message
    assert "received SIGTERM; finished shards are kept" in message
    assert not list(work.glob(".*"))
    done = len(list(work.glob("shard-*.h5")))
    assert 3 <= done < 60
    assert_end(children)
    assert run_pack(source, tmp_path / "clips.h5", audio="flac", shard_clips=1).clips == 60


def assert_end(children: list[str]) -> None:
    """Soon none of these processes is left."""
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "worker processes outlived the run"
        time.sleep(0.05)


def children_of(process_id: int) -> list[str]:
    """Process ids of the direct children, where the system tells (Linux)."""
    listing = Path(f"/proc/{process_id}/task/{process_id}/children")
    return listing.read_text().split() if listing.exists() else []


def test_real_esc10_with_audioset_targets(tmp_path: Path, reference_dir: Path) -> None:
    labels = reference_dir / "data" / "labels" / "audioset_class_labels_indices.csv"
    result = run_pack(
        reference_dir / "data" / "ESC-10",
        tmp_path / "clips.h5",
        class_names=labels,
        label_map="esc50_to_audioset",
        workers=2,
    )
    assert (result.clips, result.skipped) == (400, ())
    store = ClipStore.open(tmp_path / "clips.h5")
    assert len(select_rows(store, folds=[5])) == 80
    counts = dict(zip(store.class_names, store.class_counts().tolist(), strict=True))
    assert len(store.class_names) == 527
    assert counts["Dog"] == counts["Helicopter"] == counts["Baby cry, infant cry"] == 40
    assert set(counts.values()) == {0, 40}
