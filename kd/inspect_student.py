"""Looks inside a trained DyMN: what each dynamic part is worth when its coefficients are disturbed, and what Dy-ReLUs do.

Table XII and Fig. 6 of Schmid, Koutini and Widmer, "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio
Models", 2023. (Not called inspect.py: run as a script, this folder comes first on the module path, and Python has a module of
that name.)

Shapes: N clips, B clips of a batch, K classes.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audio_datasets.audio.bad_clips import OnBadClip, summary
from audio_datasets.stores.class_lists import check_same_classes, read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import heard_of, select_rows
from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.files import write_json, written_aside
from audio_datasets.system.paths.outputs import Output, check_outputs
from audio_datasets.system.randomness import generator
from audio_datasets.system.text_tables import markdown_table
from audio_datasets.system.workers.loading import create_loader
from kd.data.windows import EvaluationWindows, Window
from kd.evaluation.metrics import tagging_metrics
from kd.reports.plain_matplotlib import Figure, plain_style
from kd.run_folder.config import as_json
from students.interface import Student
from students.interventions import DETERMINISTIC, ReLUPlace, dynamic_relus, intervention, methods_for, watched_relus
from teacher_logits.processes import start_accelerator
from teacher_logits.teachers.loaders import load_teacher
from teacher_logits.teachers.network import StudentTeacher

TABLE_FILE = "inspect.md"
RESULTS_FILE = "inspect.json"
MAP_CHART_FILE = "inspect_map.png"
RELU_CHART_FILE = "inspect_dyrelu.png"
SHOWN_QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class InspectConfig:
    """Measure what the dynamic parts of a trained DyMN contribute: disturb one part at a time and report the mAP that remains, as a
    table and a chart. Also plot the outputs of its dynamic ReLUs over their inputs."""

    tagger: str
    """Run folder, or NAME@WEIGHTS (such as dymn10@dymn10_as.pt), of a DyMN."""
    clips: Path
    """Clip store to evaluate on."""
    out: Path
    """Folder for the table (inspect.md), the numbers (inspect.json) and the charts (inspect_map.png, inspect_dyrelu.png)."""
    split: str | None = None
    """Only the clips of this split of the store's manifest."""
    folds: tuple[int, ...] = ()
    """Only the clips of these folds."""
    class_names: Path | None = None
    """Class list for weights or clip stores without one (AudioSet's class_labels_indices.csv, or one name per line)."""
    clip_seconds: float | None = None
    """Seconds of each clip that the tagger hears (default: its own input length)."""
    repeats: int = 3
    """Number of random draws for each shuffle; the table shows the mean."""
    blocks: tuple[int, ...] = ()
    """Blocks whose dynamic ReLU is plotted, from 1 to 15 (default: the first, the third, the third from the end and the last)."""
    points: int = 10_000
    """Number of points to plot for each dynamic ReLU."""
    seed: int = 0
    """Seed of the order of the clips, the shuffles and the choice of points."""
    batch_size: int = 32
    """Clips in a batch. Clips exchange contexts within a batch."""
    workers: int = 2
    """Data-loading processes."""
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops and names it; skip leaves it out and lists it. An extra pass first finds such
    clips."""

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("points", 1), ("seed", 0), ("batch_size", 2), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; found {getattr(self, name)}")


class Row(NamedTuple):
    """A line of the table."""

    part: str
    method: str
    values: tuple[float, ...]
    """mAP of each repeat."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


class Run(NamedTuple):
    """A pass of all clips under one intervention, or under none."""

    part: str
    method: str
    repeat: int


UNTOUCHED = Run("", "untouched", 0)


