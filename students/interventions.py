"""Looking inside a DyMN: disturb what its dynamic parts compute from a clip, and record what its Dy-ReLUs do.

Schmid, Koutini and Widmer, "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio Models", 2023, Section VII,
Table XII and Fig. 6. Everything is done by hooks on modules, so that a student outside the context is the student as it was:

    Dy-Conv   ``residuals[0]`` returns the logits of the kernels (B, K): what is done to them is done to their softmax.
    Dy-ReLU   ``coef_net`` returns slopes and intercepts before the sigmoid, (B, C * 2M), channel by channel.
    CA        ``recalibration`` is given the weights (B, C, F, 1) and (B, C, 1, T).

Shapes: B batch, C channels, F frequency positions, T time positions, K kernels, M maps of Dy-ReLU.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from students.families.dymn import DyMN, DynamicBlock, DynamicConv, DynamicReLU, Recalibration
from students.interface import Student

Coefficients = Sequence[Tensor]
"""What a module gives to the maps of a batch: one tensor, or coordinate attention's one or two; the first axis is the clip."""
Change = Callable[[Coefficients], Coefficients]
Method = Callable[[np.random.Generator], Change]
"""Begins one forward pass: what is drawn for all blocks together is drawn once."""

PARTS = {"CA": Recalibration, "Dy-Conv": DynamicConv, "Dy-ReLU": DynamicReLU}
"""The dynamic parts as the paper calls them, and what each is in a block."""


# --- What is done to coefficients --------------------------------------------------------------------------------------


def _untouched(rng: np.random.Generator) -> Change:
    """Coefficients as they are."""
    return lambda coefficients: coefficients


def other_clips(rng: np.random.Generator, batch: int) -> np.ndarray:
    """For each clip of a batch the index of another one, (batch,); every clip is taken once. ValueError for a batch of one."""
    if batch < 2:
        raise ValueError(f"context shuffle takes a clip's context from another clip of the batch; found {batch} clip")
    order = rng.permutation(batch)
    partners = np.empty_like(order)
    partners[order] = np.roll(order, 1)  # one cycle through all clips, so that none meets itself
    return partners


def _context_shuffle(rng: np.random.Generator) -> Change:
    """Coefficients of another clip, in all blocks of the same one."""
    partners = functools.cache(lambda batch: torch.from_numpy(other_clips(rng, batch)))

    def change(coefficients: Coefficients) -> Coefficients:
        return [one[partners(len(one)).to(one.device)] for one in coefficients]

    return change


def _shuffle(*axes: int) -> Method:
    """A random order along axes, one after the other: for each clip and block its own, the same for all else in them."""

    def begin(rng: np.random.Generator) -> Change:
        def change(coefficients: Coefficients) -> Coefficients:
            for axis in axes:
                coefficients = _shuffled(coefficients, axis, rng)
            return coefficients

        return change

    return begin


def _shuffled(coefficients: Coefficients, axis: int, rng: np.random.Generator) -> Coefficients:
    sizes = {one.shape[axis] for one in coefficients} - {1}
    if not sizes:
        return coefficients
    (size,) = sizes
    batch = len(coefficients[0])
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(size), (batch, 1)), axis=1))
    shape = [1] * coefficients[0].ndim
    shape[0], shape[axis] = batch, size
    order = order.view(shape)
    return [
        one if one.shape[axis] == 1 else torch.take_along_dim(one, order.to(one.device), axis) for one in coefficients
    ]


def _uniform(rng: np.random.Generator) -> Change:
    """Every kernel with the weight 1 / K."""
    return lambda logits: [torch.zeros_like(one) for one in logits]


def _maximum(rng: np.random.Generator) -> Change:
    """The kernel of the largest weight alone."""

    def change(logits: Coefficients) -> Coefficients:
        return [torch.full_like(one, -torch.inf).scatter(1, one.argmax(1, keepdim=True), 0.0) for one in logits]

    return change


METHODS: dict[str, dict[str, Method]] = {
    "CA": {
        "context shuffle": _context_shuffle,
        "channel shuffle": _shuffle(1),
        "spatial shuffle": _shuffle(2, 3),
        "time shuffle": _shuffle(3),
        "frequency shuffle": _shuffle(2),
    },
    "Dy-Conv": {
        "context shuffle": _context_shuffle,
        "attention shuffle": _shuffle(1),
        "uniform attention": _uniform,
        "max attention": _maximum,
    },
    "Dy-ReLU": {"context shuffle": _context_shuffle, "channel shuffle": _shuffle(1)},
}
"""Table XII, in its order: part, then inspection method."""

IDENTITY = "untouched"
"""A method of every part that changes nothing, to check the others by."""

