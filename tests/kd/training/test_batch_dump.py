"""Dumps of batches whose loss is not finite: running one again gives the same losses, for every objective."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audio_datasets.system.files import write_json
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.objectives.base import ObjectiveSettings
from kd.objectives.distillation import DistillationObjective
from kd.objectives.settings import DistillationConfig, LossConfig
from kd.training.batch_dump import DUMP_FILE, is_finite, leaves, run_dump, write_dump
from kd.training.learner import Learner
from kd.training.transfer import freeze
from students import create_student
from students.frontend import LogMelConfig

FRONTEND = LogMelConfig(n_mels=64, hop_samples=640)
NAMES = ("a", "b", "c", "d")
EXCLUSIVE, INDEPENDENT = (LabelSpace.single(NAMES, exclusive=exclusive) for exclusive in (True, False))
GROUPS = LabelSpace((LabelGroup("verb", NAMES[:2], True), LabelGroup("sound", NAMES[2:], False)))
POSITION = {"epoch": 1, "step": 7, "process": 0}

SETTINGS: dict[str, tuple[LabelSpace, dict[str, Any]]] = {
    "bce": (INDEPENDENT, {}),
    "bce with class weights": (INDEPENDENT, {"class_weights": (1.0, 7.0, 0.2, 3.0)}),
    "cross entropy": (EXCLUSIVE, {}),
    "cross entropy with class weights and smoothing": (
        EXCLUSIVE,
        {"loss": LossConfig("cross-entropy", 0.2, "balanced"), "class_weights": (1.0, 7.0, 0.2, 3.0)},
    ),
    "bce for exclusive classes": (EXCLUSIVE, {"loss": LossConfig("bce")}),
    "teachers of logits": (
        EXCLUSIVE,
        {"distillation": DistillationConfig(0.4, 2.5, "logits"), "loss": LossConfig("cross-entropy", 0.1)},
    ),
    "groups": (GROUPS, {"class_weights": (1.0, 7.0, 0.2, 3.0)}),
}


def batch(space: LabelSpace, clips: int = 6) -> dict[str, Tensor]:
    """With everything in it that fine-tuning may put there."""
    draws = torch.Generator().manual_seed(0)
    classes = len(space.class_names)
    targets = torch.eye(classes)[torch.randint(0, classes, (clips,), generator=draws)]
    if not space.exclusive:
        targets = (torch.rand(clips, classes, generator=draws) < 0.5).float()
    teachers = {"teacher_logits": torch.randn(clips, classes, generator=draws), "has_teacher": torch.arange(clips) != 0}
    return {
        "row": torch.arange(clips),
        "waveform": 0.1 * torch.randn(clips, 12800, generator=draws),
        "targets": targets,
        "known": torch.rand(clips, classes, generator=draws) < 0.8,
        "sample_key": torch.arange(clips) + 2**40,
        "mix_weight": torch.tensor([0.7, 0.9, 0.6, 1.0, 0.8, 0.5]),
        "band_edges": torch.tensor([[0.0, 15000.0]]).repeat(clips, 1) + torch.arange(clips)[:, None],
        "time_masks": torch.tensor([[[0.1, 0.2]]]).repeat(clips, 1, 1),
        **teachers,
        **{f"mixed_with_{name}": values.flip(0) for name, values in teachers.items()},
        "waveform_mix_weight": torch.tensor([1.0, 0.8, 0.5, 0.6, 0.9, 0.7]),
    }


def learner_for(
    space: LabelSpace, kind: type = DistillationObjective, frozen: str = "none", **settings: Any
) -> Learner:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        student = create_student("mn01", len(space.class_names), n_mels=64, dropout=0.5)
        objective = kind(ObjectiveSettings(FRONTEND, space, embedding_dim=student.embedding_dim, **settings))
    return Learner(student, objective, freeze(student, frozen))


def dumped(learner: Learner, content: dict[str, Tensor], folder: Path) -> tuple[Path, dict[str, float]]:
    """A dump as a run writes it, and the losses that the run had."""
    given = {name: value.clone() for name, value in content.items()}
    losses = learner.train()(content)
    values = {name: value.item() for name, value in losses.items()}
    return write_dump(folder, learner, given, losses, POSITION, "Clips of the batch: x"), values


@pytest.mark.parametrize("case", SETTINGS)
def test_a_dump_run_again_gives_the_losses_that_the_run_had(case: str, tmp_path: Path) -> None:
    space, settings = SETTINGS[case]
    dump, losses = dumped(learner_for(space, **settings), batch(space), tmp_path)
    found = run_dump(dump)
    assert found.losses == losses
    assert found.first is None
    assert losses.keys() == {"loss", "label_loss", "distillation_loss"}
    assert losses["distillation_loss"] > 0
    # With the default objective, which a dump once stood for, most of them would not be the same.
    by_default = dumped(learner_for(INDEPENDENT), batch(space), tmp_path)[1]
    assert (losses == by_default) == (case in ("bce", "bce for exclusive classes"))


@pytest.mark.parametrize("frozen", ["backbone", "batch-norm"])
def test_frozen_statistics_stay_as_they_are_in_a_dump(frozen: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"task": "own", "freeze": frozen})
    learner = learner_for(INDEPENDENT, frozen=frozen)
    for module in learner.student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(0.3)
    dump, losses = dumped(learner, batch(INDEPENDENT), tmp_path)
    assert run_dump(dump).losses == losses


def test_the_configuration_above_a_fold_is_that_of_the_dump(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"task": "own", "seeds": [0, 1]})
    for folder in (tmp_path, tmp_path / "fold1", tmp_path / "seed1" / "fold1"):
        dump, _ = dumped(learner_for(INDEPENDENT), batch(INDEPENDENT), folder)
        card = json.loads((dump / DUMP_FILE).read_text())
        assert card["config"] == {"task": "own", "seeds": [0, 1]}
        assert {name: card[name] for name in POSITION} == POSITION
        assert dump == folder / "non_finite" / "step-00000007-process-0"


OWN_OBJECTIVE = """
import torch
from kd.objectives.distillation import DistillationObjective