def inspect_student(config: InspectConfig) -> dict:
    """Runs the inspection, prints the table, writes table, numbers and charts, and returns the numbers.

    Raises:
        ValueError: a tagger that is no DyMN, blocks without dynamic ReLU, a single clip, files that are missing or of another
            kind, class lists that differ, clips without labels, or more than one process.
    """
    torch.set_flush_denormal(True)
    accelerator = start_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"kd inspect runs in one process; found {accelerator.num_processes}")
    files = (TABLE_FILE, RESULTS_FILE, MAP_CHART_FILE, RELU_CHART_FILE)
    check_outputs(config, [Output(config.out / name, lambda path: True, "the results of kd inspect") for name in files])
    clips, tagger, methods, places = open_inputs(config)
    rows = select_rows(clips, split=config.split, folds=config.folds or None)
    rows, skipped = usable(clips, rows, tagger, config)
    if len(rows) < 2:
        raise ValueError(f"kd inspect needs at least two clips, which exchange contexts; found {len(rows)}")

    runs = [UNTOUCHED]
    for part, method in methods:
        runs += [Run(part, method, repeat) for repeat in range(1 if method in DETERMINISTIC else config.repeats)]
    logits, points = disturbed_logits(tagger.to(accelerator.device), clips, rows, runs, places, config)

    targets, known = clips.targets(rows), clips.mask(rows)

    def mean_average_precision(scores: np.ndarray) -> float:
        return tagging_metrics(targets, scores, clips.class_names, known).mean_average_precision

    found = {run: mean_average_precision(scores) for run, scores in zip(runs, logits, strict=True)}
    table_rows = [
        Row(part, method, tuple(value for run, value in found.items() if run[:2] == (part, method)))
        for part, method in methods
    ]
    chance = [
        mean_average_precision(generator(config.seed, "inspect random predictions", 0, repeat).random(targets.shape))
        for repeat in range(config.repeats)
    ]
    untouched, random_row = found[UNTOUCHED], Row("", "random predictions", tuple(chance))
    results = {
        "config": as_json(config), "num_clips": len(rows), "skipped_clips": skipped,
        "untouched": {"mAP": untouched},
        "random_predictions": _numbers(random_row, untouched),
        "interventions": [
            {"part": row.part, "method": row.method, **_numbers(row, untouched)} for row in table_rows
        ],
        "dyrelu": [
            {"block": place.block, "position": place.position, "points": len(values), **_shape_of(values)}
            for place, values in points.items()
        ],
    }  # fmt: skip
    write_results(config, f"{tagger.name}, {len(rows)} clips", untouched, random_row, table_rows, points, results)
    told = summary(skipped, len(rows) + len(skipped), "skipped") if skipped else ""
    for line in filter(None, (told, str(heard_of([clips.path], tagger.clip_seconds, rows)))):
        print(line)
    return results


def open_inputs(config: InspectConfig) -> tuple[ClipStore, StudentTeacher, list[tuple[str, str]], list[ReLUPlace]]:
    """The clip store, the DyMN, the interventions that it allows (part and method), and the Dy-ReLUs to draw."""
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = ClipStore.open(config.clips, class_names=class_names)
    tagger = load_teacher(config.tagger, class_names=class_names or clips.class_names, clip_seconds=config.clip_seconds)
    if not isinstance(tagger, StudentTeacher):
        raise ValueError(f"kd inspect needs a DyMN from the catalog; {config.tagger} is a {type(tagger).__name__}")
    try:
        methods = methods_for(tagger.student)
        places = chosen_relus(tagger.student, config.blocks)
    except ValueError as error:
        raise ValueError(f"{config.tagger}: {error}") from error
    check_same_classes(clips.class_names, tagger.class_names, str(config.clips), config.tagger)
    return clips, tagger, methods, places


def write_results(
    config: InspectConfig,
    title: str,
    untouched: float,
    chance: Row,
    rows: Sequence[Row],
    points: Mapping[ReLUPlace, np.ndarray],
    results: dict,
) -> None:
    """Prints the table and writes it, the numbers and the charts."""
    text = table_of_parts(untouched, chance, rows)
    print(f"{title}; mean of {config.repeats} draws\n{text}")
    with written_aside(config.out / TABLE_FILE) as aside:
        aside.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    write_json(config.out / RESULTS_FILE, results)
    draw_map_chart(untouched, chance, rows, config.out / MAP_CHART_FILE, title)
    if points:
        draw_relu_chart(points, config.out / RELU_CHART_FILE, f"Dy-ReLU, {title}")
    else:
        print("this DyMN has no dynamic ReLUs to plot")


def _numbers(row: Row, untouched: float) -> dict:
    return {"mAP": row.mean, "difference": row.mean - untouched, "mAP_of_draws": list(row.values)}


def _shape_of(values: np.ndarray) -> dict[str, float]:
    """How far a Dy-ReLU's points (points, 2) lie from a ReLU's: shares of negative inputs, and of those that come out positive."""
    negative = values[:, 0] < 0
    turned = float((values[negative, 1] > 0).mean()) if negative.any() else 0.0
    return {"negative_inputs": float(negative.mean()), "positive_outputs_of_negative_inputs": turned}


# --- Passes over the clips ---------------------------------------------------------------------------------------------


