"""What the tests of several students share."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from students.families.dymn import DynamicConv, DynamicReLU
from students.interface import Student


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Each test draws the same numbers whichever tests ran before: untrained layers amplify rounding, of some draws more."""
    torch.manual_seed(1)  # 0 is that of the students


@pytest.fixture(scope="session")
def as_if_trained() -> Callable[[Student], Student]:
    """Redraws a student's convolutions and batch norms so that maps neither fade nor grow, and sets evaluation mode.

    In a fresh student's evaluation mode they fade to nothing, since the running statistics are not yet its own, and
    any two outputs agree.
    """

    def prepare(student: Student) -> Student:
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.7, 1.4)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, DynamicConv):
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / math.prod(module.kernel_shape[1:])))
                nn.init.kaiming_normal_(module.residuals[0].weight)
            elif isinstance(module, DynamicReLU):
                nn.init.normal_(module.coef_net[0].weight, std=0.1)
        return student.eval()

    return prepare
