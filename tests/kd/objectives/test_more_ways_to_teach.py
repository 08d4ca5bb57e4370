"""Hard pseudo-labels, softened students, teachers beside the student and a student's own average, each against a second formula."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.objectives.base import Objective, ObjectiveSettings
from kd.objectives.catalog import create_objective
from kd.objectives.settings import DistillationConfig
from kd.training.learner import Learner
from students import create_student
from students.card import save_student
from students.frontend import LogMel, LogMelConfig
from students.interface import StudentOutput

FRONTEND, OTHER = LogMelConfig(n_mels=64, hop_samples=640), LogMelConfig(n_mels=32, hop_samples=800)
SPACES = {
    "several": LabelSpace.single(("a", "b", "c", "d", "e"), exclusive=False),
    "one": LabelSpace.single(("a", "b", "c", "d", "e"), exclusive=True),
    "groups": LabelSpace((LabelGroup("one", ("a", "b", "c"), True), LabelGroup("any", ("d", "e"), False))),
}


class MeanStudent(nn.Module):
    """Logits are a linear map of the mean log-mel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 5)

    def forward(self, mel: Tensor) -> StudentOutput:
        mean = mel.mean(dim=(1, 3))
        self.said = StudentOutput(self.linear(mean), mean)
        return self.said


def made(
    name: str, space: str = "several", label_weight: float = 0.0, temperature: float = 1.0, **options: Any
) -> Objective:
    distillation = DistillationConfig(label_weight, temperature)
    torch.manual_seed(1)
    return create_objective(
        name, ObjectiveSettings(FRONTEND, SPACES[space], 64, distillation=distillation, options=options)
    )


def batch(stored: bool = True, mixed: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(2)
    targets = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 1]])
    full = {
        "waveform": 0.1 * torch.randn(4, 12800),
        "targets": targets,
        "sample_key": torch.arange(4),
        "time_masks": torch.tensor([[[0.1, 0.4]]] * 4),
    }
    if stored:
        full |= {"teacher_logits": 3 * torch.randn(4, 5), "has_teacher": torch.ones(4, dtype=torch.bool)}
    return full | ({"mix_weight": torch.tensor([0.9, 0.6, 0.7, 1.0])} if mixed else {})


# -- Soft targets ------------------------------------------------------------------------------------------------------


def test_soft_targets_are_the_divergence_at_the_temperature() -> None:
    student, data = MeanStudent(), batch()
    for space in ("one", "several"):
        losses = made("soft-targets", space, temperature=3.0)(student, data)
        z, t = student.said.logits / 3.0, data["teacher_logits"] / 3.0
        if space == "one":
            expected = 9.0 * F.kl_div(z.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)
        else:
            p, q = torch.sigmoid(t), torch.sigmoid(z)
            expected = 9.0 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        torch.testing.assert_close(losses["loss"], expected)


def test_at_temperature_one_soft_targets_have_the_gradient_of_distillation() -> None:
    gradients = []
    for name in ("soft-targets", "distillation"):
        student = MeanStudent()
        made(name, "groups", label_weight=0.2)(student, batch(mixed=True))["loss"].backward()
        gradients.append(student.linear.weight.grad)
    torch.testing.assert_close(*gradients)


# -- Pseudo-labels -----------------------------------------------------------------------------------------------------