class Scaled(DistillationObjective):
    def __init__(self, settings):
        super().__init__(settings)
        self.scale = torch.nn.Parameter(torch.rand(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, student, batch):
        self.calls += 1
        losses = super().forward(student, batch)
        return {**losses, "loss": losses["loss"] * self.scale}
"""


def test_an_objective_of_the_users_own_is_dumped_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dumped_objective.py").write_text(OWN_OBJECTIVE)
    monkeypatch.syspath_prepend(tmp_path)
    kind = __import__("dumped_objective").Scaled
    dump, losses = dumped(learner_for(INDEPENDENT, kind), batch(INDEPENDENT), tmp_path)
    assert (dump / "objective.safetensors").exists()
    name = "dumped_objective:Scaled"
    assert run_dump(dump, [name]).losses == losses
    sys.modules.pop("dumped_objective")
    assert run_dump(dump, [name]).losses == losses  # found again by its name
    sys.modules.pop("dumped_objective")
    with pytest.raises(ValueError, match=f"names {name}, which is not part of this package"):
        run_dump(dump)
    assert "dumped_objective" not in sys.modules  # a stranger's module was not even imported


# -- Where it comes from -----------------------------------------------------------------------------------------------


def break_waveform(learner: Learner, content: dict[str, Tensor]) -> None:
    content["waveform"][1, 5] = torch.nan


def break_layer(learner: Learner, content: dict[str, Tensor]) -> None:
    learner.student.features[3].block[0][0].weight.data[0] = torch.inf


def break_teacher(learner: Learner, content: dict[str, Tensor]) -> None:
    content["teacher_logits"][2, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "first"),
    [
        (break_waveform, "input waveform"),
        (break_teacher, "input teacher_logits"),
        (break_layer, "output of layer features.3.block.0.0"),
    ],
)
def test_the_first_that_is_not_finite_is_named(
    damage: Callable[[Learner, dict[str, Tensor]], None], first: str, tmp_path: Path
) -> None:
    learner, content = learner_for(INDEPENDENT), batch(INDEPENDENT)
    damage(learner, content)
    dump, losses = dumped(learner, content, tmp_path)
    assert losses["loss"] != losses["loss"]
    found = run_dump(dump)
    assert found.first == first
    assert found.losses["loss"] != found.losses["loss"]


def test_a_loss_that_overflows_on_its_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "overflowing_objective.py").write_text(
        OWN_OBJECTIVE.replace("torch.rand(())", "torch.tensor(float('inf'))")
    )
    monkeypatch.syspath_prepend(tmp_path)
    kind = __import__("overflowing_objective").Scaled
    dump, _ = dumped(learner_for(INDEPENDENT, kind), batch(INDEPENDENT), tmp_path)
    assert run_dump(dump, ["overflowing_objective:Scaled"]).first == "the loss"


def test_layers_without_layers_and_what_counts_as_finite() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Identity()))
    assert [name for name, _ in leaves(network)] == ["0", "1.0", "1.1"]
    assert [is_finite(value) for value in (None, "x", torch.tensor(3), torch.tensor(1.0))] == [True] * 4
    assert not is_finite(torch.tensor([0.0, torch.inf]))


# -- Dumps of version 0.1, and damaged ones ----------------------------------------------------------------------------


def changed(dump: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    card = json.loads((dump / DUMP_FILE).read_text())
    change(card)
    (dump / DUMP_FILE).write_text(json.dumps(card))
    return dump


def test_a_pretraining_dump_of_version_0_1_is_run(tmp_path: Path) -> None:
    """It had no objective in it: labels, teachers and front end are those of its configuration."""
    distillation = DistillationConfig(0.3, 2.0)
    content = {name: value for name, value in batch(INDEPENDENT).items() if name != "known"}
    dump, losses = dumped(learner_for(INDEPENDENT, distillation=distillation), content, tmp_path)

    def as_before(card: dict[str, Any]) -> None:
        del card["objective"]
        card["config"] = {"frontend": FRONTEND.to_dict(), "distillation": vars(distillation), "mixed_precision": "no"}

    assert run_dump(changed(dump, as_before)).losses == losses


def test_a_fine_tuning_dump_of_version_0_1_is_refused(tmp_path: Path) -> None:
    dump, _ = dumped(learner_for(EXCLUSIVE), batch(EXCLUSIVE), tmp_path)

    def as_before(card: dict[str, Any]) -> None:
        del card["objective"]
        card["config"] = {"task": "esc50", "frontend": FRONTEND.to_dict(), "distillation": vars(DistillationConfig())}

    with pytest.raises(ValueError, match="a fine-tuning run of version 0.1, which did not save its objective"):
        run_dump(changed(dump, as_before))


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.pop("student"),
        lambda card: card.update(student=None),
        lambda card: card["student"].pop("num_classes"),
        lambda card: card["objective"].pop("settings"),
        lambda card: card["objective"]["settings"].pop("loss"),
        lambda card: card["objective"]["settings"]["loss"].update(colour="red"),
    ],
)
def test_an_incomplete_dump_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    dump, _ = dumped(learner_for(INDEPENDENT), batch(INDEPENDENT), tmp_path)
    with pytest.raises(ValueError, match=r"dump\.json is incomplete or damaged"):
        run_dump(changed(dump, change))


def test_what_is_no_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match="dump.json"):
        run_dump(tmp_path)
