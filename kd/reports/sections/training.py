"""Sections about training: the metrics of each part of the run, and the learning curves."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from kd.reports.analysis.parts import mean_over_parts, std_over_parts
from kd.reports.document import Block, Cell, Chart, Section, Table
from kd.reports.figures import Lines, learning_curves
from kd.reports.run_reader import Part, RunFolder, is_number
from kd.reports.sections.wording import metric_cell, metric_name


def training_sections(run: RunFolder) -> list[Section]:
    """The table of parts if there are several, and the learning curves if any were logged."""
    sections = []
    if len(run.parts) > 1 and any(part.metrics for part in run.parts):
        sections.append(Section("Parts of the run", (parts_table(run.parts),)))
    curves = curve_blocks(run)
    if curves:
        sections.append(Section("Learning curves", curves))
    return sections


def parts_table(parts: Sequence[Part]) -> Table:
    """The metrics of each part, their mean and their standard deviation."""
    metrics = list(dict.fromkeys(name for part in parts for name, value in part.metrics.items() if is_number(value)))
    found = [[part.metrics.get(name) for name in metrics] for part in parts]
    values = np.array([[value if is_number(value) else math.nan for value in line] for line in found], dtype=np.float64)
    rows: list[tuple[Cell, ...]] = [
        (part.label, *map(metric_cell, metrics, line)) for part, line in zip(parts, values, strict=True)
    ]
    mean, std = mean_over_parts(values), std_over_parts(values)
    rows += [("mean", *map(metric_cell, metrics, mean)), ("standard deviation", *map(metric_cell, metrics, std))]
    return Table(("part", *map(metric_name, metrics)), tuple(rows))


def curve_blocks(run: RunFolder) -> tuple[Block, ...]:
    """A chart of losses, validation metrics and the learning rate over epochs, with a description in words."""
    panels, words = [], []
    for title, kind, names in curve_panels(run):
        curves = {
            metric_name(name): [curve for part in run.parts if len((curve := part.curve(kind, name))[0])]
            for name in names
        }
        panels.append(Lines(title, curves, logarithmic=title == "learning rate"))
        if kind == "validation" or names == ["loss"] or title == "training loss":
            words += [f"{name} {in_words(found)}" for name, found in curves.items()]
    if not panels:
        return ()
    caption = "Thin lines are parts of the run, thick ones their mean" if len(run.parts) > 1 else "Over epochs"
    return (Chart(learning_curves(panels), caption, "; ".join(words) + "."),)


def curve_panels(run: RunFolder) -> Iterator[tuple[str, str, list[str]]]:
    """For each panel: its title, the kind of record to read (train or validation), and the names of the values to plot."""
    training = list(dict.fromkeys(name for part in run.parts for name in part.measured("train")))
    losses = [name for name in training if name != "learning_rate"]
    if losses:
        # With several parts, one curve per term of the loss would be too many: only the first is drawn.
        yield "training loss", "train", losses if len(run.parts) == 1 else losses[:1]
    validation = list(dict.fromkeys(name for part in run.parts for name in part.measured("validation")))
    for name in validation[:4]:
        yield f"validation: {metric_name(name)}", "validation", [name]
    if "learning_rate" in training:
        yield "learning rate", "train", ["learning_rate"]


def in_words(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """The first and the last value as text, each the mean over parts."""
    first, last = (float(np.mean([values[end] for _, values in curves])) for end in (0, -1))
    epochs = max(int(steps[-1]) for steps, _ in curves)
    return f"from {first:.3g} to {last:.3g} in {epochs} epochs"