def test_pseudo_labels_are_what_the_teacher_is_sure_of() -> None:
    student, data = MeanStudent(), batch()
    data["teacher_logits"] = torch.tensor(
        [[4.0, -4, 0, 1, -5], [0, 0.1, 0, 0.2, 0.1], [9, 8, 8, 5, 5], [-1.0, 3, -1, -4, 1]]
    )
    losses = made("pseudo-labels", "several", threshold=0.9)(student, data)
    z, t, clips = student.said.logits, data["teacher_logits"], []
    for clip in range(4):
        terms = []
        for k in range(5):
            p = torch.sigmoid(t[clip, k])
            if p >= 0.9:
                terms.append(-torch.sigmoid(z[clip, k]).log())
            elif p <= 0.1:
                terms.append(-(1 - torch.sigmoid(z[clip, k])).log())
        clips.append(torch.stack(terms).mean() if terms else None)
    assert [loss is None for loss in clips] == [False, True, False, False]
    torch.testing.assert_close(
        losses["distillation_loss"], torch.stack([loss for loss in clips if loss is not None]).mean()
    )
    assert losses["decided_clips"] == 0.75
    alone = made("distillation", "several", label_weight=1.0)
    bce = F.binary_cross_entropy_with_logits(z[1], data["targets"][1])
    torch.testing.assert_close(alone(student, {k: v[1:2] for k, v in data.items()})["loss"], bce)
    # The clip without a decision is trained on its labels alone.
    torch.testing.assert_close(losses["loss"], (sum(loss for loss in clips if loss is not None) + bce) / 4)


def test_pseudo_labels_of_exclusive_classes_and_mixtures() -> None:
    student, data = MeanStudent(), batch(mixed=True)
    data["teacher_logits"] = torch.tensor([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0], [0, 0, 9.0, 0, 0], [1.0, 1, 0, 0, 0]])
    losses = made("pseudo-labels", "one", threshold=0.8)(student, data)
    log_q = student.said.logits.log_softmax(1)
    pair = torch.stack([-(0.9 * log_q[0, 0] + 0.1 * log_q[0, 1]), -(0.6 * log_q[1, 1] + 0.4 * log_q[1, 0])])
    torch.testing.assert_close(losses["distillation_loss"], pair.mean())  # clip 3 is not sure, nor are its mixtures
    assert losses["decided_clips"] == 0.5
    everywhere = made("pseudo-labels", "one", threshold=0.0)(student, data)
    assert everywhere["decided_clips"] == 1.0
    assert everywhere["loss"].isfinite()
    with pytest.raises(ValueError, match="threshold must be at least 0 and below 1; found 1.5"):
        made("pseudo-labels", threshold=1.5)


# -- Teachers beside the student ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with another front end than the student's."""
    folder = tmp_path_factory.mktemp("run") / "teacher"
    torch.manual_seed(5)
    save_student(folder, create_student("mn01", 5, n_mels=32), SPACES["one"].class_names, OTHER, {"link": "softmax"})
    return folder


def heard(teacher: Path, data: dict[str, Tensor]) -> StudentOutput:
    """What the teacher says of the batch as it is shown, by hand."""
    from students.card import load_student

    mel = LogMel(OTHER)(data["waveform"])
    if "mix_weight" in data:
        mel = torch.stack([w * mel[i] + (1 - w) * mel[i ^ 1] for i, w in enumerate(data["mix_weight"])])
    start, end = (math.ceil(share * mel.shape[-1]) for share in (0.1, 0.4))
    for clip in mel:
        clip[..., start:end] = clip.mean()
    with torch.no_grad():
        return load_student(teacher)(mel)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_online_teacher_hears_the_very_batch(teacher: Path, mixed: bool) -> None:
    student, data = MeanStudent(), batch(stored=False, mixed=mixed)
    objective = made("online", "several", temperature=2.0, teacher=str(teacher))
    losses = objective(student, data)
    p = torch.softmax(heard(teacher, data).logits / 2.0, 1)  # its own link, also for a student with sigmoids
    expected = F.binary_cross_entropy_with_logits(student.said.logits, p)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-3, atol=1e-4)
    assert not objective.state_dict()
    assert not list(objective.parameters())
    with pytest.raises(ValueError, match="leave out --logits"):
        objective(student, batch())


