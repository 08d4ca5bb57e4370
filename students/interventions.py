"""Looking inside a DyMN: change the coefficients that its dynamic parts compute, and record what its Dy-ReLUs do.

Schmid, Koutini and Widmer, "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio Models", 2023, Section VII,
Table XII and Fig. 6. All changes are made by hooks on modules and end with the context:

    Dy-Conv   ``residuals[0]`` returns the logits of the kernels (B, K). Changing them changes the softmax accordingly.
    Dy-ReLU   ``coef_net`` returns slopes and intercepts before the sigmoid, (B, C * 2M), channel by channel.
    CA        ``recalibration`` takes the weights (B, C, F, 1) and (B, C, 1, T).

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
"""The coefficients of a batch in one module: one tensor, or one or two for coordinate attention; the first axis is the clip."""
Change = Callable[[Coefficients], Coefficients]
Method = Callable[[np.random.Generator], Change]
"""Starts one forward pass: random choices that all blocks share are made once."""

PARTS = {"CA": Recalibration, "Dy-Conv": DynamicConv, "Dy-ReLU": DynamicReLU}
"""The dynamic parts by their names in the paper, and the class of each."""


# --- Changes of coefficients -------------------------------------------------------------------------------------------


def _untouched(rng: np.random.Generator) -> Change:
    """Leaves coefficients unchanged."""
    return lambda coefficients: coefficients


def other_clips(rng: np.random.Generator, batch: int) -> np.ndarray:
    """The index of another clip for each clip of a batch, (batch,); each clip is used once. ValueError for a batch of one."""
    if batch < 2:
        raise ValueError(f"context shuffle takes a clip's context from another clip of the batch; found {batch} clip")
    order = rng.permutation(batch)
    partners = np.empty_like(order)
    partners[order] = np.roll(order, 1)  # one cycle through all clips, so that no clip is paired with itself
    return partners


def _context_shuffle(rng: np.random.Generator) -> Change:
    """Takes the coefficients of another clip, the same one in all blocks."""
    partners = functools.cache(lambda batch: torch.from_numpy(other_clips(rng, batch)))

    def change(coefficients: Coefficients) -> Coefficients:
        return [one[partners(len(one)).to(one.device)] for one in coefficients]

    return change


def _shuffle(*axes: int) -> Method:
    """Shuffles along each of the axes in turn, in a new random order for each clip and block."""

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
    """Gives every kernel the weight 1 / K."""
    return lambda logits: [torch.zeros_like(one) for one in logits]


def _maximum(rng: np.random.Generator) -> Change:
    """Uses only the kernel with the largest weight."""

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
"""The methods of Table XII in its order, by part and by inspection method."""

IDENTITY = "untouched"
"""A method for every part that changes nothing, as a check."""

DETERMINISTIC = ("uniform attention", "max attention", IDENTITY)
"""Methods without randomness, for which one pass is enough."""


# --- The student -------------------------------------------------------------------------------------------------------


def methods_for(student: Student) -> list[tuple[str, str]]:
    """The (part, method) pairs of Table XII that apply to this student.

    Raises:
        ValueError: it is not a DyMN, or its options leave out every dynamic part.
    """
    _checked(student)
    axes = student.options.coord_axes
    idle = {"f": {"time shuffle", "spatial shuffle"}, "t": {"frequency shuffle", "spatial shuffle"}}.get(axes, set())
    found = [
        (part, method)
        for part, methods in METHODS.items()
        if any(isinstance(module, PARTS[part]) for module in student.modules())
        for method in methods
        if part != "CA" or method not in idle  # with one axis only, "spatial" would be the same as that axis
    ]
    if not found:
        raise ValueError("this DyMN has no dynamic part: its options leave out dyconv, dyrelu and coord_attention")
    return found


@contextmanager
def intervention(student: Student, part: str, method: str, rng: np.random.Generator) -> Iterator[None]:
    """Inside the context, a part's coefficients are changed in all blocks. Use one context per forward pass.

    Each block gets the changed output of the blocks before it and computes its coefficients from that.

    Args:
        part: one of ``PARTS``.
        method: one of ``METHODS[part]``, or ``IDENTITY``.
        rng: draws the shuffles, in the order of the blocks.

    Raises:
        ValueError: unknown part or method, or a student without the part; in a forward pass, a batch of one with context shuffle.
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
    """The place of a Dy-ReLU."""

    block: int
    """1 to 15, as in Fig. 6."""
    position: int
    """Position in the block: after the expansion (1), the depthwise convolution (2) or the projection (3)."""


def dynamic_relus(student: Student) -> dict[ReLUPlace, DynamicReLU]:
    """The student's Dy-ReLUs in order. Raises ValueError for a student that is not a DyMN."""
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
    """Inside the context, ``watch(place, input, output)`` is called with the maps (B, C, F, T) of the Dy-ReLUs in ``places``.

    The maps are the student's own tensors: copy anything that you want to keep.
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
        raise ValueError(f"only a DyMN has dynamic parts to inspect; found {type(student).__name__}")