def chosen_relus(student: Student, blocks: Sequence[int]) -> list[ReLUPlace]:
    """The Dy-ReLUs of blocks, or without any given those of four blocks from first to last.

    Raises:
        ValueError: a block that has none, or a student that is no DyMN.
    """
    relus = dynamic_relus(student)
    having = list(dict.fromkeys(place.block for place in relus))
    for block in blocks:
        if block not in having:
            raise ValueError(f"block {block} has no dynamic ReLU; choices: {', '.join(map(str, having)) or 'none'}")
    wanted = blocks or {*having[0::2][:2], *having[::-1][0::2][:2]}
    return [place for place in relus if place.block in wanted]


def usable(
    clips: ClipStore, rows: np.ndarray, tagger: StudentTeacher, config: InspectConfig
) -> tuple[np.ndarray, dict[str, str]]:
    """The rows of the clips that can be used, and why each of the others cannot (reason by clip id).

    Left out beforehand, since a batch from which a clip is missing would exchange other contexts. With
    ``on_bad_clip="refuse"`` these are all rows: the first bad clip is met, and refused, later.
    """
    if config.on_bad_clip == "refuse":
        return rows, {}
    window = Window(tagger.sample_rate_hz, tagger.clip_seconds, tagger.short_clips)
    dataset = EvaluationWindows(clips, rows, window, on_bad_clip="skip", whole_clips=False)
    loader = create_loader(dataset, batch_size=config.batch_size, workers=config.workers)
    bad = [
        ~int(index)
        for indices, _ in progress(loader, desc="read", unit="batch", leave=False)
        for index in indices
        if index < 0
    ]
    return np.delete(rows, bad), {dataset.clip_id(index): dataset.reason(index) for index in bad}


