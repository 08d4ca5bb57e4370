"""The section that says whether the difference between two runs is more than chance."""

from collections.abc import Sequence

from kd.reports.analysis.paired import (
    RESAMPLES,
    Interval,
    McNemar,
    PredictionPair,
    bootstrap_over_clips,
    mcnemar,
    mean_interval,
)
from kd.reports.document import Cell, Section, Table, Text
from kd.reports.run_reader import Part, RunFolder, is_number
from kd.reports.sections.wording import capitalised, metric_name

PartKey = tuple[str, int | None, int | None]

NOTE = (
    "Each run is compared with {first} in pairs of trainings with the same name, seed and fold. “Over trainings” is the 95% confidence "
    "interval (Student’s t) of the mean difference: what another draw of labels, seed or fold may change. “Over clips” is the 95% "
    "interval of a paired bootstrap with {resamples} resamples of the test clips: what other test clips may change."
)
NOTE_ON_MCNEMAR = (
    " McNemar’s test counts the clips about which only one of the two is right, over all pairs; it takes them as independent, so its "
    "p is too small where several trainings are tested on the same clips."
)


def parts_by_key(run: RunFolder) -> dict[PartKey, Part]:
    """A run's trainings by run name, seed and fold. The seed only counts if a run has several."""
    seeds: dict[str, set[int | None]] = {}
    for part in run.parts:
        seeds.setdefault(part.run, set()).add(part.seed)
    return {(part.run, part.seed if len(seeds[part.run]) > 1 else None, part.fold): part for part in run.parts}


def values_by_key(run: RunFolder) -> dict[PartKey, float]:
    """The headline metric of each training by its key."""
    metric = run.headline.metric
    found = {
        key: float(part.metrics[metric])
        for key, part in parts_by_key(run).items()
        if is_number(part.metrics.get(metric))
    }
    return found or {("", None, None): run.headline.mean}


def difference_sections(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Section]:
    """Each run's difference to the first, with intervals and tests. Nothing if none can be compared with it."""
    rows = [difference_row(runs[0], run, name) for run, name in zip(runs[1:], names[1:], strict=True)]
    rows = [row for row in rows if row is not None]
    if not rows:
        return []
    metric = runs[0].headline.metric
    headings = [
        f"compared with {names[0]}",
        f"{capitalised(metric_name(metric))} gained",
        "over trainings",
        "pairs",
        "over clips",
    ]
    note = NOTE.format(first=names[0], resamples=f"{RESAMPLES:,}")
    if runs[0].one_label:
        headings += [f"only {names[0]} right", "only this right", "McNemar’s p"]
        note += NOTE_ON_MCNEMAR
    return [Section("Differences and chance", (Table(tuple(headings), tuple(rows)), Text(note)))]


def difference_row(first: RunFolder, other: RunFolder, name: str) -> tuple[Cell, ...] | None:
    """A row of the table; None if the runs differ in classes or metric, or have no training in common."""
    if first.headline is None or other.headline is None or first.headline.metric != other.headline.metric:
        return None
    if first.class_names != other.class_names:
        return None
    metric = first.headline.metric
    ours, theirs = values_by_key(first), values_by_key(other)
    common = [key for key in ours if key in theirs]
    if not common:
        return None
    differences = [theirs[key] - ours[key] for key in common]
    pairs = prediction_pairs(first, other)
    over_clips = bootstrap_over_clips(pairs, first.one_label) if pairs and metric in ("accuracy", "mAP") else None
    cells: list[Cell] = [
        name,
        in_points(metric, sum(differences) / len(differences), unit=True),
        interval_text(metric, mean_interval(differences)),
        str(len(common)),
        interval_text(metric, over_clips),
    ]
    if first.one_label:
        cells += mcnemar_cells(mcnemar(pairs) if pairs else None)
    return tuple(cells)


def prediction_pairs(first: RunFolder, other: RunFolder) -> list[PredictionPair]:
    """The predictions of the trainings that both runs have, for the clips that both heard."""
    ours, theirs = parts_by_key(first), parts_by_key(other)
    pairs = []
    for key in ours.keys() & theirs.keys():
        a, b = ours[key].predictions, theirs[key].predictions
        pair = PredictionPair.of(a, b) if a is not None and b is not None else None
        if pair is not None:
            pairs.append(pair)
    return pairs


def in_points(metric: str, difference: float, unit: bool = False) -> str:
    """A difference with its sign: in percentage points for accuracies, else with three decimals."""
    scale, digits, name = (100, 1, " points") if "accuracy" in metric else (1, 3, "")
    return f"{scale * difference:+.{digits}f}".replace("-", "−") + (name if unit else "")


def interval_text(metric: str, interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{in_points(metric, interval.low)} to {in_points(metric, interval.high)}"


def mcnemar_cells(found: McNemar | None) -> list[Cell]:
    if found is None:
        return ["–", "–", "–"]
    p = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    return [str(found.only_first), str(found.only_other), p]
