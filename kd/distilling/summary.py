"""What a distillation came to: a table of teacher and students, and the report that compares the students."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audio_datasets.system.files import write_json, write_text
from audio_datasets.system.text_tables import text_table
from kd.compare import comparison
from kd.distilling.arms import DISTILLED, HELD_OUT, LABELS_ALONE, TEACHER, Distillation
from kd.distilling.config import DistillConfig
from kd.distilling.given_teacher import tested_teacher
from kd.reports.page import to_html
from kd.reports.pooled_runs import read_run_or_runs
from kd.reports.sections.cost import student_cost
from kd.reports.sections.differences import in_points, values_by_key
from kd.reports.sections.wording import capitalised, headline_value, metric_name

NAMES = {TEACHER: "teacher", LABELS_ALONE: "student, labels alone", DISTILLED: "student, distilled"}


def summarise(distillations: Sequence[Distillation], config: DistillConfig) -> str:
    """Writes ``results.json`` and, if there is something to compare with, ``report.html``; returns the table as text."""
    out = config.out
    made = {TEACHER: config.teacher != "given", LABELS_ALONE: config.labels_alone, DISTILLED: True}
    runs = {arm: read_run_or_runs(tested_folder(distillations, out, arm)) for arm in NAMES if made[arm]}
    metric = runs[DISTILLED].headline.metric
    rows = [("", capitalised(metric_name(metric)), "parameters", "MMACs", "MB")]
    found: dict[str, Any] = {}
    if not made[TEACHER]:
        given = tested_teacher(distillations, metric)
        rows.append((NAMES[TEACHER], headline_value(given), *("–",) * 3))
        found[TEACHER] = {"metric": metric, "mean": given.mean, "values": list(given.values)}
    for arm, run in runs.items():
        cost = student_cost(run)
        size = (
            ("–",) * 3
            if cost is None
            else (f"{cost.parameters:,}", f"{cost.macs / 1e6:.1f}", f"{cost.file_bytes / 1e6:.2f}")
        )
        rows.append((NAMES[arm], headline_value(run.headline), *size))
        found[arm] = {"metric": metric, "mean": run.headline.mean, "values": list(run.headline.values)}
    text = text_table(rows, "<>>>>")
    if LABELS_ALONE in runs:
        alone, distilled = values_by_key(runs[LABELS_ALONE]), values_by_key(runs[DISTILLED])
        gains = [distilled[key] - value for key, value in alone.items()]
        found["gain"] = {"metric": metric, "mean": sum(gains) / len(gains), "values": gains}
        write_text(out / "report.html", to_html(comparison([runs[LABELS_ALONE], runs[DISTILLED]])))
        gain = in_points(metric, found["gain"]["mean"], unit=True)
        text += f"\n\nDistilled minus labels alone: {gain}. The comparison is in {out / 'report.html'}"
    write_json(out / "results.json", found)
    return text


def tested_folder(distillations: Sequence[Distillation], out: Path, arm: str) -> Path:
    """The run folder of a teacher or student, or the folder of its runs in a cross-validation."""
    return out / HELD_OUT / arm if distillations[0].clip_list.name else distillations[0].folder(arm)