@torch.inference_mode()
def disturbed_logits(
    tagger: StudentTeacher,
    clips: ClipStore,
    rows: np.ndarray,
    runs: Sequence[Run],
    places: Sequence[ReLUPlace],
    config: InspectConfig,
) -> tuple[np.ndarray, dict[ReLUPlace, np.ndarray]]:
    """Logits of every run, (runs, N, K), and inputs and outputs of the untouched student's Dy-ReLUs, (points, 2) each.

    The clips come in random order, since stores are often sorted. A batch is decoded once and goes through all runs.
    """
    device = next(tagger.parameters()).device
    order = generator(config.seed, "inspect order").permutation(len(rows))
    # Alike in size and never a single clip, so an odd number in twos has a batch of three.
    batches = np.array_split(order, min(math.ceil(len(rows) / config.batch_size), len(rows) // 2))
    window = Window(tagger.sample_rate_hz, tagger.clip_seconds, tagger.short_clips)
    dataset = EvaluationWindows(clips, rows, window, whole_clips=False)
    loader = create_loader(dataset, batch_sampler=[batch.tolist() for batch in batches], workers=config.workers)
    logits = np.zeros((len(runs), len(rows), len(tagger.class_names)), dtype=np.float32)
    points: dict[ReLUPlace, list[np.ndarray]] = {place: [] for place in places}
    seen = 0
    for position, (indices, waveform) in enumerate(progress(loader, desc="inspect", unit="batch", leave=False)):
        mel = tagger.log_mel(waveform.to(device))
        share = config.points * (seen + len(indices)) // len(rows) - config.points * seen // len(rows)
        seen += len(indices)
        for number, run in enumerate(runs):
            rng = generator(config.seed, f"inspect {run.part} {run.method} {run.repeat}", 0, position)
            if run == UNTOUCHED:
                watching = _Points(points, share, config.seed, position)
                with watched_relus(tagger.student, places, watching):
                    output = tagger.student(mel)
            else:
                with intervention(tagger.student, run.part, run.method, rng):
                    output = tagger.student(mel)
            logits[number, indices.numpy()] = output.logits.float().cpu().numpy()
    return logits, {place: np.concatenate(parts) for place, parts in points.items()}


class _Points:
    """Adds chosen inputs and outputs of each Dy-ReLU of a batch to ``into``."""

    def __init__(self, into: Mapping[ReLUPlace, list[np.ndarray]], share: int, seed: int, position: int) -> None:
        self.into, self.share, self.seed, self.position = into, share, seed, position

    def __call__(self, place: ReLUPlace, inputs: Tensor, outputs: Tensor) -> None:
        rng = generator(self.seed, f"inspect points {place.block} {place.position}", 0, self.position)
        chosen = tuple(torch.from_numpy(rng.integers(size, size=self.share)).to(inputs.device) for size in inputs.shape)
        self.into[place].append(torch.stack((inputs[chosen], outputs[chosen]), 1).float().cpu().numpy())


# --- Table and charts --------------------------------------------------------------------------------------------------


def table_of_parts(untouched: float, chance: Row, rows: Sequence[Row]) -> str:
    """Table XII: part, method, mAP, difference from the untouched student, and the spread of the draws."""
    cells = [("part", "method", "mAP", "difference", "draws from – to")]
    cells.append(("", UNTOUCHED.method, f"{untouched:.4f}", "", ""))
    previous = ""
    for row in (chance, *rows):
        spread = f"{min(row.values):.4f} – {max(row.values):.4f}" if len(row.values) > 1 else ""
        part = row.part if row.part != previous else ""
        cells.append((part, row.method, f"{row.mean:.4f}", f"{row.mean - untouched:+.4f}", spread))
        previous = row.part
    return markdown_table(cells, "<<>")


@plain_style()
def draw_map_chart(untouched: float, chance: Row, rows: Sequence[Row], path: Path, title: str) -> None:
    """A bar for each intervention, a colour for each part, a line from the lowest to the highest draw, untouched dashed."""
    figure = Figure(figsize=(8, 0.36 * len(rows) + 1.8), layout="constrained")
    axes = figure.add_subplot(xlabel="mAP")
    axes.set_title(title, fontsize="medium")
    parts = list(dict.fromkeys(row.part for row in rows))
    heights = [-(number + 0.6 * parts.index(row.part)) for number, row in enumerate(rows)]
    reach = max(untouched, *(max(row.values) for row in rows))
    for row, height in zip(rows, heights, strict=True):
        axes.barh(height, row.mean, height=0.75, color=f"C{parts.index(row.part)}", zorder=2)
        low, high = min(row.values), max(row.values)
        if high > low:
            axes.errorbar(row.mean, height, xerr=[[row.mean - low], [high - row.mean]], color="0.25", capsize=2, lw=1)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the dashed line
        axes.text(high + 0.01 * reach, height, f"{row.mean:.3f}", va="center", fontsize="small", bbox=paper, zorder=4)
    axes.axvline(untouched, color="0.2", linestyle="--", linewidth=1, zorder=3, label=f"untouched {untouched:.3f}")
    axes.axvline(chance.mean, color="0.5", ls=":", lw=1, zorder=3, label=f"random predictions {chance.mean:.3f}")
    axes.set_yticks(heights, [f"{row.part}  {row.method}" for row in rows])
    axes.set_xlim(0, 1.12 * reach)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    shown = axes.get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower right", ncols=2, frameon=False, fontsize="small")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=130)


@plain_style()
def draw_relu_chart(points: Mapping[ReLUPlace, np.ndarray], path: Path, title: str) -> None:
    """Fig. 6: a panel for each Dy-ReLU, outputs over inputs, the conventional ReLU as a dashed red line.

    Axes end where the outermost 1 % of inputs or outputs begin on either side: a single clip can lie far out.
    """
    lines = math.ceil(len(points) / 4)
    columns = math.ceil(len(points) / lines)
    figure = Figure(figsize=(max(3.2 * columns, 4.0), 3.2 * lines + 0.4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    several = len({place.position for place in points}) > 1
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(points) :]:
        axes.set_visible(False)
    for axes, (place, values) in zip(panels.flat, points.items(), strict=False):
        axes.scatter(values[:, 0], values[:, 1], s=2, alpha=0.3, linewidths=0, rasterized=True)
        (left, low), (right, high) = np.quantile(values, SHOWN_QUANTILES, axis=0)
        ends = np.sort([left, 0.0, right])
        axes.plot(ends, ends.clip(min=0.0), color="red", linestyle="--", linewidth=1)
        axes.set_xlim(*_widened(min(left, 0.0), max(right, 0.0)))
        axes.set_ylim(*_widened(min(low, 0.0), max(high, right, 0.0)))
        axes.locator_params(nbins=5)
        axes.set_xlabel("input")
        axes.set_title(f"block {place.block}" + (f", position {place.position}" if several else ""), fontsize="medium")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    for axes in panels[:, 0]:
        axes.set_ylabel("output")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=130)


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: inspect_student(parse(InspectConfig, arguments, "kd inspect")))


if __name__ == "__main__":
    raise SystemExit(main())
