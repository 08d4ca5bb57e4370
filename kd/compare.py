"""Compares runs side by side: their results, what their students cost, and the settings that differ.

The first run is the baseline.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import write_text
from audio_datasets.system.paths.outputs import Output, check_outputs, containing
from kd.reports.analysis.multi_label import multi_label_classes
from kd.reports.analysis.parts import mean_over_parts
from kd.reports.analysis.single_label import single_label_classes
from kd.reports.document import (
    Block,
    Cell,
    Chart,
    Document,
    Section,
    Table,
    Text,
    number,
    share,
)
from kd.reports.figures import cost_and_quality, headline_points
from kd.reports.markdown_text import to_markdown
from kd.reports.page import to_html
from kd.reports.pooled_runs import read_run_or_runs
from kd.reports.run_reader import RunFolder, flat_settings, judged_by
from kd.reports.sections.cost import Cost, student_cost
from kd.reports.sections.differences import difference_sections, values_by_key
from kd.reports.sections.wording import (
    beginning,
    capitalised,
    headline_value,
    metric_name,
    parts_in_words,
    student_name,
)
from kd.run_folder.evaluations import common_evaluations

MOST_DIFFERENT_CLASSES = 20


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs side by side. The table is printed as Markdown."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of kd finetune or kd pretrain. The first is the baseline. A folder that holds run folders (other draws, seeds or
    folds of one experiment) counts as one run; runs with the same name in two such folders form pairs."""
    out: Path | None = None
    """Also write a page (.html) or the text (.md) to this file."""
    overwrite: bool = False
    """Let --out replace a file that holds something else than a comparison."""

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"kd compare needs at least two runs; found {len(self.runs)}")
        if self.out is not None and self.out.suffix not in (".html", ".md"):
            raise ValueError(f"--out must end in .html or .md; found {self.out}")


def compare(config: CompareConfig) -> Document:
    """Reads the runs, prints the comparison, writes what was asked for, and returns it.

    Raises:
        ValueError: a folder that is no run folder, or one that is damaged.
    """
    if config.out is not None:
        title = re.compile(rb"(<h1>|^# )\d+ runs compared", re.MULTILINE)
        check_outputs(config, [Output(config.out, containing(title), "a comparison of runs")], config.overwrite)
    document = comparison([read_run_or_runs(path) for path in config.runs])
    print(to_markdown(document))
    if config.out is not None:
        render = to_html if config.out.suffix == ".html" else to_markdown
        write_text(config.out, render(document))
    return document


def comparison(runs: Sequence[RunFolder]) -> Document:
    """The whole comparison. Pretraining runs are compared by an evaluation on the same clips."""
    if chosen := common_evaluations([run.evaluations for run in runs]):
        runs = [judged_by(run, evaluation) for run, evaluation in zip(runs, chosen, strict=True)]
    names = run_names([run.path for run in runs])
    costs = [student_cost(run) for run in runs]
    sections = [
        Section("Results", tuple(result_blocks(runs, names, costs))),
        *difference_sections(runs, names),
        *class_sections(runs, names),
        Section("Settings that differ", (settings_block(runs, names),)),
    ]
    tasks = list(dict.fromkeys(run.task or "pretraining" for run in runs))
    headline = tuple(
        (name, headline_value(run.headline), capitalised(metric_name(run.headline.metric)))
        for name, run in zip(names, runs, strict=True)
        if run.headline is not None
    )
    return Document(f"{len(runs)} runs compared", f"On {', '.join(tasks)}", headline, tuple(sections))


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart (a run named twice keeps its name)."""
    parts = [path.resolve().parts for path in paths]
    distinct = len(set(parts))
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == distinct:
            return names
    return [str(path) for path in paths]


# --- Results -----------------------------------------------------------------------------------------------------------


def result_blocks(runs: Sequence[RunFolder], names: Sequence[str], costs: Sequence[Cost | None]) -> list[Block]:
    """The table of runs, and charts where all are measured by the same number."""
    metrics = [metric_name(run.headline.metric) if run.headline is not None else "–" for run in runs]
    tasks = [run.task or "pretraining" for run in runs]
    whats = [run.what or "–" for run in runs]
    same_metric, same_task = len(set(metrics)) == 1, len(set(tasks)) == 1
    columns: dict[str, list[Cell]] = {
        "run": list(names),
        **({} if same_task else {"task": list(tasks)}),
        **({} if same_metric else {"metric": list(metrics)}),
        metrics[0] if same_metric else "value": [
            headline_value(run.headline) if run.headline is not None else missing_result(run) for run in runs
        ],
        **({"measured on": list(map(measured_on, runs))} if any(run.task is None for run in runs) else {}),
        "over": [parts_in_words(run.parts) if len(run.parts) > 1 else "1 training" for run in runs],
        f"against {names[0]}": ["–", *(paired_difference(runs[0], run) for run in runs[1:])],
        **({"what": whats} if len(set(whats)) > 1 else {}),
        "student": [student_name(run) for run in runs],
        "started from": [beginning(run).removeprefix("started from ") for run in runs],
        "parameters": [number(cost.parameters if cost else None, "{:,.0f}") for cost in costs],
        "MMACs": [number(cost.macs / 1e6 if cost else None, "{:,.1f}") for cost in costs],
        "MB": [number(cost.file_bytes / 1e6 if cost else None, "{:.2f}") for cost in costs],
        "epochs": [str(last_epoch(run)) for run in runs],
    }
    blocks: list[Block] = [Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))]
    note = "“Against” is the mean difference in the folds and seeds that both runs have, its standard deviation, their number."
    if not same_metric or not same_task or len({run.class_names for run in runs}) > 1:
        note += " These runs are not on the same task, classes or metric: their numbers are not comparable."
    if len({run.evaluation.key for run in runs if run.evaluation}) > 1:
        note += " The pretraining runs were evaluated on different clips: their numbers are not comparable."
    if unevaluated := [name for name, run in zip(names, runs, strict=True) if run.task is None and not run.evaluation]:
        note += f" To compare {', '.join(unevaluated)} on test clips: kd evaluate --tagger RUN --clips CLIPS --out RUN/test.json."
    blocks.append(Text(note))
    if same_metric and all(run.headline is not None for run in runs):
        metric = metrics[0]
        values = [list(values_by_key(run).values()) for run in runs]
        caption = "A point is a fold or seed, a line their mean"
        blocks.append(Chart(headline_points(names, values, metric), caption))
        if all(costs) and len({cost.macs for cost in costs}) > 1:
            means = [run.headline.mean for run in runs]
            blocks.append(
                Chart(
                    cost_and_quality(names, [cost.macs for cost in costs], means, metric),
                    "What the runs reached, over what their students cost",
                )
            )
    return blocks


def missing_result(run: RunFolder) -> str:
    """Why a run has no number."""
    return "not evaluated" if run.finished else "not finished"


def measured_on(run: RunFolder) -> str:
    """The clips behind a run's number."""
    if run.evaluation is not None:
        return str(run.evaluation)
    if run.headline is None:
        return "–"
    return "its validation clips" if run.task is None else "test clips of the task"


