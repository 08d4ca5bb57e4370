"""The parts of a run's report: what was measured, class by class and clip by clip, and under which circumstances.

Shapes: C classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from audio_datasets.system.messages import listed
from kd.reports.class_analysis import (
    RECALL_GRID,
    DeviceRow,
    Mistake,
    Thresholds,
    choose_thresholds,
    device_rows,
    false_alarms,
    mean_over_parts,
    misses,
    one_label_classes,
    one_label_mistakes,
    several_label_classes,
    std_over_parts,
)
from kd.reports.document import Block, Cell, Chart, Code, Curve, Facts, Section, Sound, Table, Text, number, share
from kd.reports.figures import Lines, class_bars, confusion_matrix, learning_curves, precision_recall
from kd.reports.run_reader import Headline, Part, RunFolder, flat_settings, is_number
from students.card import CARD_FILE, WEIGHTS_FILE, StudentCard, outline
from students.profile import profile_student

CLASSES_IN_ONE_CHART = 60
EXTREME_CLASSES = 20
CLASSES_IN_MATRIX = 60
CURVE_PANELS = 12
FREQUENT_CONFUSIONS = 15
SMALL_CURVE_POINTS = 20

# --- What comes first --------------------------------------------------------------------------------------------------


def title_and_headline(run: RunFolder) -> tuple[str, str, tuple[tuple[str, str, str], ...]]:
    """Title, subtitle and the first numbers of a report."""
    student = student_name(run)
    title = f"{student} on {run.task}" if run.task else f"{student}, pretrained"
    subtitle = f"{run.path.resolve().name}: {f'{run.what}, ' if run.what else ''}{beginning(run)}"
    if not run.finished:
        subtitle += ". This run has not finished; what follows is what is there so far"
    numbers = []
    if run.headline is not None:
        name = capitalised(metric_name(run.headline.metric))
        numbers.append((name, headline_value(run.headline), headline_note(run)))
    if (probe := run.probe) is not None:
        note = f"{metric_name(probe.headline.metric)}, on frozen embeddings before any training"
        numbers.append(("Linear probe", headline_value(probe.headline), note))
    tested = {str(clip_id) for _, predictions in run.predictions for clip_id in predictions.clip_ids}
    if tested:
        numbers.append(("Test clips", f"{len(tested):,}", f"{len(run.class_names or ())} classes"))
    cost = student_cost(run)
    if cost is not None:
        numbers.append(("Parameters", f"{cost.parameters / 1e6:.2f} M", f"{cost.file_bytes / 1e6:.1f} MB on disk"))
        numbers.append(("Multiply-accumulates", f"{cost.macs / 1e6:,.0f} M", f"for a clip of {cost.clip_seconds:g} s"))
    return title, subtitle, tuple(numbers)


def headline_value(headline: Headline) -> str:
    """Such as "97.3 ± 1.2%" or "0.432"."""
    mean = format_metric(headline.metric, headline.mean)
    if headline.std is None:
        return mean
    return f"{mean.removesuffix('%')} ± {format_metric(headline.metric, headline.std)}"


def headline_note(run: RunFolder) -> str:
    """What the headline is the mean of, and what its spread is."""
    headline = run.headline
    if len(headline.values) > 1:
        low, high = (format_metric(headline.metric, end(headline.values)) for end in (min, max))
        over = f"{len(headline.values)} {headline.over}" if headline.over else parts_in_words(run.parts)
        folds = len({part.fold for part in run.parts})
        if headline.over == "seeds" and folds > 1:
            over += f", each the mean of {folds} folds"
        return f"mean and standard deviation over {over}; {low} to {high}"
    if not run.predictions:
        return "of the last validation"
    if headline.metric != "accuracy":
        return "one training: its spread is not known"
    clips = len(run.predictions[0][1].clip_ids)
    interval = binomtest(round(headline.mean * clips), clips).proportion_ci(method="wilson")
    return f"one training; 95% interval for {clips:,} clips: {interval.low:.1%} to {interval.high:.1%}"


def parts_in_words(parts: Sequence[Part]) -> str:
    """Such as "5 folds" or "3 seeds of 5 folds"."""
    seeds = {part.seed for part in parts if part.seed is not None}
    folds = {part.fold for part in parts if part.fold is not None}
    if len(seeds) > 1 and len(folds) > 1:
        return f"{len(seeds)} seeds of {len(folds)} folds"
    if len(folds) > 1:
        return f"{len(folds)} folds"
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"{len(parts)} trainings"


def student_name(run: RunFolder) -> str:
    if run.card is not None:
        return run.card.config.name
    # With "init", the student is that of the run named there.
    return "student" if run.config.get("init") else str(run.config.get("student", "student"))


def beginning(run: RunFolder) -> str:
    """What the weights were before the run."""
    for name, words in (("init", "begun from the run"), ("weights", "begun from the weights")):
        if run.config.get(name):
            return f"{words} {run.config[name]}"
    return "begun from random weights"


METRIC_NAMES = {
    "macro_accuracy": "accuracy, mean over classes",
    "log_loss": "log loss",
    "macro_log_loss": "log loss, mean over classes",
    "roc_auc": "ROC AUC",
    "d_prime": "d′",
}


def metric_name(metric: str) -> str:
    """A metric as it is written within a sentence."""
    return METRIC_NAMES.get(metric, metric)


def capitalised(name: str) -> str:
    """For the beginning of a line; "mAP" and the like stay as they are."""
    first = name.split()[0]
    return name[0].upper() + name[1:] if first == first.lower() else name


def format_metric(metric: str, value: float) -> str:
    """Accuracies in percent, anything else with three decimals."""
    return f"{value:.1%}" if "accuracy" in metric else f"{value:.3f}"


# --- Findings ----------------------------------------------------------------------------------------------------------


def finding_sections(run: RunFolder) -> list[Section]:
    """What was measured; each section only where there is something to tell."""
    sections = []
    if len(run.parts) > 1 and any(part.metrics for part in run.parts):
        sections.append(Section("Parts of the run", (parts_table(run.parts),)))
    curves = curve_blocks(run)
    if curves:
        sections.append(Section("Learning curves", curves))
    if not run.predictions:
        text = "There are no predictions of test clips, so nothing can be said of single classes or clips."
        return [*sections, Section("Classes", (Text(text),))]
    describe = one_label_sections if run.one_label else several_label_sections
    sections += describe(run)
    devices = device_rows(run.predictions, run.one_label)
    if devices:
        sections.append(Section("Devices", tuple(device_blocks(devices))))
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


def metric_cell(metric: str, value: float) -> Cell:
    return number(value, "{:.1%}" if "accuracy" in metric else "{:.3f}")


def curve_blocks(run: RunFolder) -> tuple[Block, ...]:
    """Losses, validation metrics and the learning rate over epochs, in a chart and in words."""
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
    """Title, kind of record and names of each panel."""
    training = list(dict.fromkeys(name for part in run.parts for name in part.measured("train")))
    losses = [name for name in training if name != "learning_rate"]
    if losses:
        # The terms of the loss of several parts would be a tangle.
        yield "training loss", "train", losses if len(run.parts) == 1 else losses[:1]
    validation = list(dict.fromkeys(name for part in run.parts for name in part.measured("validation")))
    for name in validation[:4]:
        yield f"validation: {metric_name(name)}", "validation", [name]
    if "learning_rate" in training:
        yield "learning rate", "train", ["learning_rate"]


def in_words(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """The first and last value, the mean of all parts."""
    first, last = (float(np.mean([values[end] for _, values in curves])) for end in (0, -1))
    epochs = max(int(steps[-1]) for steps, _ in curves)
    return f"from {first:.3g} to {last:.3g} in {epochs} epochs"


def one_label_sections(run: RunFolder) -> list[Section]:
    """Classes and confusions where each clip has one class."""
    names = run.class_names
    found = one_label_classes(run.predictions)
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
    headings = ("class", "clips", "accuracy", "precision", "F1", "log loss", "most often taken for")
    mean = float(np.nanmean(found.accuracy))
    text = (
        f"Mean over classes: accuracy {mean:.1%}, log loss {np.nanmean(found.log_loss):.3f} (natural logarithm of the softmax). "
        "Accuracy is the share of a class's clips that are given to it, precision the share right among the clips given to it."
    )
    sections = [
        Section(
            "Classes",
            (
                Text(text + absent_classes(names, found.clips)),
                *class_charts(names, found.accuracy, None, "accuracy", mean),
                Table(headings, rows, f"All {len(names)} classes", folded=len(names) > CLASSES_IN_ONE_CHART),
            ),
        )
    ]
    confusions: list[Block] = []
    if len(names) <= CLASSES_IN_MATRIX:
        caption = "Confusion matrix: a row is a true class, a column the class chosen for its clips"
        confusions.append(Chart(confusion_matrix(found.confusion, names), caption))
    frequent = tuple(
        (names[true], names[chosen], number(count, "{:,.0f}"), number(count / found.confusion[true].sum(), "{:.1%}"))
        for true, chosen, count in found.confusions()[:FREQUENT_CONFUSIONS]
    )
    if frequent:
        headings = ("true", "chosen", "times", "of the true class")
        confusions.append(Table(headings, frequent, "The most frequent confusions"))
    else:
        confusions.append(Text("No clip was given to a wrong class."))
    return [*sections, Section("Confusions", tuple(confusions))]


def several_label_sections(run: RunFolder) -> list[Section]:
    """Classes, precision over recall, and thresholds where a clip may have several classes."""
    names, parts = run.class_names, run.predictions
    found, thresholds = several_label_classes(parts), choose_thresholds(parts)
    precision = mean_over_parts(found.average_precision)
    spread = std_over_parts(found.average_precision) if len(parts) > 1 else None
    small_curves = found.precision_at_recall.reshape(len(names), SMALL_CURVE_POINTS, -1).mean(axis=2)
    everything_known = (found.labelled == found.labelled.max()).all()
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
    if everything_known:
        del columns["clips labelled"]
    if spread is None:
        del columns["± (parts)"]
    mean = float(np.nanmean(precision))
    classes = Section(
        "Classes",
        (
            Text(
                f"Mean over classes of the average precisions below: {mean:.3f}."
                + absent_classes(names, found.positives)
            ),
            *class_charts(names, precision, spread, "average precision", mean),
            Table(
                tuple(columns),
                tuple(zip(*columns.values(), strict=True)),
                f"All {len(names)} classes",
                folded=len(names) > CLASSES_IN_ONE_CHART,
            ),
        ),
    )
    occurring = np.flatnonzero(np.isfinite(precision))
    order = occurring[np.argsort(-precision[occurring], kind="stable")]
    shown = order if len(order) <= CURVE_PANELS else np.append(order[: CURVE_PANELS // 2], order[-CURVE_PANELS // 2 :])
    curves = found.precision_at_recall
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
    return [
        classes,
        Section(
            "Precision, recall, thresholds", (Chart(chart, caption, description), Text(threshold_note(thresholds)))
        ),
    ]


def threshold_note(thresholds: Thresholds) -> str:
    """On which clips the thresholds were chosen, and what their F1 is worth."""
    if thresholds.chosen_on_validation:
        return (
            "Thresholds are on the probability σ(logit). Each is the one of highest F1 on the validation clips; F1 is that of the "
            "test clips, which took no part in choosing it."
        )
    return (
        "Thresholds are on the probability σ(logit). Each is the one of highest F1 on the test clips themselves, since the run "
        "kept no predictions of validation clips. F1 is therefore cross-fitted: each fifth of the test clips is judged with the "
        "threshold chosen on the other four."
    )


def class_charts(
    names: Sequence[str], values: np.ndarray, spread: np.ndarray | None, label: str, mean: float
) -> Iterator[Chart]:
    """Bars of all classes, the best first; of many classes, the best and the worst."""
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
    """A sentence that names the classes without test clips; empty if there are none."""
    absent = [name for name, count in zip(names, clips, strict=True) if not count]
    return f" Without a test clip, and left out of means: {listed(absent)}." if absent else ""


def device_blocks(devices: Sequence[DeviceRow]) -> Iterator[Block]:
    """The table of devices: each, those seen in training, those not seen, and all."""
    metrics = list(dict.fromkeys(metric for row in devices for metric in row.scores))
    several = any(len(values) > 1 for row in devices for values in row.scores.values())
    rows = []
    for row in devices:
        seen = {True: "yes", False: "no", None: "–"}[row.seen]
        cells = [metric_cell(metric, float(np.mean(row.scores.get(metric, math.nan)))) for metric in metrics]
        rows.append((row.name, seen, number(row.clips, "{:,.0f}"), *cells))
    yield Table(("device", "seen in training", "clips", *map(metric_name, metrics)), tuple(rows))
    if several:
        yield Text("Each number is the mean over the parts of the run that have clips of the device.")
    if any(row.seen is None for row in devices[:-1]):
        yield Text("Whether a device was heard in training is not the same in all parts, or was not recorded.")


# --- Mistakes ----------------------------------------------------------------------------------------------------------


def mistake_lists(run: RunFolder) -> list[tuple[str, list[Mistake]]]:
    """Mistakes under what they are called; lists without any are left out."""
    if not run.predictions:
        return []
    if run.one_label:
        lists = [("Wrong choices, the surest first", one_label_mistakes(run.predictions, run.class_names))]
    else:
        lists = [
            ("Heard, though the clip is not labelled with it", false_alarms(run.predictions, run.class_names)),
            ("Missed, though the clip is labelled with it", misses(run.predictions, run.class_names)),
        ]
    return [(title, found) for title, found in lists if found]


def mistake_section(
    lists: Sequence[tuple[str, Sequence[Mistake]]], sounds: Mapping[str, bytes], player_note: str
) -> Section:
    """A table for each list, with a player where ``sounds`` has a preview of the clip (MP3)."""
    blocks: list[Block] = []
    for title, mistakes in lists:
        one_label = mistakes[0].truth_probability is not None
        columns: dict[str, list[Cell]] = {
            "listen": [Sound(sounds.get(mistake.clip_id)) for mistake in mistakes],
            "clip": [mistake.clip_id for mistake in mistakes],
            "labelled": [mistake.truth or "nothing" for mistake in mistakes],
            "chosen" if one_label else "class": [mistake.said for mistake in mistakes],
            "probability": [number(mistake.probability) for mistake in mistakes],
            "of the label": [number(mistake.truth_probability) for mistake in mistakes],
            "device": [mistake.device or "" for mistake in mistakes],
            "part": [mistake.part for mistake in mistakes],
        }
        if not sounds:
            del columns["listen"]
        if not one_label:
            del columns["of the label"]
        columns = {name: cells for name, cells in columns.items() if any(cell != "" for cell in cells)}
        blocks.append(Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), title))
    text = "What the students were most sure of and, by the labels, wrong about. Often enough it is the label that is wrong."
    if sounds:
        text += f" {player_note}"
    return Section("Most confident mistakes", (Text(text), *blocks))


# --- Circumstances -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What the student of a run costs."""

    parameters: int
    macs: int
    activation_bytes: int
    file_bytes: int
    clip_seconds: float
    n_mels: int
    frames: int


