"""Consistent teaching from end to end: what the student is shown is, bit for bit, what the teacher heard."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.views import ViewConfig
from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from kd import finetune, pretrain
from kd.data.examples import TrainingExamples
from kd.data.sampling import EpochBatches, SamplingConfig
from kd.data.windows import Window
from kd.run_folder.metrics_log import read_metrics
from students import create_student
from students.card import save_student
from students.frontend import LogMel, LogMelConfig, mask_stripes
from teacher_logits import precompute
from teacher_logits.precompute import TeachConfig, teach
from teacher_logits.store import LogitStore
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.verify import main as verify

VIEWS = ViewConfig(views=3, view_seconds=0.3, view_masked_bands=0.2, view_masked_time=0.2, view_seed=4)
TEACHER = '''
import torch
from students.frontend import LogMel, LogMelConfig
from teacher_logits.teachers.base import Teacher


def bits(values):
    """Three whole numbers, exact in float16, that change with any bit of any value."""
    whole = values.flatten(1).contiguous().view(torch.int32).long()
    place = torch.arange(1, whole.shape[1] + 1)
    return torch.stack([(whole * place * factor).sum(1) % 2039 for factor in (3, 5, 7)], 1).float()


class Hash(Teacher):
    def __init__(self, hears_mel):
        super().__init__("hash", ("hiss", "hum, low", "click"), sample_rate_hz=32000, clip_seconds=0.3,
                         frontend=LogMelConfig().to_dict())
        if hears_mel:
            self.log_mel = LogMel()

    def forward(self, waveform):
        return bits(waveform)

    def logits_of_mel(self, mel):
        return bits(mel)


def of_waveform():
    return Hash(False)


def of_mel():
    return Hash(True)
'''


@pytest.fixture
def hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module with teachers whose logits tell exactly what they heard."""
    (tmp_path / "hashing.py").write_text(TEACHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "hashing", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "hashing"


def taught(store: Path, teacher: str, out: Path, views: ViewConfig = VIEWS, **settings: int) -> Path:
    (path,) = teach(TeachConfig(store, (teacher,), out, batch_size=5, shard_clips=5, views=views, **settings))
    return path


def shown(store: Path, logits: Path, workers: int, processes: int = 1, process: int = 0) -> list[dict]:
    """All examples of two epochs of a process, as a training loop gets them."""
    ensemble = LogitEnsemble.open([logits])
    clips = TrainingExamples(
        ClipStore.open(store),
        np.arange(12),
        Window(32000, 0.3),
        teachers=ensemble,
        frontend=LogMelConfig(),
        augment=AugmentConfig(),
        seed=5,
        views=ensemble.views,
    )
    batches = EpochBatches(
        clips.clips, np.arange(12), SamplingConfig(), batch_size=2, batches_per_step=processes, seed=5
    )
    examples = []
    for epoch in range(2):
        batches.start_at(epoch, 0)
        mine = [batch for number, batch in enumerate(batches) if number % processes == process]
        for batch in DataLoader(clips, batch_sampler=mine, num_workers=workers):
            examples += [{key: values[index] for key, values in batch.items()} for index in range(2)]
    return examples


def hash_of(values: torch.Tensor) -> torch.Tensor:
    return sys.modules["hashing"].bits(values[None])[0]


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (0, 2)])
def test_the_student_is_shown_the_bits_that_the_teacher_heard(tiny_store, hashing, tmp_path, workers, processes):
    unjittered = ViewConfig(views=3, view_seconds=0.3, view_mel_jitter=False, view_seed=4)
    logits = taught(tiny_store, f"{hashing}:of_waveform", tmp_path, unjittered, workers=workers)
    seen = set()
    for process in range(processes):
        for example in shown(tiny_store, logits, workers, processes, process):
            assert torch.equal(hash_of(example["waveform"]), example["teacher_logits"])
            seen.add((int(example["row"]), tuple(example["teacher_logits"].tolist())))
    assert len(seen) > 15  # of 12 clips shown twice, most in two different views


def test_so_are_jittered_bands_and_masked_stripes(tiny_store, hashing, tmp_path):
    logits = taught(tiny_store, f"{hashing}:of_mel", tmp_path, workers=0)
    log_mel = LogMel()
    for example in shown(tiny_store, logits, workers=0):
        mel = log_mel(example["waveform"][None], example["band_edges"][None])
        masked = mask_stripes(mel, example["stripes"][None])
        assert not torch.equal(mel, masked)
        assert torch.equal(hash_of(masked[0]), example["teacher_logits"])


def test_two_processes_write_the_same_store(tiny_store, hashing, tmp_path, environment):
    alone = taught(tiny_store, f"{hashing}:of_mel", tmp_path / "alone", workers=0)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(precompute.__file__, "--clips", tiny_store, "--teacher", f"{hashing}:of_mel", "--out", tmp_path / "two"),
        *("--batch-size", 5, "--shard-clips", 5, "--workers", 0, "--views", 3, "--view-seconds", 0.3),
        *("--view-masked-bands", 0.2, "--view-masked-time", 0.2, "--view-seed", 4),
    ]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "hash.h5").read_bytes() == alone.read_bytes()