def paired_difference(first: RunFolder, other: RunFolder) -> str:
    """How much better the other's headline is in the parts that both have: mean ± standard deviation, and their number."""
    if first.headline is None or other.headline is None or first.headline.metric != other.headline.metric:
        return "–"
    metric = first.headline.metric
    ours, theirs = values_by_key(first), values_by_key(other)
    common = [key for key in ours if key in theirs]
    if not common:
        return "no common training"
    differences = np.array([theirs[key] - ours[key] for key in common])
    scale, unit, digits = (100, " points", 1) if "accuracy" in metric else (1, "", 3)
    text = f"{scale * differences.mean():+.{digits}f}".replace("-", "−")
    if len(common) == 1:
        return text + unit
    return f"{text} ± {scale * differences.std(ddof=1):.{digits}f}{unit} in {len(common)}"


def last_epoch(run: RunFolder) -> int | str:
    """Epochs trained; the range where parts stopped at different ones."""
    ends = {record["epoch"] + 1 for part in run.parts for record in part.records[-1:]}
    if not ends:
        return "–"
    return f"{min(ends)}–{max(ends)}" if len(ends) > 1 else ends.pop()


# --- Classes and settings ----------------------------------------------------------------------------------------------


def class_sections(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Section]:
    """The classes in which the runs differ most; nothing if their classes are not the same or not known one by one."""
    if not all(run.predictions or run.evaluation for run in runs):
        return []
    if len({(run.class_names, run.evaluation is None and run.one_label) for run in runs}) > 1:
        return []
    values = np.array([class_values(run) for run in runs])
    occurring = np.flatnonzero(np.isfinite(values).all(axis=0))
    spans = np.ptp(values[:, occurring], axis=0)
    order = occurring[np.argsort(-spans, kind="stable")]
    one_label = runs[0].evaluation is None and runs[0].one_label
    metric, text = ("accuracy", "{:.1%}") if one_label else ("average precision", "{:.3f}")

    def table(classes: np.ndarray, caption: str, folded: bool = False) -> Table:
        rows = tuple(
            (
                runs[0].class_names[index],
                *(share(value, text) for value in values[:, index]),
                number(float(np.ptp(values[:, index])), text),
            )
            for index in classes
        )
        return Table(("class", *names, "largest difference"), rows, caption, folded)

    blocks = [table(order[:MOST_DIFFERENT_CLASSES], f"{capitalised(metric)} where the runs differ most")]
    if len(order) > MOST_DIFFERENT_CLASSES:
        blocks.append(table(np.sort(order), f"All {len(order)} classes", folded=True))
    return [Section("Classes", tuple(blocks))]


def class_values(run: RunFolder) -> np.ndarray:
    """(C,) accuracy or average precision of each class; NaN where it is not known."""
    if run.evaluation is not None:
        return np.array([run.evaluation.average_precisions.get(name, np.nan) for name in run.class_names])
    if run.one_label:
        return single_label_classes(run.predictions).accuracy
    return mean_over_parts(multi_label_classes(run.predictions).average_precision)


def settings_block(runs: Sequence[RunFolder], names: Sequence[str]) -> Block:
    """A line for each setting that is not the same in all runs."""
    settings = [flat_settings(run.config) for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found if key != "out")
    rows = tuple(
        (key, *(found.get(key, "") for found in settings))
        for key in keys
        if len({found.get(key) for found in settings}) > 1
    )
    return Table(("setting", *names), rows) if rows else Text("Every setting is the same in all runs.")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: compare(parse(CompareConfig, arguments, "kd compare")))


if __name__ == "__main__":
    raise SystemExit(main())