def student_cost(run: RunFolder) -> Cost | None:
    """The cost of the run's student for a clip of the length that it was trained on; None before there is a student."""
    part = next((part for part in run.parts if part.card is not None), None)
    if part is None:
        return None
    card = part.card
    seconds = clip_seconds(run, card)
    frames = card.frontend.frames(round(seconds * card.frontend.sample_rate_hz))
    student = outline(part.folder, card)
    try:
        profile = profile_student(student, card.frontend.n_mels, frames)
    except ValueError as error:
        raise ValueError(f"{part.folder / CARD_FILE}: {error}") from error
    return Cost(
        parameters=profile.parameters,
        macs=profile.macs,
        activation_bytes=profile.activation_bytes,
        file_bytes=(part.folder / WEIGHTS_FILE).stat().st_size,
        clip_seconds=seconds,
        n_mels=card.frontend.n_mels,
        frames=frames,
    )


def clip_seconds(run: RunFolder, card: StudentCard) -> float:
    return float(card.provenance.get("clip_seconds") or run.config.get("clip_seconds") or 10.0)


def circumstance_sections(run: RunFolder) -> list[Section]:
    """The student, the settings and the command."""
    sections = []
    cost = student_cost(run)
    if cost is not None:
        card = run.card
        facts = (
            ("student", card.config.name),
            ("options", ", ".join(f"{name}={value}" for name, value in card.config.options.items()) or "none"),
            ("weights before", beginning(run)),
            ("parameters", f"{cost.parameters:,}"),
            (
                "multiply-accumulates",
                f"{cost.macs:,} for {cost.n_mels} mels × {cost.frames} frames ({cost.clip_seconds:g} s)",
            ),
            ("memory of maps", f"{cost.activation_bytes / 1e6:.1f} MB (float32, a clip at a time)"),
            ("weights on disk", f"{cost.file_bytes / 1e6:.2f} MB"),
        )
        sections.append(Section("Student", (Facts(facts),)))
    command = Code(run.command) if run.command else Text("The command of this run was not recorded.")
    blocks: list[Block] = [command]
    if run.versions:
        blocks.append(Facts(tuple(run.versions.items())))
    sections.append(Section("Command and versions", tuple(blocks)))
    settings = tuple((name, value) for name, value in flat_settings(run.config).items())
    sections.append(
        Section("Configuration", (Table(("setting", "value"), settings, "Every setting of the run", folded=True),))
    )
    return sections
