"""The optimizer: what it updates and how fast, and its state, whichever kind it is."""

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from kd.training.optimization import OptimizerConfig, create_optimizer, load_optimizer
from kd.training.transfer import freeze, layer_groups
from students import create_student

KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {}),
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "amsgrad": (Adam, {"amsgrad": True}),
    "sgd with momentum": (SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd without momentum": (SGD, {}),
    "rmsprop": (RMSprop, {"momentum": 0.5, "centered": True}),
}


def network(outputs: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def optimizer_of(kind: str, module: nn.Module, **changes: Any) -> Optimizer:
    make, options = KINDS[kind]
    return make(module.parameters(), lr=0.05, **{**options, **changes})


def train(module: nn.Module, optimizer: Optimizer, steps: int) -> None:
    inputs = torch.linspace(-1, 1, 12).reshape(4, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str, wrapped: bool) -> None:
    whole, resumed = network(), network()
    train(whole, optimizer := optimizer_of(kind, whole), 3)
    resumed.load_state_dict(whole.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    again = optimizer_of(kind, resumed)
    if wrapped:
        again = Accelerator(cpu=True).prepare(again)
    load_optimizer(again, saved)
    train(whole, optimizer, 3)
    train(resumed, again, 3)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "sgd with momentum"])
def test_a_step_of_each_kind_needs_its_state(kind: str) -> None:
    """What the test above would not tell apart: without its state the next step is another one."""
    whole, resumed = network(), network()
    train(whole, optimizer := optimizer_of(kind, whole), 3)
    resumed.load_state_dict(whole.state_dict())
    train(whole, optimizer, 1)
    train(resumed, optimizer_of(kind, resumed), 1)
    assert not torch.equal(next(whole.parameters()), next(resumed.parameters()))


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ("adam", "sgd with momentum"),
        ("adam", "sgd without momentum"),
        ("adam", "amsgrad"),
        ("amsgrad", "adamw"),
        ("sgd with momentum", "adam"),
        ("sgd with momentum", "rmsprop"),
        ("rmsprop", "adam"),
    ],
)
def test_a_state_of_another_kind_is_refused(saved: str, loading: str) -> None:
    module = network()
    train(module, optimizer := optimizer_of(saved, module), 1)
    with pytest.raises(ValueError, match="the optimizer's state of a parameter must have"):
        load_optimizer(optimizer_of(loading, network()), optimizer.state_dict())


def test_a_state_of_another_network_is_refused() -> None:
    module = network()
    train(module, optimizer := optimizer_of("adam", module), 1)
    with pytest.raises(ValueError, match=r"exp_avg does not fit a parameter of shape \(5, 4\)"):
        load_optimizer(optimizer_of("adam", network(5)), optimizer.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        load_optimizer(optimizer_of("adam", nn.Linear(3, 2)), optimizer.state_dict())


def test_a_state_of_more_parameters_is_refused() -> None:
    module = network()
    train(module, optimizer := optimizer_of("adam", module), 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][17] = saved["state"][0]
    with pytest.raises(ValueError, match="a parameter that it does not have: 17"):
        load_optimizer(optimizer_of("adam", network()), saved)


def damaged(kind: str, name: str, value: Any) -> tuple[Optimizer, dict[str, Any]]:
    module = network()
    train(module, optimizer := optimizer_of(kind, module), 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = value
    return optimizer_of(kind, network()), saved


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("adam", "step", torch.tensor(0.0), "counts 0.0 steps"),
        ("adam", "step", torch.tensor(float("nan")), "counts nan steps"),
        ("adam", "step", torch.tensor([1.0, 2.0]), "step does not fit a parameter"),
        ("adam", "exp_avg", torch.zeros(4), r"exp_avg does not fit a parameter of shape \(4, 3\)"),
        ("sgd with momentum", "momentum_buffer", torch.zeros(3, 4), r"momentum_buffer does not fit .* shape \(4, 3\)"),
        ("sgd with momentum", "momentum_buffer", 1.0, "momentum_buffer does not fit a parameter"),
    ],
)
def test_a_damaged_state_is_refused(kind: str, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_optimizer(*damaged(kind, name, value))


def test_settings_stay_those_of_the_run_that_goes_on() -> None:
    module = network()
    train(module, optimizer := optimizer_of("sgd with momentum", module), 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["from_elsewhere"] = 1
    other = optimizer_of("sgd with momentum", network(), weight_decay=0.3, momentum=0.5)
    load_optimizer(other, saved)
    (group,) = other.param_groups
    assert (group["weight_decay"], group["momentum"], group["lr"]) == (0.3, 0.5, 0.05)
    assert "from_elsewhere" not in group


def test_parameters_that_never_had_a_gradient_have_no_state_and_are_no_mistake() -> None:
    module = network()
    module[0].requires_grad_(False)
    train(module, optimizer := optimizer_of("adam", module), 2)
    again = optimizer_of("adam", network())
    load_optimizer(again, optimizer.state_dict())
    assert len(again.state_dict()["state"]) == 2


# -- What is optimised -------------------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """An objective that learns one tensor, and keeps one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.kept = nn.Parameter(torch.ones(3), requires_grad=False)


def identities(tensors: list[Tensor]) -> set[int]:
    return {id(tensor) for tensor in tensors}


def test_an_objectives_own_weights_are_optimised_with_the_students() -> None:
    student, objective = create_student("mn01", 3), Weighted()
    (group,) = create_optimizer(OptimizerConfig(learning_rate=0.3), student, objective).param_groups
    assert identities(group["params"]) == identities([*student.parameters(), objective.scale])
    (alone,) = create_optimizer(OptimizerConfig(), student).param_groups
    assert identities(alone["params"]) == identities(list(student.parameters()))


def test_in_groups_an_objectives_weights_learn_at_the_whole_rate() -> None:
    student, objective = create_student("mn01", 3), Weighted()
    groups = layer_groups(student, 0.5)
    found = create_optimizer(OptimizerConfig(), student, objective, groups).param_groups
    assert [group["lr_scale"] for group in found] == [*(group["lr_scale"] for group in groups), 1.0]
    assert identities(found[-1]["params"]) == {id(objective.scale)}
    everything = [parameter for group in found for parameter in group["params"]]
    assert identities(everything) == identities([*student.parameters(), objective.scale])
    assert len(everything) == len(identities(everything))

    freeze(student, "backbone")
    found = create_optimizer(OptimizerConfig(), student, objective, layer_groups(student, 1.0)).param_groups
    assert identities(found[0]["params"]) == identities(list(student.classifier.parameters()))
    assert len(create_optimizer(OptimizerConfig(), student, nn.Module(), layer_groups(student, 1.0)).param_groups) == 1


def test_the_settings_reach_the_optimizer() -> None:
    config = OptimizerConfig(optimizer="adamw", learning_rate=0.3, weight_decay=0.2, adam_epsilon=1e-3)
    built = config.build(list(network().parameters()))
    assert type(built) is AdamW
    assert {name: built.defaults[name] for name in ("lr", "weight_decay", "eps")} == {
        "lr": 0.3,
        "weight_decay": 0.2,
        "eps": 1e-3,
    }
    assert type(OptimizerConfig().build(list(network().parameters()))) is Adam


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"adam_epsilon": 0.0}, {"weight_decay": -1.0}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
