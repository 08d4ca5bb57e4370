"""How reports name and format a run, its parts and its metrics."""

from collections.abc import Sequence

from kd.reports.document import Cell, number
from kd.reports.run_reader import Headline, Part, RunFolder

METRIC_NAMES = {
    "macro_accuracy": "accuracy, mean over classes",
    "log_loss": "log loss",
    "macro_log_loss": "log loss, mean over classes",
    "roc_auc": "ROC AUC",
    "d_prime": "d′",
}


def metric_name(metric: str) -> str:
    """The name of a metric as written within a sentence."""
    return METRIC_NAMES.get(metric, metric)


def capitalised(name: str) -> str:
    """The name as written at the beginning of a line. Names such as "mAP" stay as they are."""
    first = name.split()[0]
    return name[0].upper() + name[1:] if first == first.lower() else name


def format_metric(metric: str, value: float) -> str:
    """The value as text: accuracies in percent, other metrics with three decimals."""
    return f"{value:.1%}" if "accuracy" in metric else f"{value:.3f}"


def metric_cell(metric: str, value: float) -> Cell:
    """The value as a table cell, formatted as in :func:`format_metric`."""
    return number(value, "{:.1%}" if "accuracy" in metric else "{:.3f}")


def headline_value(headline: Headline) -> str:
    """The headline metric as text, such as "97.3 ± 1.2%" or "0.432"."""
    mean = format_metric(headline.metric, headline.mean)
    if headline.std is None:
        return mean
    return f"{mean.removesuffix('%')} ± {format_metric(headline.metric, headline.std)}"


def parts_in_words(parts: Sequence[Part]) -> str:
    """The number of parts as text, such as "5 folds", "3 seeds of 5 folds" or, of several runs read as one, "4 runs"."""
    runs = {part.run for part in parts}
    if len(runs) > 1:
        return f"{len(runs)} runs" + (f", {len(parts)} trainings" if len(parts) > len(runs) else "")
    seeds = {part.seed for part in parts if part.seed is not None}
    folds = {part.fold for part in parts if part.fold is not None}
    if len(seeds) > 1 and len(folds) > 1:
        return f"{len(seeds)} seeds of {len(folds)} folds"
    if len(folds) > 1:
        return f"{len(folds)} folds"
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"{len(parts)} trainings"


def student_name(run: RunFolder) -> str:
    """The student's catalog name; "student" if it is not known yet."""
    if run.card is not None:
        return run.card.config.name
    # With "init" the student is that of another run, and ``config["student"]`` is not used.
    return "student" if run.config.get("init") else str(run.config.get("student", "student"))


def beginning(run: RunFolder) -> str:
    """Where the initial weights came from, such as "started from random weights"."""
    for name, words in (("init", "started from the run"), ("weights", "started from the weights")):
        if run.config.get(name):
            return f"{words} {run.config[name]}"
    return "started from random weights"
