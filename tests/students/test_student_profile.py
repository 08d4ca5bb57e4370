"""Profiles of small networks whose cost can be written down."""

import torch
from torch import nn

from students import create_student
from students.interface import Student, StudentOutput
from students.profile import profile_student


class Tiny(Student):
    def __init__(self) -> None:
        super().__init__(num_classes=3, embedding_dim=4)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=True)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, mel: torch.Tensor) -> StudentOutput:
        embedding = self.norm(self.depthwise(self.conv(mel))).mean((2, 3))
        return StudentOutput(self.linear(embedding), embedding)


def test_counts_what_can_be_counted_by_hand() -> None:
    profile = profile_student(Tiny(), n_mels=8, frames=20, channels=2)
    positions = 4 * 10
    assert profile.macs == positions * 4 * 2 * 9 + positions * 4 * 9 + 4 * 3
    assert profile.parameters == (4 * 2 * 9 + 4) + 4 * 9 + 8 + (12 + 3)
    # The input stays; the first map goes once the second is there, the second once it is normalised.
    input_bytes, map_bytes = 2 * 8 * 20 * 4, 4 * positions * 4
    assert profile.activation_bytes == input_bytes + 2 * map_bytes


def test_cost_grows_with_the_clip_and_parameters_do_not() -> None:
    student = create_student("mn01", num_classes=10, n_mels=64)
    short, long = (profile_student(student, n_mels=64, frames=frames) for frames in (400, 800))
    assert short.parameters == long.parameters
    assert 1.95 < long.macs / short.macs < 2.0
    assert 1.9 < long.activation_bytes / short.activation_bytes <= 2.0


def test_leaves_the_student_as_it_was() -> None:
    student = create_student("mn01", num_classes=10).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    profile_student(student)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks for module in student.modules())
