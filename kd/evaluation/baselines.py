"""Baselines that need no listening: guessing, and always giving the same answer. Warnings about results close to them.

Shapes: n clips, C classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binomtest

from audio_datasets.tasks.label_space import LabelSpace
from kd.evaluation.label_metrics import ALL_RIGHT, smaller_is_better
from kd.run_folder.results import CHANCE, MAJORITY

SIGNIFICANT = 0.05
NEAR_CHANCE = 1.2
"""A mAP below this many times chance is near chance."""


def baselines(label_space: LabelSpace, targets: np.ndarray, mask: np.ndarray) -> dict[str, dict[str, float]]:
    """The baselines of each accuracy and of each mAP, by the metric's name in ``label_metrics``.

    Args:
        targets: (n, C), 0 or 1; of no meaning where ``mask`` (n, C) is false.
    """
    found: dict[str, dict[str, float]] = {}
    for group, columns in label_space.parts():
        known, labels = mask[:, columns], targets[:, columns] > 0
        prefix = f"{group.name}/" if group.name else ""
        if group.exclusive:
            counts = labels[known.all(axis=1)].sum(axis=0)
            if counts.sum():
                chance = 1 / len(counts)
                found[f"{prefix}accuracy"] = {CHANCE: chance, MAJORITY: float(counts.max() / counts.sum())}
                found[f"{prefix}macro_accuracy"] = {CHANCE: chance, MAJORITY: 1 / int((counts > 0).sum())}
        else:
            positives, clips = (labels & known).sum(axis=0), known.sum(axis=0)
            judged = (positives > 0) & (positives < clips)
            if judged.any():
                found[f"{prefix}mAP"] = {CHANCE: float((positives[judged] / clips[judged]).mean())}
    if len(label_space.groups) > 1 and label_space.exclusive:
        answers = targets[mask.all(axis=1)] > 0
        if len(answers):
            chance = float(np.prod([1 / len(group.class_names) for group in label_space.groups]))
            most = np.unique(answers, axis=0, return_counts=True)[1].max()
            found[ALL_RIGHT] = {CHANCE: chance, MAJORITY: float(most / len(answers))}
    return found


def category_baseline(categories: Sequence[str], choices: int) -> dict[str, float]:
    """The baselines of choosing each clip's category among so many.

    Args:
        categories: the true category of each clip.
    """
    return {CHANCE: 1 / choices, MAJORITY: max(Counter(categories).values()) / len(categories)}


def beside(baseline: Mapping[str, float]) -> str:
    """The baselines as text: "chance 0.2000, most frequent class 0.2500"; "" if there are none."""
    words = {CHANCE: "chance", MAJORITY: "most frequent class"}
    return ", ".join(f"{words[name]} {value:.4f}" for name, value in baseline.items() if name in words)


def is_near_chance(metric: str, value: float, clips: int, baseline: Mapping[str, float]) -> bool:
    """Whether a result on this many test clips is not clearly better than its baselines.

    Accuracies: a binomial test against the better baseline. mAP: below ``NEAR_CHANCE`` times chance.
    """
    if not baseline or not clips:
        return False
    level = max(baseline.values())
    if metric.rpartition("/")[2] == "mAP":
        return value < NEAR_CHANCE * level
    return binomtest(round(min(value, 1.0) * clips), clips, level, alternative="greater").pvalue > SIGNIFICANT


def warnings_of(
    metric: str, value: float, clips: int, baseline: Mapping[str, float], probe: float | None, probe_folder: str
) -> list[str]:
    """Warnings about a result: close to chance, or worse than the linear probe.

    Args:
        clips: number of test clips.
        probe: the linear probe's value on the same clips; None if there is none.
    """
    found = []
    if is_near_chance(metric, value, clips, baseline):
        found.append(
            f"{metric} {value:.4f} on {clips} test clips is not clearly better than guessing"
            f" ({beside(baseline)}). Check the labels, then try more --epochs or another --learning-rate"
        )
    if probe is not None and (value > probe if smaller_is_better(metric) else value < probe):
        found.append(
            f"{metric} {value:.4f} is worse than the linear probe's {probe:.4f}, which trains only a linear classifier on the"
            f" frozen student. The probe is a student too: {probe_folder}. More --epochs or --freeze backbone may help"
        )
    return found
