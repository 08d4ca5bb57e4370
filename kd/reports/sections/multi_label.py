"""Sections on classes, precision over recall and thresholds where a clip may have any number of classes."""

from collections.abc import Sequence

import numpy as np

from kd.reports.analysis.multi_label import RECALL_GRID, MultiLabelClasses, multi_label_classes
from kd.reports.analysis.parts import mean_over_parts, std_over_parts
from kd.reports.analysis.thresholds import Thresholds, choose_thresholds
from kd.reports.document import Block, Cell, Chart, Curve, Section, Table, Text, number, share
from kd.reports.figures import precision_recall
from kd.reports.run_reader import RunFolder
from kd.reports.sections.class_charts import CLASSES_IN_ONE_CHART, absent_classes, class_charts

CURVE_PANELS = 12
SMALL_CURVE_POINTS = 20


def multi_label_sections(run: RunFolder) -> list[Section]:
    """The sections on classes, and on precision over recall and thresholds."""
    found, thresholds = multi_label_classes(run.predictions), choose_thresholds(run.predictions)
    chart = precision_recall_chart(run.class_names, found, thresholds)
    return [
        Section("Classes", class_blocks(run.class_names, found, thresholds)),
        Section("Precision, recall, thresholds", (chart, Text(threshold_note(thresholds)))),
    ]


def class_blocks(names: Sequence[str], found: MultiLabelClasses, thresholds: Thresholds) -> tuple[Block, ...]:
    """The mAP, bars of the average precision of each class, and a table of all classes."""
    precision = mean_over_parts(found.average_precision)
    spread = std_over_parts(found.average_precision) if len(found.average_precision) > 1 else None
    mean = float(np.nanmean(precision))
    text = f"Mean over classes of the average precisions below: {mean:.3f}."
    return (
        Text(text + absent_classes(names, found.positives)),
        *class_charts(names, precision, spread, "average precision", mean),
        class_table(names, found, thresholds, precision, spread),
    )


def class_table(
    names: Sequence[str],
    found: MultiLabelClasses,
    thresholds: Thresholds,
    precision: np.ndarray,
    spread: np.ndarray | None,
) -> Table:
    """A row for each class, with its mean average precision (C,) and the spread of it over parts (C,), if known."""
    small_curves = found.precision_at_recall.reshape(len(names), SMALL_CURVE_POINTS, -1).mean(axis=2)
    columns: dict[str, Sequence[Cell]] = {
        "class": names,
        "clips with it": [number(count, "{:,.0f}") for count in found.positives],
        "clips labelled": [number(count, "{:,.0f}") for count in found.labelled],
        "AP": [share(value) for value in precision],
        "± (parts)": [number(value) for value in spread] if spread is not None else [],
        "precision over recall": [Curve(tuple(curve)) for curve in small_curves.tolist()],
        "threshold": [number(value) for value in thresholds.probability],
        "F1": [share(value) for value in thresholds.f1],
        "F1 at 0.5": [number(value) for value in thresholds.untuned_f1],
    }
    if (found.labelled == found.labelled.max()).all():
        del columns["clips labelled"]
    if spread is None:
        del columns["± (parts)"]
    rows = tuple(zip(*columns.values(), strict=True))
    return Table(tuple(columns), rows, f"All {len(names)} classes", folded=len(names) > CLASSES_IN_ONE_CHART)


def precision_recall_chart(names: Sequence[str], found: MultiLabelClasses, thresholds: Thresholds) -> Chart:
    """Precision over recall of all classes; the best and the worst also have a panel each."""
    precision, curves = mean_over_parts(found.average_precision), found.precision_at_recall
    occurring = np.flatnonzero(np.isfinite(precision))
    order = occurring[np.argsort(-precision[occurring], kind="stable")]
    shown = order if len(order) <= CURVE_PANELS else np.append(order[: CURVE_PANELS // 2], order[-CURVE_PANELS // 2 :])
    which = "all classes" if len(shown) == len(order) else f"the {len(shown) // 2} best and the {len(shown) // 2} worst"
    chart = precision_recall(
        RECALL_GRID,
        curves[occurring],
        curves[occurring].mean(axis=0),
        [(names[index], curves[index]) for index in shown],
    )
    caption = f"Precision over recall; in panels of their own, {which}. The area under a curve is the class's average precision"
    description = (
        f"A threshold for each class is in the table of classes. Mean F1 {np.nanmean(thresholds.f1):.3f} with them, "
        f"{np.nanmean(thresholds.untuned_f1):.3f} with 0.5 for all."
    )
    return Chart(chart, caption, description)


def threshold_note(thresholds: Thresholds) -> str:
    """A note on which clips the thresholds were chosen on, and on which their F1 was computed."""
    if thresholds.chosen_on_validation:
        return (
            "Thresholds apply to the probability σ(logit). Each threshold has the highest F1 on the validation clips. The F1 shown is "
            "computed on the test clips, which were not used to choose thresholds."
        )
    return (
        "Thresholds apply to the probability σ(logit). Each threshold has the highest F1 on the test clips themselves, because the "
        "run saved no predictions of validation clips. The F1 shown is therefore cross-fitted: each fifth of the test clips is judged "
        "with a threshold chosen on the other four fifths."
    )
