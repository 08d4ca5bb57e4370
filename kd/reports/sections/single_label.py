"""Sections on classes and confusions where every clip has exactly one class."""

from collections.abc import Sequence

import numpy as np

from kd.reports.analysis.single_label import SingleLabelClasses, single_label_classes
from kd.reports.document import Block, Chart, Section, Table, Text, number, share
from kd.reports.figures import confusion_matrix
from kd.reports.run_reader import RunFolder
from kd.reports.sections.class_charts import CLASSES_IN_ONE_CHART, absent_classes, class_charts

CLASSES_IN_MATRIX = 60
FREQUENT_CONFUSIONS = 15


def single_label_sections(run: RunFolder) -> list[Section]:
    """The sections on classes and on confusions."""
    found = single_label_classes(run.predictions)
    return [
        Section("Classes", class_blocks(run.class_names, found)),
        Section("Confusions", confusion_blocks(run.class_names, found)),
    ]


def class_blocks(names: Sequence[str], found: SingleLabelClasses) -> tuple[Block, ...]:
    """The means over classes, bars of the accuracy of each class, and a table of all classes."""
    taken_for = {true: f"{names[chosen]} ({count})" for true, chosen, count in reversed(found.confusions())}
    rows = tuple(
        (
            name,
            number(found.clips[index], "{:,.0f}"),
            share(found.accuracy[index], "{:.1%}"),
            number(found.precision[index], "{:.1%}"),
            number(found.f1[index]),
            number(found.log_loss[index]),
            taken_for.get(index, ""),
        )
        for index, name in enumerate(names)
    )
    headings = ("class", "clips", "accuracy", "precision", "F1", "log loss", "most often mistaken for")
    mean = float(np.nanmean(found.accuracy))
    text = (
        f"Mean over classes: accuracy {mean:.1%}, log loss {np.nanmean(found.log_loss):.3f} (natural logarithm of the softmax). "
        "Accuracy is the share of a class's clips that are predicted correctly (its recall). Precision is the share of correct "
        "predictions among all predictions of the class."
    )
    return (
        Text(text + absent_classes(names, found.clips)),
        *class_charts(names, found.accuracy, None, "accuracy", mean),
        Table(headings, rows, f"All {len(names)} classes", folded=len(names) > CLASSES_IN_ONE_CHART),
    )


def confusion_blocks(names: Sequence[str], found: SingleLabelClasses) -> tuple[Block, ...]:
    """The confusion matrix, unless it has too many classes, and a table of the most frequent confusions."""
    blocks: list[Block] = []
    if len(names) <= CLASSES_IN_MATRIX:
        caption = "Confusion matrix: a row is a true class, a column the class chosen for its clips"
        blocks.append(Chart(confusion_matrix(found.confusion, names), caption))
    frequent = tuple(
        (names[true], names[chosen], number(count, "{:,.0f}"), number(count / found.confusion[true].sum(), "{:.1%}"))
        for true, chosen, count in found.confusions()[:FREQUENT_CONFUSIONS]
    )
    if frequent:
        headings = ("true", "chosen", "times", "of the true class")
        blocks.append(Table(headings, frequent, "The most frequent confusions"))
    else:
        blocks.append(Text("Every clip was predicted correctly."))
    return tuple(blocks)
