"""A trained student with a linear classifier in place of its head: what a linear probe is saved as.

Shapes: B batch, E embedding size, K classes.
"""

import torch
from torch import Tensor, nn

from students.catalog import create_student, default_options
from students.interface import StateDict, Student
from students.weights import config_of

FRAMES = 200
"""Length of the noise on which a student's head is tried."""


def with_linear_head(student: Student, weight: Tensor, bias: Tensor, n_mels: int) -> Student:
    """A copy of a student, in evaluation mode, whose logits are ``embedding @ weight.T + bias``.

    A family with an option ``head`` gets its head "linear". The last linear layer of any other family's head must take the
    embedding as it is.

    Args:
        weight: (K, E).
        bias: (K,).
        n_mels: mel bands that the student hears.

    Raises:
        ValueError: a student whose logits cannot be a linear function of its embedding.
    """
    config = config_of(student)
    refused = ValueError(f"the head of {config.name} cannot be replaced by a linear layer on its embedding")
    options = dict(config.options)
    if "head" in default_options(config.name):
        options["head"] = "linear"
    try:
        copy = create_student(config.name, len(bias), **options)
    except ValueError as error:
        raise refused from error
    layers = [module for module in copy.classifier.modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1].weight.shape != weight.shape:
        raise refused
    copy.load_state_dict(_tensors_before_the_head(student, copy, refused), strict=False)
    copy.eval()
    if not _is_linear(copy, layers[-1], n_mels):
        raise refused
    with torch.no_grad():
        layers[-1].weight.copy_(weight)
        layers[-1].bias.copy_(bias)
    return copy


def _tensors_before_the_head(student: Student, copy: Student, refused: ValueError) -> StateDict:
    """The student's tensors that are not its head's, all of which the copy must have."""
    head = {id(tensor) for tensor in copy.classifier.state_dict(keep_vars=True).values()}
    trained, found = student.state_dict(), {}
    for name, value in copy.state_dict(keep_vars=True).items():
        if id(value) in head:
            continue
        if name not in trained:
            raise refused
        if trained[name].shape == value.shape:
            found[name] = trained[name]
        elif (len(trained[name]), len(value)) != (student.num_classes, copy.num_classes):
            raise refused
    return found


@torch.no_grad()
def _is_linear(student: Student, layer: nn.Linear, n_mels: int) -> bool:
    """Whether the logits for noise are what the layer makes of the embedding."""
    random = torch.Generator().manual_seed(0)
    for parameter in (layer.weight, layer.bias):
        parameter.copy_(torch.randn(parameter.shape, generator=random))
    logits, embedding = student(torch.randn(2, 1, n_mels, FRAMES, generator=random))
    if embedding.shape[1:] != (layer.in_features,):
        return False
    expected = nn.functional.linear(embedding, layer.weight, layer.bias)
    return torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)
