"""The optimizer: its settings, its parameter groups, and its saved state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from audio_datasets.system.messages import brief


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of the student."""

    help_title: ClassVar[str] = "Optimizer"

    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = 8e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay."""
    adam_epsilon: float = 1e-8
    """Epsilon in Adam's denominator. A larger value damps steps where the gradient is only rounding error."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; found {self.learning_rate}")
        if not self.adam_epsilon > 0:
            raise ValueError(f"adam_epsilon must be positive; found {self.adam_epsilon}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative; found {self.weight_decay}")

    def build(self, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]) -> Optimizer:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, eps=self.adam_epsilon)


def create_optimizer(
    config: OptimizerConfig,
    student: nn.Module,
    objective: nn.Module | None = None,
    groups: Sequence[dict[str, Any]] | None = None,
) -> Optimizer:
    """An optimizer for the student and for an objective's own parameters.

    ``groups``: groups of the student's parameters, each with the fraction of the learning rate ("lr_scale") that it uses. Default:
    all use the full learning rate. An objective's own parameters always do.
    """
    own = [] if objective is None else [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if groups is None:
        return config.build([*student.parameters(), *own])
    return config.build([*groups, *([{"params": own, "lr_scale": 1.0}] if own else [])])


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Restores the state of every parameter (Adam's moments and step counts, for example).

    Learning rate, weight decay and other settings stay those of the current run.

    Raises:
        ValueError: the state belongs to other parameters or to another kind of optimizer.
    """
    expected = _shapes_of_state(optimizer)
    for values in saved["state"].values():
        if values.keys() != expected.keys():
            raise ValueError(
                f"the optimizer's state of a parameter must have {brief(list(expected))}; found {brief(list(values))}"
            )
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        for name in group.keys() - own.keys() - {"params"}:
            del group[name]
        group.update(own)
    parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, values in optimizer.state.items():
        if parameter not in parameters:
            raise ValueError(f"the optimizer's state refers to a parameter that it does not have: {brief(parameter)}")
        for name, value in values.items():
            _check_state(name, value, parameter, expected[name])


def _shapes_of_state(optimizer: Optimizer) -> dict[str, bool]:
    """The state that this kind of optimizer keeps for each parameter: for each name, whether it has the parameter's shape.

    Determined by running one step of an optimizer with the same class and settings on a small parameter.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.zeros(2, 3)
    # Settings are copied from the group, because AdamW's defaults include one that its constructor does not accept.
    probe = type(inner)([parameter])
    probe.param_groups[0].update({name: value for name, value in inner.param_groups[0].items() if name != "params"})
    probe.step()
    return {
        name: isinstance(value, Tensor) and value.shape == parameter.shape
        for name, value in probe.state[parameter].items()
    }


def _check_state(name: str, value: Any, parameter: Tensor, has_its_shape: bool) -> None:
    """Raises ValueError unless a value in the optimizer's state is a float tensor of the right shape, and a step is a count."""
    if value is None and name == "momentum_buffer":  # SGD before its first step with momentum
        return
    shape = parameter.shape if has_its_shape else torch.Size()
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        raise ValueError(f"the optimizer's {name} does not fit a parameter of shape {tuple(parameter.shape)}")
    if name == "step" and not 1 <= float(value) < 2**53:
        raise ValueError(f"the optimizer counts {float(value)} steps of a parameter")
