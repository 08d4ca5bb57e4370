"""Starting a student on a new task: its weights, its frozen parts, and the learning rate of each layer."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd.run_folder.config import parse_options
from students import create_student, load_weights
from students.card import WEIGHTS_FILE, StudentCard, read_card
from students.catalog import options_for
from students.frontend import LogMelConfig
from students.interface import Student
from students.weights import OtherClasses, check_imagenet_weights, imagenet_architecture, load_imagenet_weights

Freeze = Literal["none", "backbone", "batch-norm"]
HEAD = "head"
IMAGENET = "imagenet"


@dataclass(frozen=True)
class Start:
    """A student's starting point."""

    name: str
    options: dict[str, Any]
    weights: str | None = None
    """A file, "imagenet", or None for a fresh student."""
    class_names: tuple[str, ...] | None = None
    """The classes of the weights' last layer, if known."""


def start_from_run(folder: Path, allow: Sequence[str] = ()) -> tuple[Start, StudentCard]:
    """The trained student in a run folder as a starting point, and its card.

    ``allow``: names of the form ``module:Class`` that the card may ask for.

    Raises ValueError if the folder contains no student, or one that is not allowed.
    """
    card = read_card(folder, allow)
    weights = str(folder / WEIGHTS_FILE)
    return Start(card.config.name, dict(card.config.options), weights, card.class_names), card


def starting_student(
    start: Start,
    class_names: Sequence[str],
    frontend: LogMelConfig,
    *,
    seed: int,
    prior: np.ndarray | None = None,
    keep_classes: bool = False,
) -> Student:
    """A student with its initial weights. Equal arguments give equal weights, bit for bit.

    The layer that outputs the classes is drawn from ``seed``, unless the weights are known to have the same classes, or
    ``keep_classes`` is set and the weights have as many classes.

    Args:
        prior: (C,), the class frequencies that a fresh last layer predicts at first; None means 1/2. Without a prior, training
            spends its first steps on lowering every logit.

    Raises:
        ValueError: an unknown student or option, or weights that do not fit.
    """
    options = options_for(start.name, start.options, frontend)
    same_classes = keep_classes or start.class_names == tuple(class_names)
    loads_classes = start.weights not in (None, IMAGENET) and same_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = create_student(start.name, len(class_names), **options)
        if start.weights == IMAGENET:
            load_imagenet_weights(student, _imagenet_tensors(student))
        elif start.weights is not None:
            loads_classes = _load_weights(student, start.weights, same_classes)
    if prior is not None and not loads_classes:
        student.set_class_prior(torch.as_tensor(prior))
    return student


def _load_weights(student: Student, weights: str, same_classes: bool) -> bool:
    """Loads weights, and reinitialises the last layer for other classes. Returns whether the file's last layer is used."""
    try:
        load_weights(student, weights, new_classes=not same_classes)
    except OtherClasses:  # then they are surely other classes; the student warns of its new layer
        load_weights(student, weights, new_classes=True)
        return False
    return same_classes


@functools.cache  # a configuration is made several times on its way from a recipe to a run
def check_imagenet_start(name: str, student_options: tuple[str, ...], frontend: LogMelConfig) -> None:
    """Raises ValueError for a student that ImageNet's weights do not fit; reads no data and downloads nothing."""
    options = options_for(name, parse_options(student_options), frontend)
    with torch.device("meta"):
        student = create_student(name, num_classes=2, **options)
    check_imagenet_weights(student)


def _imagenet_tensors(student: Student) -> dict[str, torch.Tensor]:
    """The weights of the student's ImageNet network, from timm's cache or the network. ValueError where they do not fit it."""
    import timm

    check_imagenet_weights(student)
    architecture = imagenet_architecture(student)
    try:
        return timm.create_model(architecture, pretrained=True).state_dict()
    except Exception as error:  # of httpx, requests, huggingface_hub or urllib, whichever timm's version downloads with
        raise OSError(
            f"timm's weights of {architecture} cannot be downloaded ({type(error).__name__}: {error}); fetch them where there is a "
            "network, and copy Hugging Face's cache folder (HF_HOME) here"
        ) from error


def freeze(student: Student, what: Freeze) -> list[nn.Module]:
    """Freezes part of a student, and returns the modules that must stay in evaluation mode during training.

    "backbone": only the layers after the last feature map are trained; all others keep their weights and statistics.
    "batch-norm": all batch norms except the first use fixed running statistics; their scale and shift are trained (Slow-Fast
    auditory streams and AudioRepInceptionNeXt, Section IV: "all the batch normalization layers except the first one in the stem").
    """
    if what == "backbone":
        student.requires_grad_(False)
        student.classifier.requires_grad_(True)
        return [module for module in student.children() if module is not student.classifier]
    if what == "batch-norm":
        return [module for module in student.modules() if isinstance(module, _BatchNorm)][1:]
    return []


def layer_groups(student: Student, decay: float) -> list[dict[str, Any]]:
    """Trainable parameters grouped by depth, for ``optimization.create_optimizer``. Each group has ``decay`` times the next one's
    learning rate.

    The head has the full learning rate; with ``decay`` 1 all layers have it. A depth is one entry of the student's
    chain of layers, as in timm. All layers before the chain form one depth.
    """
    head = {id(parameter) for parameter in student.classifier.parameters()}
    depths: dict[str, list[nn.Parameter]] = {}
    current = "stem"
    for name, parameter in student.named_parameters():
        parts = name.split(".")
        index = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if id(parameter) in head:
            current = HEAD
        elif parameter.ndim > 1 and (index is not None or current != "stem"):
            # Norms and biases belong to the layer before them.
            current = ".".join(parts[: len(parts) - 1 if index is None else index + 1])
        depths.setdefault(current, [])
        if parameter.requires_grad:
            depths[current].append(parameter)
    order = [depth for depth in depths if depth != HEAD] + [HEAD]
    return [
        {"params": depths[depth], "lr_scale": decay ** (len(order) - 1 - place)}
        for place, depth in enumerate(order)
        if depths.get(depth)
    ]
