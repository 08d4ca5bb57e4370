"""``kd teach``: right logits for every clip, work that survives any kill, and plain refusals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.system.command import STOPPED
from audio_datasets.system.locks import locked
from teacher_logits import precompute, shard_computing
from teacher_logits.precompute import TeachConfig, main, teach, unique_names
from teacher_logits.store import LogitStore
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.stores.shards import ShardBatches, ShardFolder, batches_of, shard_rows
from teacher_logits.teachers.loaders import load_teacher

SCRIPT = Path(precompute.__file__)


def arguments(clips: ClipStore, teachers: list[str], out: Path, **options) -> list[str]:
    """A command line for the twelve tiny clips in shards of five and batches of two."""
    options = {"shard_clips": 5, "batch_size": 2, "workers": 0, **options}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["--clips", str(clips.path), "--teacher", *teachers, "--out", str(out), *flags]


def config(clips: ClipStore, teachers: list[str], out: Path, **options) -> TeachConfig:
    settings = {"shard_clips": 5, "batch_size": 2, "workers": 0, **options}
    return TeachConfig(clips=clips.path, teacher=tuple(teachers), out=out, **settings)


def test_every_clip_gets_its_teachers_logits(clips, run_folder, own_teachers, tmp_path):
    specs = [str(run_folder), f"{own_teachers}:good"]
    paths = teach(config(clips, specs, tmp_path / "logits", workers=1))
    assert [path.name for path in paths] == ["small.h5", "statistics.h5"]
    for spec, path in zip(specs, paths, strict=True):
        teacher, store = load_teacher(spec), LogitStore.open(path)
        assert store.clip_ids == clips.clip_ids
        assert store.class_names == clips.class_names
        assert store.clip_store_fingerprint == clips.fingerprint
        assert store.teacher["fingerprint"] == teacher.fingerprint
        for row in range(len(clips)):
            waveform = torch.zeros(1, round(teacher.clip_seconds * teacher.sample_rate_hz))
            heard = torch.from_numpy(clips.waveform(row, teacher.sample_rate_hz))[: waveform.shape[1]]
            waveform[0, : len(heard)] = heard
            with torch.inference_mode():
                expected = teacher(waveform)
            np.testing.assert_allclose(store.read([clips.clip_id(row)]), expected, atol=0.01, rtol=2e-3)
        assert np.ptp(store.read(store.clip_ids), axis=0).min() > 0.1  # the clips are told apart
    assert not list((tmp_path / "logits").glob("*.partial"))
    assert not LogitEnsemble.open(paths).check_against(clips).any()


def test_shorter_and_longer_clips_are_padded_and_cut(own_teachers, tmp_path):
    tone = np.round(3000 * np.sin(0.3 * np.arange(9000))).astype(np.int16)
    records = [ClipRecord(f"c{i}", tone[:length], ("hiss",)) for i, length in enumerate((1000, 4000, 9000))]
    names = ("hiss", "hum, low", "click")
    write_clip_store(tmp_path / "c.h5", records, names, audio_kind="pcm16", sample_rate_hz=8000)
    (path,) = teach(config(ClipStore.open(tmp_path / "c.h5"), [f"{own_teachers}:good"], tmp_path / "logits"))
    logits = LogitStore.open(path).read(["c0", "c1", "c2"])
    padded = torch.zeros(4000)
    padded[:1000] = torch.from_numpy(tone[:1000] / 32768)
    np.testing.assert_allclose(logits[0, 0], padded.std().log(), atol=0.01)
    np.testing.assert_array_equal(logits[1], logits[2])  # the first half second is the same


def test_number_of_workers_and_shards_do_not_change_the_logits(clips, run_folder, tmp_path):
    first = teach(config(clips, [str(run_folder)], tmp_path / "a"))[0].read_bytes()
    assert teach(config(clips, [str(run_folder)], tmp_path / "b", workers=2, shard_clips=4))[0].read_bytes() == first


def test_number_of_threads_does_not_change_the_logits(clips, run_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = []
    run = shard_computing.run_teacher
    monkeypatch.setattr(
        shard_computing, "run_teacher", lambda *a, **k: threads.append(torch.get_num_threads()) or run(*a, **k)
    )
    try:
        torch.set_num_threads(2)
        teach(config(clips, [str(run_folder)], tmp_path))
        assert (set(threads), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(1)


def test_a_finished_store_is_left_alone(clips, own_teachers, tmp_path, capsys):
    (path,) = teach(config(clips, [f"{own_teachers}:good"], tmp_path))
    before = path.stat().st_mtime_ns
    teach(config(clips, [f"{own_teachers}:good"], tmp_path, shard_clips=3))
    assert path.stat().st_mtime_ns == before
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_a_store_of_another_teacher_is_only_replaced_on_request(clips, own_teachers, tmp_path):
    (path,) = teach(config(clips, [f"{own_teachers}:good"], tmp_path, name=("t",)))
    before = path.read_bytes()
    other = config(clips, [f"{own_teachers}:louder"], tmp_path, name=("t",))
    with pytest.raises(ValueError, match=r"t\.h5 exists and was made with another teacher or other settings"):
        teach(other)
    assert path.read_bytes() == before
    teach(TeachConfig(**{**vars(other), "restart": True}))
    assert LogitStore.open(path).teacher["architecture"] == {"scale": 2.0}


class Interrupted(Exception):
    """Stands for a kill inside the process."""


def run_until_interrupted(config: TeachConfig, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``teach`` up to the moment at which shard number ``shards`` would be written."""
    write = ShardFolder.write

    def failing(self, index, logits, skipped):
        if len(list(self.folder.glob("shard-*.npy"))) >= shards:
            raise Interrupted
        write(self, index, logits, skipped)

    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "write", failing)
        with pytest.raises(Interrupted):
            teach(config)


