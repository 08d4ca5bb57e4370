"""What the sections on classes share: bar charts of all classes, and a note on classes without test clips.

Shapes: C classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from audio_datasets.system.messages import listed
from kd.reports.document import Chart
from kd.reports.figures import class_bars
from kd.reports.sections.wording import capitalised

CLASSES_IN_ONE_CHART = 60
EXTREME_CLASSES = 20


def class_charts(
    names: Sequence[str], values: np.ndarray, spread: np.ndarray | None, label: str, mean: float
) -> Iterator[Chart]:
    """A bar chart of all classes, the best first. With too many classes for one chart, one of the best and one of the worst."""
    occurring = np.flatnonzero(np.isfinite(values))
    order = occurring[np.argsort(-values[occurring], kind="stable")]
    chosen = {f"{capitalised(label)} of each class": order}
    if len(order) > CLASSES_IN_ONE_CHART:
        chosen = {
            f"{capitalised(label)}: the {EXTREME_CLASSES} best of {len(order)} classes": order[:EXTREME_CLASSES],
            f"{capitalised(label)}: the {EXTREME_CLASSES} worst": order[-EXTREME_CLASSES:],
        }
    for caption, classes in chosen.items():
        spreads = None if spread is None else spread[classes]
        yield Chart(class_bars([names[index] for index in classes], values[classes], spreads, label, mean), caption)


def absent_classes(names: Sequence[str], clips: np.ndarray) -> str:
    """A sentence that names the classes without test clips. Empty if every class has some."""
    absent = [name for name, count in zip(names, clips, strict=True) if not count]
    return f" Classes without test clips are left out of means: {listed(absent)}." if absent else ""