def test_a_store_of_views_tells_what_it_holds(tiny_store, hashing, tmp_path, capsys):
    store = LogitStore.open(taught(tiny_store, f"{hashing}:of_mel", tmp_path, workers=0))
    assert (store.views, store.num_views, len(store)) == (VIEWS, 3, 12)
    ids = store.clip_ids[4:6]
    each = np.stack([store.read(ids, np.full(2, view)) for view in range(3)])
    assert len(np.unique(each[:, 0], axis=0)) == 3
    np.testing.assert_allclose(store.read(ids), each.mean(axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="views must be from 0 to 2; found 3 to 3"):
        store.read(ids, np.array([3, 3]))
    assert verify(["--logits", str(store.path), "--clips", str(tiny_store)]) == 0
    assert "mAP" in capsys.readouterr().out


def pretrained(store: Path, logits: list[Path], out: Path, *more: str) -> int:
    words = ("--clips", store, "--logits", *logits, "--teacher-link", "sigmoid", "--out", out, "--student", "mn01")
    try:
        return pretrain.main([*map(str, words), "--epochs", "1", "--batch-size", "4", "--workers", "0", *more])
    except SystemExit as end:  # a setting that can be told from the command line alone
        return end.code


def test_pretraining_on_stored_views(tiny_store, hashing, run_of_mn01, tmp_path, capsys):
    logits = taught(tiny_store, str(run_of_mn01), tmp_path / "logits", workers=0)
    more = ("--views", "stored", "--clip-seconds", "0.3", "--mixup-of-teacher", "logits")
    assert pretrained(tiny_store, [logits], tmp_path / "run", *more) == 0
    assert (tmp_path / "run" / "student.safetensors").exists()
    capsys.readouterr()


@pytest.fixture
def run_of_mn01(tiny_store: Path, tmp_path: Path) -> Path:
    """A run folder that can teach."""
    torch.manual_seed(0)
    save_student(
        tmp_path / "teacher",
        create_student("mn01", 3),
        ("hiss", "hum, low", "click"),
        LogMelConfig(),
        {"clip_seconds": 0.5},
    )
    return tmp_path / "teacher"


def test_fine_tuning_on_stored_views(make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The student of a fold is shown what the teacher heard of the same clips, found by id; other logits are refused."""
    data, clips = make_task_folder("folder"), tmp_path / "clips.h5"
    assert pack([str(data), "--task", "folder", "--out", str(clips), "--workers", "1"]) == 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_student("mn01", 2)
    save_student(tmp_path / "teacher", network, ("fan", "pump"), LogMelConfig(), {"clip_seconds": 0.3})
    logits = taught(
        clips, str(tmp_path / "teacher"), tmp_path / "logits", ViewConfig(views=3, view_seconds=0.3), workers=0
    )
    words = ("--task", "folder", "--data", data, "--logits", logits, "--student", "mn01", "--clip-seconds", "0.3")
    line = [*map(str, words), "--epochs", "1", "--workers", "0", "--no-report"]
    assert finetune.main([*line, "--out", str(tmp_path / "run"), "--views", "stored"]) == 0
    assert "distillation_loss" in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")[0]
    assert finetune.main([*line, "--out", str(tmp_path / "other")]) == 2  # not averaged over the views in silence
    with pytest.raises(SystemExit):
        finetune.main([*line, "--out", str(tmp_path / "other"), "--views", "stored", "--short-clips", "repeat"])
    assert not (tmp_path / "other").exists()


def test_views_and_logits_that_do_not_fit_are_refused(tiny_store, tiny_logits, hashing, tmp_path, capsys):
    logits = taught(tiny_store, f"{hashing}:of_mel", tmp_path / "logits", workers=0)
    again = taught(tiny_store, f"{hashing}:of_mel", tmp_path / "more", ViewConfig(views=2, view_seconds=0.3), workers=0)
    stored = ("--views", "stored")
    cases = [
        ([logits], ("--clip-seconds", "0.3"), "train on these views with --views stored"),
        ([tiny_logits], stored, "compute some with kd teach --views"),
        ([logits], stored, "give --clip-seconds 0.3"),
        ([logits, again], (*stored, "--clip-seconds", "0.3"), "teachers heard different views"),
        ([logits], (*stored, "--clip-seconds", "0.3", "--gain-db", "3"), "out gain_db"),
        ([logits], (*stored, "--clip-seconds", "0.3", "--n-mels", "64"), "jittered mel bands"),
    ]
    for stores, more, message in cases:
        assert pretrained(tiny_store, stores, tmp_path / "run", *more) == 2
        assert message in capsys.readouterr().err
    teach_again = ["--clips", str(tiny_store), "--teacher", f"{hashing}:of_waveform", "--out", str(tmp_path / "w")]
    for more, message in (
        (["--views", "2"], "has its own front end"),
        (["--views", "2", "--no-view-mel-jitter", "--view-seconds", "2"], "longer than the 0.3 s"),
        (["--view-gain-db", "3"], "not the number of views per clip"),
    ):
        assert precompute.main([*teach_again, *more]) == 2
        assert message in capsys.readouterr().err