def test_embeddings_are_compared_through_a_projection(teacher: Path) -> None:
    student, data = MeanStudent(), batch(stored=False)
    objective = made("embedding", "several", label_weight=1.0, teacher=str(teacher), weight=0.5)
    losses = objective(student, data)
    mine = student.said.embedding @ objective.projection.weight.T + objective.projection.bias
    theirs = heard(teacher, data).embedding
    cosine = (mine * theirs).sum(1) / mine.norm(dim=1) / theirs.norm(dim=1)
    torch.testing.assert_close(losses["embedding_loss"], (1 - cosine).mean(), rtol=1e-3, atol=1e-4)
    labels = F.binary_cross_entropy_with_logits(student.said.logits, data["targets"])
    torch.testing.assert_close(losses["loss"], labels + 0.5 * losses["embedding_loss"])
    losses["loss"].backward()
    assert objective.projection.weight.grad.abs().sum() > 0
    assert list(objective.state_dict()) == ["projection.weight", "projection.bias"]  # and nothing of the teacher


def test_teachers_beside_the_student_that_are_refused(teacher: Path, tmp_path: Path) -> None:
    for options, message in (
        ({}, "name the teacher"),
        ({"teacher": "nowhere"}, "a run folder or NAME@WEIGHTS"),
        ({"teacher": str(teacher), "link": "relu"}, "link must be sigmoid or softmax"),
    ):
        with pytest.raises(ValueError, match=message):
            made("online", **options)
    save_student(tmp_path, create_student("mn01", 3), ("a", "b", "x"), LogMelConfig())
    with pytest.raises(ValueError, match="class"):
        made("online", teacher=str(tmp_path))
    save_student(tmp_path, create_student("mn01", 5), SPACES["one"].class_names, LogMelConfig())
    with pytest.raises(ValueError, match="add link=sigmoid or link=softmax"):
        made("online", teacher=str(tmp_path))
    assert made("online", teacher=str(tmp_path), link="sigmoid").link.to_json() == "sigmoid"
    assert made("online", "one", teacher=str(tmp_path)).link is None  # a softmax over exclusive classes either way


# -- The student's own average -----------------------------------------------------------------------------------------


def test_a_mean_teacher_is_the_average_of_the_weights_so_far() -> None:
    student = create_student("mn01", 5, n_mels=64)
    objective = made("mean-teacher", "one", decay=0.5)
    learner = Learner(student, objective).train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    expected = student.classifier[-1].weight.detach().clone()
    for step in range(1, 13):
        share = 1 - min(0.5, step / (step + 9))
        expected += share * (student.classifier[-1].weight.detach() - expected)
        data = batch(stored=False, mixed=True)
        losses = learner(data)
        with torch.no_grad():
            said = objective.average.eval()(objective.frontend(data["waveform"])).logits.softmax(1)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(objective.average.classifier[-1].weight, expected)
    assert all(parameter.grad is None for parameter in objective.average.parameters())
    targets, everywhere = objective.teacher_targets(
        {**data, "teacher_logits": said.log(), "has_teacher": torch.ones(4) > 0}
    )
    assert everywhere.all()
    torch.testing.assert_close(targets[0], 0.9 * said[0] + 0.1 * said[1])  # mixed as the clips are
    learner.eval()(batch(stored=False))
    assert int(objective.batches) == 12  # it follows in training alone


@pytest.mark.parametrize(("name", "rate_hz"), [("mn01", 32000), ("mergenet16", 16000)])
def test_a_teacher_by_name_and_weights_has_its_published_front_end(tmp_path: Path, name: str, rate_hz: int) -> None:
    """Whatever number of classes the weights have, since embeddings do not depend on them."""
    torch.manual_seed(0)
    network = create_student(name, 7)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    frontend = LogMelConfig(n_mels=64, hop_samples=320, sample_rate_hz=rate_hz, fmax_hz=7500.0)
    settings = ObjectiveSettings(
        frontend,
        SPACES["several"],
        64,
        distillation=DistillationConfig(0.0, 1.0),
        options={"teacher": f"{name}@{tmp_path / 'w.pt'}"},
    )
    beside = create_objective("embedding", settings).teacher
    assert beside.network.num_classes == 7
    assert not beside.network.training
    assert beside.log_mel.config == type(network).published_frontend()
