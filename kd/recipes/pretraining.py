"""Training as the papers did it: what `kd pretrain --recipe NAME` takes as defaults.

Everything that two recipes share is in the one that both change. A recipe's fields are those of ``PretrainConfig`` that a paper
decides on; data, run folder and machine are the user's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from audio_datasets.audio.augment import AugmentConfig
from kd.data.sampling import SamplingConfig
from kd.objectives.settings import DistillationConfig
from kd.training.loop import LoopConfig
from kd.training.optimization import OptimizerConfig
from kd.training.schedule import ScheduleConfig
from students.catalog import default_options, list_students, pretraining_learning_rate
from students.frontend import LogMelConfig


@dataclass(frozen=True)
class Recipe:
    """Values for the fields of the same names of ``PretrainConfig``."""

    student: str
    student_options: tuple[str, ...] = ()
    weights: str | None = None
    batch_norm_clips: int | None = 0
    """The papers keep the running statistics."""
    clip_seconds: float = 10.0
    loop: LoopConfig = field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    frontend: LogMelConfig = field(default_factory=LogMelConfig)

    def settings(self) -> dict[str, Any]:
        """For a configuration in Python: ``PretrainConfig(clips=…, out=…, logits=…, **dymn("m").settings())``."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


GLOBAL_BATCH = 120
"""Clips of an optimizer step, over all processes."""


def offline_distillation(student: str) -> Recipe:
    """What MN and DyMN have in common: DyMN paper (Schmid et al., 2023), Sections IV-A and IV-B.

    The peak learning rate is the one that the student's family was published with.

    The schedule's phases are left to ``ScheduleConfig``, whose shares are the paper's 8, 80 and 95 of 200 epochs, so that they
    scale with ``--epochs``; so does the annealing of DyMN's temperature, 30 to 1 over the first 30 of 200.
    """
    learning_rate = pretraining_learning_rate(student)
    assert learning_rate is not None, f"no learning rate is known for {student}"
    return Recipe(
        student=student,
        loop=LoopConfig(epochs=200, batch_size=GLOBAL_BATCH),
        optimizer=OptimizerConfig(optimizer="adam", learning_rate=learning_rate, weight_decay=0.0),
        schedule=ScheduleConfig(last_factor=0.01),
        distillation=DistillationConfig(label_weight=0.1, teacher_temperature=1.0),
        sampling=SamplingConfig(sampler="label-frequency", clips_per_epoch=100_000),
        augment=AugmentConfig(mixup_alpha=0.3, mel_jitter=True, gain_db=0.0, roll_seconds=0.0, crop="start"),
    )


def mn(width: float) -> Recipe:
    """MN of any width from 0.1 to 4 (Schmid et al., "Efficient large-scale audio tagging …", 2023).

    The paper begins with ImageNet weights. There are such for width 1 alone, which takes them; other widths begin at random.
    """
    if not 0.1 <= width <= 4.0:
        raise ValueError(f"the recipe is for widths from 0.1 to 4; found {width}")
    name = f"mn{round(10 * width):02d}"
    if name in list_students() and default_options(name)["width"] == width:
        recipe = offline_distillation(name)
    else:
        recipe = replace(offline_distillation("mn10"), student_options=(f"width={width:g}",))
    return replace(recipe, weights="imagenet" if width == 1.0 else None)


DYMN_SIZES = ("s", "m", "l")


def dymn(size: Literal["s", "m", "l"]) -> Recipe:
    """DyMN-S, -M or -L (DyMN paper, Section IV-A).

    The paper begins with ImageNet weights of its authors' making. We have none: students begin at random.
    """
    if size not in DYMN_SIZES:
        raise ValueError(f"sizes are {list(DYMN_SIZES)}; found {size!r}")
    return offline_distillation(f"dymn_{size}")


RecipeName = Literal["mn01", "mn02", "mn04", "mn05", "mn10", "mn20", "mn30", "mn40", "dymn_s", "dymn_m", "dymn_l"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    **{name: partial(mn, int(name.removeprefix("mn")) / 10) for name in get_args(RecipeName) if name.startswith("mn")},
    **{f"dymn_{size}": partial(dymn, size) for size in DYMN_SIZES},
}


def recipe_for(name: str, processes: int = 1) -> Recipe:
    """The recipe of that name, its batch of 120 clips divided among processes; ValueError for an unknown name.

    A process's batch is even, since mixup pairs its clips; where 120 cannot be divided so, the nearest that can.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choices: {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    batch_size = max(2, 2 * round(recipe.loop.batch_size / 2 / processes))
    return replace(recipe, loop=replace(recipe.loop, batch_size=batch_size))