def test_a_rerun_computes_only_what_is_missing(clips, own_teachers, tmp_path, monkeypatch):
    spec = f"{own_teachers}:good"
    whole = teach(config(clips, [spec], tmp_path / "whole"))[0].read_bytes()
    run_until_interrupted(config(clips, [spec], tmp_path / "cut"), 2, monkeypatch)
    partial = tmp_path / "cut" / "statistics.h5.partial"
    assert len(list(partial.glob("shard-*.npy"))) == 2
    (partial / ".shard-000002-half.npy.1.tmp").write_bytes(b"what a killed process left")

    heard = []
    get_batch = shard_computing.ClipBatches.__getitem__
    monkeypatch.setattr(
        shard_computing.ClipBatches, "__getitem__", lambda self, i: heard.extend(self.batches[i]) or get_batch(self, i)
    )
    (path,) = teach(config(clips, [spec], tmp_path / "cut"))
    assert heard == [10, 11]
    assert path.read_bytes() == whole
    assert not partial.exists()


def test_unfinished_work_of_another_plan_is_refused_or_given_up(clips, own_teachers, tmp_path, monkeypatch):
    run_until_interrupted(config(clips, [f"{own_teachers}:good"], tmp_path, name=("t",)), 1, monkeypatch)
    message = r"t\.h5\.partial contains unfinished work .* teacher\.architecture\.scale was 1\.0, now 2\.0"
    other = config(clips, [f"{own_teachers}:louder"], tmp_path, name=("t",))
    with pytest.raises(ValueError, match=message):
        teach(other)
    with pytest.raises(ValueError, match="batch_size was 2, now 3"):
        teach(config(clips, [f"{own_teachers}:good"], tmp_path, name=("t",), batch_size=3))
    (path,) = teach(TeachConfig(**{**vars(other), "restart": True}))
    (fresh,) = teach(config(clips, [f"{own_teachers}:louder"], tmp_path / "fresh", name=("t",)))
    assert path.read_bytes() == fresh.read_bytes()


