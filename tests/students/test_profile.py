"""Profiles of small networks whose cost can be written down."""

import torch
from torch import nn

from students import create_student
from students.interface import Student, StudentOutput
from students.layers.attention import GlobalContext, create_attention
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


class Attending(Student):
    """A convolution and global context, whose weighted mean over the map is a matrix product of its own."""

    def __init__(self) -> None:
        super().__init__(num_classes=3, embedding_dim=16)
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.attention = create_attention("gc", 16, 2)

    def forward(self, mel: torch.Tensor) -> StudentOutput:
        embedding = self.attention(self.conv(mel)).mean((2, 3))
        return StudentOutput(embedding[:, :3], embedding)


def test_counts_matrix_products_outside_of_layers() -> None:
    profile = profile_student(Attending(), n_mels=8, frames=20)
    positions = 8 * 20
    convolution, attention, weighted_mean, transform = positions * 16 * 9, positions * 16, positions * 16, 2 * 16 * 8
    assert profile.macs == convolution + attention + weighted_mean + transform


def test_attention_of_mn_with_global_context_is_counted() -> None:
    """The weighted mean alone is C·F·T in every block: 3.5 million of mn10's multiply-accumulates."""
    student = create_student("mn10", num_classes=527, attention="gc")
    maps: list[int] = []
    for module in student.modules():
        if isinstance(module, GlobalContext):
            module.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].numel()))
    layers: list[int] = []
    for module in student.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda layer, _, output: layers.append(output.numel() * layer.weight[0].numel())
            )
    found = profile_student(student).macs
    assert sum(maps) == 3_543_616
    assert found == sum(layers) + sum(maps)


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
