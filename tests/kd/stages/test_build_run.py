"""What a run is built from: class weights, teachers, the objective's own weights, groups of the optimizer."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.data.sampling import EpochBatches, SamplingConfig
from kd.objectives.settings import DistillationConfig, LossConfig
from kd.stages.build_run import (
    BuiltRun,
    TrainingData,
    build_objective,
    build_run,
    class_weights_of,
    package_versions,
    provenance,
)
from kd.stages.stage_config import StageConfig
from kd.stages.teachers import open_teachers
from kd.training.loop import LoopConfig
from students import create_student
from students.frontend import LogMelConfig

FRONTEND = LogMelConfig(n_mels=64, hop_samples=640)
VERBS = LabelGroup("verb", ("cut", "wash", "open"), exclusive=True)
SOUNDS = LabelGroup("sound", ("click", "hiss"), exclusive=False)


def stage(**settings: Any) -> StageConfig:
    given = {"out": Path("run"), "student": "mn01", "frontend": FRONTEND, "clip_seconds": 0.4, "workers": 0}
    return StageConfig(**{**given, "loop": LoopConfig(batch_size=4, ema_decay=0.5), **settings})


class Labels:
    """Clips that are their labels."""

    is_masked = True

    def __init__(self, targets: np.ndarray, mask: np.ndarray | None = None) -> None:
        self.class_names = (*VERBS.class_names, *SOUNDS.class_names)
        self._targets, self._mask = targets, np.ones(targets.shape, dtype=bool) if mask is None else mask

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return self._targets[rows].astype(np.float32)

    def mask(self, rows: np.ndarray) -> np.ndarray:
        return self._mask[rows]


# -- Class weights -----------------------------------------------------------------------------------------------------

#                  cut wash open click hiss
TARGETS = np.array(
    [[1, 0, 0, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
)


def weights_of(rows: list[int], mask: np.ndarray | None = None, loss: str | None = None) -> list[float]:
    data = TrainingData(Labels(TARGETS, mask), np.array(rows), LabelSpace((VERBS, SOUNDS)))
    return class_weights_of(data, stage(loss=LossConfig(loss, class_weights="balanced"))).tolist()


def test_class_weights_are_counted_in_the_training_clips_group_by_group() -> None:
    """Exclusive classes: clips / (classes · clips of the class). Others: clips without the class / clips with it."""
    assert weights_of([0, 1, 2, 3, 4, 5]) == pytest.approx([6 / 9, 6 / 6, 6 / 3, 2 / 4, 5 / 1])
    assert weights_of([0, 1, 2, 3]) == pytest.approx([4 / 6, 4 / 2, 1.0, 1 / 100, 3 / 1])
    assert weights_of([0, 1, 2, 3, 4, 5], loss="bce") == pytest.approx([3 / 3, 4 / 2, 5 / 1, 2 / 4, 5 / 1])


def test_class_weights_count_only_what_is_known() -> None:
    mask = np.ones(TARGETS.shape, dtype=bool)
    mask[0, 0] = mask[5, 3] = mask[2, 4] = False
    assert weights_of([0, 1, 2, 3, 4, 5], mask) == pytest.approx([5 / 6, 5 / 6, 5 / 3, 1 / 4, 1.0])


# -- The objective -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "built_objective.py").write_text(
        "import torch\n"
        "from kd.objectives.distillation import DistillationObjective\n\n\n"
        "class Projected(DistillationObjective):\n"
        "    def __init__(self, settings):\n"
        "        super().__init__(settings)\n"
        "        self.projection = torch.nn.Linear(settings.embedding_dim, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "built_objective:Projected"
    sys.modules.pop("built_objective", None)


def test_an_objectives_weights_are_drawn_from_the_seed_and_from_nothing_else(own_objective: str) -> None:
    data = TrainingData(Labels(TARGETS), np.arange(6), LabelSpace((VERBS, SOUNDS)))

    def weight(seed: int) -> torch.Tensor:
        return build_objective(stage(objective=own_objective), data, 7, seed).projection.weight

    before = torch.random.get_rng_state()
    first = weight(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(weight(3), first)
    assert not torch.equal(weight(4), first)
    assert first.shape == (2, 7)


def test_the_configuration_reaches_the_objective() -> None:
    data = TrainingData(Labels(TARGETS), np.arange(6), LabelSpace((VERBS, SOUNDS)))
    config = stage(
        loss=LossConfig(None, 0.1, "balanced"), distillation=DistillationConfig(0.4, 2.0, "logits"), logits=("a.h5",)
    )
    settings = build_objective(config, data, 7, 0).settings
    assert (settings.loss, settings.distillation, settings.frontend) == (config.loss, config.distillation, FRONTEND)
    assert (settings.label_space, settings.embedding_dim) == (data.label_space, 7)
    assert settings.class_weights == pytest.approx(class_weights_of(data, config).tolist())
    assert build_objective(stage(), data, 7, 0).settings.class_weights is None


# -- A run -------------------------------------------------------------------------------------------------------------


def built(store: Path, skipped: Path, config: StageConfig, **more: Any) -> BuiltRun:
    clips, accelerator = ClipStore.open(store), Accelerator(cpu=True)
    rows = np.arange(8)
    space = LabelSpace.single(clips.class_names, exclusive=False)
    data = TrainingData(clips, rows, space, open_teachers(config), config.impulse_responses())
    batches = EpochBatches(clips, rows, SamplingConfig("uniform"), batch_size=4, batches_per_step=1, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = create_student("mn01", 3, n_mels=64)
    return build_run(config, accelerator, data, student, batches, seed=0, skipped=ClipList(skipped), **more)


def test_a_run_is_built_as_it_is_configured(tiny_store: Path, tmp_path: Path, own_objective: str) -> None:
    config = stage(objective=own_objective)
    run = built(tiny_store, tmp_path / "skipped.txt", config, frozen="backbone", layer_decay=0.5)
    learner = run.state.trained(run.accelerator)
    groups = run.state.optimizer.param_groups
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]  # the head and the objective
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    learning = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    assert optimised == {id(parameter) for parameter in learning}
    assert any(parameter is learner.objective.projection.weight for parameter in learning)
    assert not learner.train().student.features.training
    assert run.state.evaluated_student(run.accelerator) is run.state.ema.module.student
    assert not (tmp_path / "run").exists()  # nothing is written yet
    assert run.examples.replacements is None

    plain = built(tiny_store, tmp_path / "skipped.txt", stage(loop=LoopConfig(batch_size=4), on_bad_clip="skip"))
    assert plain.state.ema is None
    assert len(plain.state.optimizer.param_groups) == 1
    assert plain.state.evaluated_student(plain.accelerator) is plain.state.trained(plain.accelerator).student
    assert plain.examples.replacements is not None


def test_batch_norms_are_renewed_from_the_training_clips_alone(tiny_store: Path, tmp_path: Path) -> None:
    run = built(tiny_store, tmp_path / "skipped.txt", stage())
    assert run.statistics.rows.tolist() == list(range(8))
    average, trained = run.state.evaluated_student(run.accelerator), run.state.trained(run.accelerator).student
    before = [buffer.clone() for buffer in trained.buffers()]
    assert run.renew_batch_norms(average) == 8
    assert all(torch.equal(one, other) for one, other in zip(trained.buffers(), before, strict=True))
    assert not torch.equal(average.features[0][1].running_var, trained.features[0][1].running_var)
    assert run.batch_norm_warning() is None
    few = built(tiny_store, tmp_path / "skipped.txt", stage(batch_norm_clips=5))
    assert few.renew_batch_norms(few.state.evaluated_student(few.accelerator)) == 5
    kept = built(tiny_store, tmp_path / "skipped.txt", stage(batch_norm_clips=0))
    assert kept.renew_batch_norms(kept.state.evaluated_student(kept.accelerator)) == 0
    assert "400 steps are too few" in kept.batch_norm_warning()  # 200 epochs of two
    frozen = built(tiny_store, tmp_path / "skipped.txt", stage(), frozen="backbone")
    assert frozen.renew_batch_norms(frozen.state.evaluated_student(frozen.accelerator)) == 0


def test_a_tagger_is_the_student_in_evaluation_mode_on_its_front_end(tiny_store: Path, tmp_path: Path) -> None:
    run = built(tiny_store, tmp_path / "skipped.txt", stage())
    student = run.state.trained(run.accelerator).student.train()
    waveform = torch.randn(3, 12800, generator=torch.Generator().manual_seed(0))
    found = run.tagger(student)(waveform)
    assert not student.training
    torch.testing.assert_close(found, student(run.frontend(waveform)).logits)


def test_the_batches_of_a_run_are_those_of_its_sampler(tiny_store: Path, tiny_logits: Path, tmp_path: Path) -> None:
    run = built(tiny_store, tmp_path / "skipped.txt", stage(logits=(str(tiny_logits),)))
    expected = [[request.row for request in batch] for batch in run.batches]
    batches = list(run.loader)
    assert [batch["row"].tolist() for batch in batches] == expected
    assert sorted(row for batch in expected for row in batch) == list(range(8))
    assert batches[0]["waveform"].shape == (4, 12800)
    assert {"teacher_logits", "has_teacher", "sample_key", "mix_weight"} <= batches[0].keys()


def test_fingerprints_tell_what_the_data_are(tiny_store: Path, tiny_logits: Path, tmp_path: Path) -> None:
    def fingerprints(*logits: str, rows: int = 8) -> dict[str, Any]:
        clips = ClipStore.open(tiny_store)
        space = LabelSpace.single(clips.class_names, exclusive=False)
        return TrainingData(clips, np.arange(rows), space, open_teachers(stage(logits=logits))).fingerprints()

    one = fingerprints(str(tiny_logits))
    assert fingerprints(str(tiny_logits)) == one
    assert fingerprints(str(tiny_logits), rows=7)["rows"] != one["rows"]
    assert fingerprints()["teachers"] == []
    doubled = fingerprints(f"{tiny_logits}:2")
    assert doubled["teachers"][0]["logits"] == one["teachers"][0]["logits"]
    assert doubled["clips"] == one["clips"] == ClipStore.open(tiny_store).fingerprint


def test_what_a_student_tells_of_itself(tiny_store: Path, tiny_logits: Path, tmp_path: Path) -> None:
    run = built(tiny_store, tmp_path / "skipped.txt", stage(logits=(str(tiny_logits),)))
    run.state.step, run.state.skipped_steps, run.state.epoch = 12, 1, 3
    told = provenance(run, {"a": 1}, [{"changes": []}], task="own")
    assert {name: told[name] for name in ("steps", "skipped_steps", "epochs", "clip_seconds", "objective", "task")} == {
        "steps": 12,
        "skipped_steps": 1,
        "epochs": 3,
        "clip_seconds": 0.4,
        "objective": "distillation",
        "task": "own",
    }
    assert (told["config"], told["accepted_changes"]) == ({"a": 1}, [{"changes": []}])
    assert told["teachers"] == run.data.teachers.describe()
    assert told["versions"] == package_versions()
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0]