def test_what_a_kill_between_renaming_and_tidying_leaves_is_tidied(clips, own_teachers, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "remove", lambda self: None)
        (path,) = teach(config(clips, [f"{own_teachers}:good"], tmp_path))
    partial = tmp_path / "statistics.h5.partial"
    assert partial.exists()
    teach(config(clips, [f"{own_teachers}:good"], tmp_path))
    assert not partial.exists()
    assert path.exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("Broken", r"must return logits of shape \(2, 3\); found \(2, 2\)"),
        ("NotFinite", r"clip 'clip-0001' cannot be stored: found nan"),
        ("other_classes", r"class 1 is 'hum, low' in .* and 'hum' in teacher"),
        ("no_teacher", "Teacher; found Linear"),
    ],
)
def test_bad_teachers_end_with_exit_code_2(clips, own_teachers, tmp_path, capsys, function, message):
    assert main(arguments(clips, [f"{own_teachers}:{function}"], tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.split("error: ")[1].count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not list(tmp_path.glob("out/*.h5"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_cannot_be_decoded_is_named(own_teachers, tmp_path, capsys, workers):
    records = [ClipRecord("good or not", b"no audio at all", ("a",))]
    write_clip_store(tmp_path / "c.h5", records, ("hiss", "hum, low", "click", "a"))
    text = (tmp_path / f"{own_teachers}.py").read_text().replace('"click")', '"click", "a")')
    (tmp_path / "four_classes.py").write_text(text.replace("waveform.abs", "waveform.std(1), waveform.abs"))
    store = ClipStore.open(tmp_path / "c.h5")
    assert main(arguments(store, ["four_classes:good"], tmp_path / "out", workers=workers)) == 2
    error = capsys.readouterr().err
    assert "clip 'good or not'" in error
    assert "Traceback" not in error


def test_wrong_settings_end_with_exit_code_2(clips, run_folder, tmp_path, capsys):
    good = arguments(clips, [str(run_folder)], tmp_path / "out")
    for extra, message in [
        (["--class-names", str(tmp_path / "none.csv")], "none.csv"),
        (["--clips", str(run_folder / "student.json")], "student.json"),
        (["--clips", str(tmp_path / "none.h5")], "no such file"),
    ]:
        assert main([*good, *extra]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "small.h5").write_text("something else")
    assert main([*good, "--restart"]) == 2
    assert (tmp_path / "out" / "small.h5").read_text() == "something else"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"workers": -1}, "at least 0"),
        ({"name": ("a", "b")}, "found 2 for 1"),
        ({"name": ("a", "a"), "teacher": ("x", "y")}, "must differ"),
        ({"teacher": ()}, "at least one --teacher"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TeachConfig(**{"clips": Path("c.h5"), "teacher": ("t",), "out": Path("o"), **settings})
    with pytest.raises(SystemExit, match="2"):
        main(["--clips", "c.h5", "--teacher", "t", "--out", "o", "--batch-size", "0"])


def test_names_for_files():
    assert unique_names(["a", "b/../c", "a", "a", "a-2"]) == ["a", "b_.._c", "a-2", "a-3", "a-2-2"]
    assert unique_names(["", ".."]) == ["teacher", "teacher-2"]


def test_shards_and_batches_cover_every_row_once():
    shards = shard_rows(12, 5)
    assert [list(rows) for rows in shards] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert [list(batch) for batch in batches_of(shards[1], 2)] == [[5, 6], [7, 8], [9]]
    every = ShardBatches(shards, 2)
    assert list(every) == [batch for shard in shards for batch in batches_of(shard, 2)]
    assert (len(every), every[-1]) == (len(list(every)), batches_of(shards[-1], 2)[-1])
    assert list(ShardBatches([], 2)) == []


# --- Kills -------------------------------------------------------------------------------------------------------------


def start(command: list[str], folder: Path) -> subprocess.Popen:
    """Starts ``kd teach`` with these words before its script's name; in a process group of its own."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended early with exit code {process.returncode}"
        assert time.monotonic() < deadline, "the run did not get so far in two minutes"
        time.sleep(0.01)


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("*.partial/shard-*.npy")))


@pytest.fixture
def slow_run(clips, own_teachers, tmp_path) -> tuple[list[str], bytes]:
    """Arguments of a run that takes 1.2 s of pure waiting, and the bytes of the store that it must end with."""
    spec = f"{own_teachers}:slow"
    whole = teach(config(clips, [spec], tmp_path / "whole", shard_clips=1, batch_size=1))[0].read_bytes()
    return arguments(clips, [spec], tmp_path / "out", shard_clips=1, batch_size=1), whole


def test_one_process_killed_twice(slow_run, tmp_path):
    run, whole = slow_run
    for shards in (3, 7):
        process = start([str(SCRIPT), *run, "--workers", "1"], tmp_path)
        wait_until(lambda shards=shards: shards_in(tmp_path / "out") >= shards, process)
        process.kill()
        process.wait()
        assert shards_in(tmp_path / "out") >= shards
    assert not (tmp_path / "out" / "slow.h5").exists()
    assert main(run) == 0
    assert (tmp_path / "out" / "slow.h5").read_bytes() == whole


def test_two_processes_of_which_one_is_killed(slow_run, tmp_path):
    run, whole = slow_run
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    process = start([*launcher, *run], tmp_path)
    wait_until(lambda: shards_in(tmp_path / "out") >= 3, process)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert not (tmp_path / "out" / "slow.h5").exists()
    done = shards_in(tmp_path / "out")
    assert 3 <= done < 12

    process = start([*launcher, *run], tmp_path)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "out" / "slow.h5").read_bytes() == whole
    assert shards_in(tmp_path / "out") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_at_the_next_batch_and_keeps_finished_shards(
    clips, own_teachers, tmp_path, monkeypatch, capsys, number
):
    spec = f"{own_teachers}:good"
    whole = teach(config(clips, [spec], tmp_path / "whole"))[0].read_bytes()
    run, batches = shard_computing.run_teacher, []

    def signalled(*inputs, **waveforms):
        batches.append(None)
        if len(batches) == 5:  # shards of five clips are three batches
            os.kill(os.getpid(), number)
        return run(*inputs, **waveforms)

    with monkeypatch.context() as patch:
        patch.setattr(shard_computing, "run_teacher", signalled)
        assert main(arguments(clips, [spec], tmp_path / "out")) == STOPPED
    assert f"received {number.name}; finished shards are kept" in capsys.readouterr().err
    assert len(batches) == 5
    assert shards_in(tmp_path / "out") == 1
    assert main(arguments(clips, [spec], tmp_path / "out")) == 0
    assert (tmp_path / "out" / "statistics.h5").read_bytes() == whole


def test_two_runs_do_not_write_one_store(clips, own_teachers, tmp_path, capsys):
    out = tmp_path / "out"
    with locked(out / "statistics.h5.lock", "the store"):
        assert main(arguments(clips, [f"{own_teachers}:good"], out)) == 2
    assert f"statistics.h5 is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not any(out.iterdir())


def test_the_teachers_link_is_stored(clips, run_folder, tmp_path, capsys):
    out = tmp_path / "logits"
    (path,) = teach(config(clips, [str(run_folder)], out))
    assert "does not tell whether it was trained with a sigmoid or a softmax" in capsys.readouterr().out
    assert LogitStore.open(path).link is None
    teach(config(clips, [str(run_folder)], out, teacher_link="softmax"))  # the logits are the same
    assert "is complete" in capsys.readouterr().out
    (path,) = teach(config(clips, [str(run_folder)], tmp_path / "told", teacher_link="softmax"))
    assert LogitStore.open(path).link.to_json() == "softmax"
    assert "does not tell" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="another teacher or other settings"):
        teach(config(clips, [str(run_folder)], tmp_path / "told", teacher_link="sigmoid"))
