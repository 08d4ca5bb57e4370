"""A student of two layers, which is exported in a few seconds; ``tests.kd.deploy`` imports it as ``tiny_student:Tiny``."""

import torch
from torch import Tensor, nn

from students.interface import Student, StudentOutput


class Tiny(Student):
    """Convolution, trained batch norm, ReLU, 1×1 convolution, mean, linear."""

    def __init__(self, num_classes: int, options: object) -> None:
        super().__init__(num_classes, embedding_dim=16)
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1)
        )
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, num_classes))

    def forward(self, mel: Tensor) -> StudentOutput:
        x = self.features(mel)
        return StudentOutput(self.classifier(x), x.mean((2, 3)))

    def output_biases(self) -> Tensor:
        return self.classifier[-1].bias


def train_batch_norms(student: Student) -> Student:
    """Gives batch norms statistics and weights that differ from those of a fresh student."""
    draws = torch.Generator().manual_seed(3)
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=draws)
    return student.eval()
