"""The beginning of a report: its title, and the numbers that come first."""

from scipy.stats import binomtest

from kd.evaluation.baselines import baselines
from kd.reports.run_reader import RunFolder
from kd.reports.sections.cost import student_cost
from kd.reports.sections.wording import (
    beginning,
    capitalised,
    format_metric,
    headline_value,
    metric_name,
    parts_in_words,
    student_name,
)
from kd.run_folder.results import CHANCE, MAJORITY, mean_baseline


def title_and_headline(run: RunFolder) -> tuple[str, str, tuple[tuple[str, str, str], ...]]:
    """The title, the subtitle, and the headline numbers as (name, value, note)."""
    student = student_name(run)
    title = f"{student} on {run.task}" if run.task else f"{student}, pretrained"
    subtitle = f"{run.path.resolve().name}: {f'{run.what}, ' if run.what else ''}{beginning(run)}"
    if not run.finished:
        subtitle += ". This run has not finished; the report shows its results so far"
    numbers = []
    if run.headline is not None:
        name = capitalised(metric_name(run.headline.metric))
        numbers.append((name, headline_value(run.headline), headline_note(run) + baseline_note(run)))
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


def headline_note(run: RunFolder) -> str:
    """A note on the headline metric: over which parts it is the mean, and how far they spread."""
    headline = run.headline
    if len(headline.values) > 1:
        low, high = (format_metric(headline.metric, end(headline.values)) for end in (min, max))
        over = f"{len(headline.values)} {headline.over}" if headline.over else parts_in_words(run.parts)
        folds = len({part.fold for part in run.parts})
        if headline.over == "seeds" and folds > 1:
            over += f", each the mean of {folds} folds"
        return f"mean and standard deviation over {over}; {low} to {high}"
    if run.evaluation is not None:
        return f"kd evaluate on {run.evaluation}"
    if not run.predictions:
        return "of the last validation"
    if headline.metric != "accuracy":
        return "a single training, so its spread is unknown"
    clips = len(run.predictions[0][1].clip_ids)
    interval = binomtest(round(headline.mean * clips), clips).proportion_ci(method="wilson")
    return f"a single training; 95% interval for {clips:,} clips: {interval.low:.1%} to {interval.high:.1%}"


def baseline_note(run: RunFolder) -> str:
    """The baselines of the headline metric, as the end of a note. Empty if they are not known."""
    baseline = run.headline.baseline
    if not baseline and run.label_space is not None and run.predictions:  # a run of an earlier version
        found = [baselines(run.label_space, part.targets, part.known) for _, part in run.predictions]
        baseline = mean_baseline(run.headline.metric, found)
    words = {CHANCE: "chance", MAJORITY: "always the most frequent class"}
    told = [f"{words[name]} {format_metric(run.headline.metric, value)}" for name, value in baseline.items()]
    return f"; {', '.join(told)}" if told else ""