DETERMINISTIC = ("uniform attention", "max attention", IDENTITY)
"""Methods that draw nothing: one pass tells all."""


# --- The student -------------------------------------------------------------------------------------------------------


def methods_for(student: Student) -> list[tuple[str, str]]:
    """(part, method) pairs of Table XII that do something to this student.

    Raises:
        ValueError: it is no DyMN, or one whose options leave out every dynamic part.
    """
    _checked(student)
    axes = student.options.coord_axes
    idle = {"f": {"time shuffle", "spatial shuffle"}, "t": {"frequency shuffle", "spatial shuffle"}}.get(axes, set())
    found = [
        (part, method)
        for part, methods in METHODS.items()
        if any(isinstance(module, PARTS[part]) for module in student.modules())
        for method in methods
        if part != "CA" or method not in idle  # over one axis alone, "spatial" is that axis
    ]
    if not found:
        raise ValueError("this DyMN has no dynamic part: its options leave out dyconv, dyrelu and coord_attention")
    return found


@contextmanager
def intervention(student: Student, part: str, method: str, rng: np.random.Generator) -> Iterator[None]:
    """Inside the context, a part's coefficients are changed in all blocks; one forward pass for each context.

    The blocks run on what the blocks before them made of the change, also where they compute coefficients.

    Args:
        part: one of ``PARTS``.
        method: one of ``METHODS[part]``, or ``IDENTITY``.
        rng: draws what is shuffled, first for the first block.

    Raises:
        ValueError: another part or method, a student without the part; inside, a batch of one where the context is shuffled.
    """
    _checked(student)
    if part not in METHODS:
        raise ValueError(f"unknown part {part!r}; choices: {', '.join(METHODS)}")
    if method not in METHODS[part] and method != IDENTITY:
        raise ValueError(f"unknown method {method!r} of {part}; choices: {', '.join((*METHODS[part], IDENTITY))}")
    modules = [module for module in student.modules() if isinstance(module, PARTS[part])]
    if not modules:
        raise ValueError(f"this DyMN has no {part}")
    change = _untouched(rng) if method == IDENTITY else METHODS[part][method](rng)
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(_hook(module, change).remove)
        yield


def _hook(module: nn.Module, change: Change) -> torch.utils.hooks.RemovableHandle:
    if isinstance(module, Recalibration):

        def change_weights(_: nn.Module, inputs: tuple[Tensor, Tensor | None, Tensor | None]) -> tuple:
            x, *weights = inputs
            changed = iter(change([one for one in weights if one is not None]))
            return x, *(None if one is None else next(changed) for one in weights)

        return module.register_forward_pre_hook(change_weights)

    def change_output(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if isinstance(module, DynamicReLU):
            return change([output.unflatten(1, (module.channels, -1))])[0].flatten(1)
        return change([output])[0]

    layer = module.coef_net if isinstance(module, DynamicReLU) else module.residuals[0]
    return layer.register_forward_hook(change_output)


# --- Dy-ReLU -----------------------------------------------------------------------------------------------------------


class ReLUPlace(NamedTuple):
    """Where a Dy-ReLU stands."""

    block: int
    """1 to 15, as in Fig. 6."""
    position: int
    """In the block: after the expansion (1), the depthwise convolution (2) or the projection (3)."""


def dynamic_relus(student: Student) -> dict[ReLUPlace, DynamicReLU]:
    """The student's Dy-ReLUs in order. Raises ValueError for a student that is no DyMN."""
    _checked(student)
    return {
        ReLUPlace(number, position): activation
        for number, block in enumerate(student.layers, start=1)
        if isinstance(block, DynamicBlock)
        for position, name in enumerate(("exp_act", "depth_act", "proj_act"), start=1)
        if isinstance(activation := getattr(block, name, None), DynamicReLU)
    }


@contextmanager
def watched_relus(
    student: Student, places: Sequence[ReLUPlace], watch: Callable[[ReLUPlace, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside the context, ``watch(place, input, output)`` is called with maps (B, C, F, T) of the Dy-ReLUs in ``places``.

    The maps are the student's own: what is kept of them has to be copied.
    """
    relus = dynamic_relus(student)
    with ExitStack() as hooks:
        for place in places:
            hook = functools.partial(_show, watch, place)
            hooks.callback(relus[place].register_forward_hook(hook).remove)
        yield


def _show(watch: Callable, place: ReLUPlace, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    watch(place, inputs[0], output)


def _checked(student: nn.Module) -> None:
    if not isinstance(student, DyMN):
        raise ValueError(f"only a DyMN has dynamic parts to look into; found {type(student).__name__}")
