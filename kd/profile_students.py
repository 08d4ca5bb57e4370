"""What students cost: parameters, multiply-accumulates, memory and file sizes, and the time they take on this machine.

(Not called profile.py: run as a script, this folder comes first on the module path, and Python has a module of that name.)
"""

import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from safetensors.torch import save
from torch import Tensor

from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.files import write_json, written_aside
from audio_datasets.system.paths.outputs import Output, check_outputs, is_chart, json_with
from audio_datasets.system.text_tables import text_table
from kd.reports.plain_matplotlib import Axes, Bbox, Figure, plain_style
from kd.run_folder.config import as_json, parse_options
from students import create_student, list_students
from students.card import CARD_FILE, load_student
from students.catalog import options_for
from students.frontend import LogMelConfig
from students.interface import Student
from students.profile import profile_student

Flat = tyro.conf.arg(name="")

CHART_FORMATS = (".png", ".svg", ".pdf")
WARM_UP_PASSES = 2


@dataclass(frozen=True)
class ProfileConfig:
    """Measure what students cost for one clip, as a table and, with --chart, as a chart of MACs against parameters."""

    student: tuple[str, ...] = ()
    """Names from the catalog, or folders of trained students (default: the whole catalog)."""
    student_options: tuple[str, ...] = ()
    """Options of the students from the catalog, each NAME=VALUE."""
    num_classes: int = 527
    """Number of classes of the students from the catalog."""
    clip_seconds: float = 10.0
    """Length of the clip."""
    repeats: int = 10
    """Number of timed passes with a batch of one; the median is reported. 0: no timing."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to time on."""
    threads: int | None = None
    """Number of CPU threads (default: PyTorch's choice)."""
    chart: Path | None = None
    """Draw MACs against parameters into this file (.png, .svg or .pdf)."""
    out: Path | None = None
    """Write the numbers as JSON to this file."""
    overwrite: bool = False
    """Let --out and --chart replace files that hold something else."""
    frontend: Annotated[LogMelConfig, Flat] = field(default_factory=LogMelConfig)

    def __post_init__(self) -> None:
        if not self.clip_seconds > 0:
            raise ValueError(f"clip_seconds must be positive; found {self.clip_seconds}")
        if self.repeats < 0 or (self.threads is not None and self.threads < 1):
            raise ValueError(
                f"repeats must be at least 0 and threads at least 1; found {self.repeats} and {self.threads}"
            )
        if self.chart is not None and self.chart.suffix not in CHART_FORMATS:
            raise ValueError(f"--chart must end in one of {', '.join(CHART_FORMATS)}; found {self.chart}")


@dataclass(frozen=True)
class StudentCost:
    """A line of the table."""

    name: str
    """Catalog name, or folder."""
    family: str
    """What the chart draws in one colour."""
    num_classes: int
    n_mels: int
    frames: int
    parameters: int
    macs: int
    activation_bytes: int
    """Most memory that maps take at the same time, in float32 (see ``students.profile``)."""
    fp32_bytes: int
    """Size of student.safetensors: all tensors, the running statistics of batch norms among them."""
    fp16_bytes: int
    """The same with every floating-point tensor in half precision."""
    int8_bytes: int
    """The same with what ``quantize_weights`` makes of it."""
    seconds: float | None
    """Median time of a pass in evaluation mode."""
    fused_seconds: float | None
    """The same for the copy with folded batch norms."""


def profile_students(config: ProfileConfig) -> list[StudentCost]:
    """Profiles the students, prints the table, writes what was asked for, and returns the lines.

    Raises:
        ValueError: an unknown student or option, or a device that is not there.
    """
    outputs = [Output(config.chart, is_chart, "a chart")] if config.chart else []
    outputs += [Output(config.out, json_with("machine", "students"), "the costs of students")] if config.out else []
    check_outputs(config, outputs, config.overwrite)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; leave it out to measure on the CPU")
    torch.set_flush_denormal(True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    names = config.student or distinct_students()
    builders = [student_builder(name, config) for name in names]  # a wrong name or option shows before anything is run
    costs = []
    for name, build in zip(names, progress(builders, desc="profile", leave=False), strict=True):
        costs.append(measured_cost(name, *build(), config))
    print(description(costs, config))
    print(table(costs))
    if config.chart is not None:
        draw_chart(costs, config.chart, description(costs, config, measured=False))
    if config.out is not None:
        write_json(
            config.out,
            {"config": as_json(config), "machine": machine(), "students": [dataclasses.asdict(cost) for cost in costs]},
        )
    return costs


# --- Numbers -----------------------------------------------------------------------------------------------------------


def distinct_students() -> list[str]:
    """The catalog without names that stand for the same student as an earlier one."""
    found: dict[tuple, str] = {}
    for name in list_students():
        with torch.device("meta"):
            student = create_student(name, num_classes=1)
        shapes = tuple((key, tuple(value.shape)) for key, value in student.state_dict().items())
        found.setdefault((type(student), str(student.config.options), shapes), name)
    return list(found.values())


def student_builder(name: str, config: ProfileConfig) -> Callable[[], tuple[Student, LogMelConfig]]:
    """What gives the student of a name or folder and its front end; ValueError if nothing can."""
    if (Path(name) / CARD_FILE).is_file():
        if config.student_options:
            raise ValueError(f"--student-options apply to students from the catalog; {name} is a trained student")

        def load() -> tuple[Student, LogMelConfig]:
            student = load_student(name)
            card = student.card
            return student, card.frontend

        return load

    options = options_for(name, parse_options(config.student_options), config.frontend)
    with torch.device("meta"):
        create_student(name, config.num_classes, **options)
    return lambda: (create_student(name, config.num_classes, **options), config.frontend)


def measured_cost(name: str, student: Student, frontend: LogMelConfig, config: ProfileConfig) -> StudentCost:
    """Everything in a line of the table; the time is measured on ``config.device``."""
    student.eval()
    frames = frontend.frames(round(config.clip_seconds * frontend.sample_rate_hz))
    profile = profile_student(student, frontend.n_mels, frames)
    state = {key: value.detach().contiguous() for key, value in student.state_dict().items()}
    times: tuple[float | None, float | None] = (None, None)
    if config.repeats:
        mel = torch.randn(1, 1, frontend.n_mels, frames, generator=torch.Generator().manual_seed(0))
        times = median_seconds([student, student.fuse()], mel, config.repeats, config.device)
    return StudentCost(
        name=name,
        family=type(student).__name__,
        num_classes=student.num_classes,
        n_mels=frontend.n_mels,
        frames=frames,
        parameters=profile.parameters,
        macs=profile.macs,
        activation_bytes=profile.activation_bytes,
        fp32_bytes=len(save(state)),
        fp16_bytes=len(
            save({key: value.half() if value.is_floating_point() else value for key, value in state.items()})
        ),
        int8_bytes=len(save(quantize_weights(state))),
        seconds=times[0],
        fused_seconds=times[1],
    )


def quantize_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the weights of layers in 8 bits: what a file for weight-only int8 inference holds.

    A floating-point tensor of two or more axes (kernels, matrices) becomes int8, symmetric about 0, with a float32 scale
    for each index of its first axis, under the name with ``.scale``; tensor ≈ int8 × scale. Biases, batch norms and
    counters stay as they are.
    """
    quantized: dict[str, Tensor] = {}
    for name, value in state.items():
        if not value.is_floating_point() or value.ndim < 2:
            quantized[name] = value
            continue
        largest = value.abs().amax(tuple(range(1, value.ndim)), keepdim=True)
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        quantized[name] = (value / scale).round().clamp(-127, 127).to(torch.int8)
        quantized[f"{name}.scale"] = scale.flatten().float()
    return quantized


@torch.inference_mode()
def median_seconds(students: Sequence[Student], mel: Tensor, repeats: int, device: str) -> tuple[float, ...]:
    """Median time of a pass of each student. They run in turns, so that a busy machine slows all of them."""
    students, mel = [student.to(device) for student in students], mel.to(device)
    seconds: list[list[float]] = []
    for _ in range(WARM_UP_PASSES + repeats):
        turn = []
        for student in students:
            _wait_for(device)
            start = time.perf_counter()
            student(mel)
            _wait_for(device)
            turn.append(time.perf_counter() - start)
        seconds.append(turn)
    return tuple(statistics.median(column) for column in zip(*seconds[WARM_UP_PASSES:], strict=True))


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- Table and chart ---------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the measured times depend on."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        models = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor, "gpu": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def description(costs: Sequence[StudentCost], config: ProfileConfig, measured: bool = True) -> str:
    """What the numbers are for; trained students have their own front ends and classes."""
    inputs = {f"{cost.n_mels} mels × {cost.frames} frames" for cost in costs}
    classes = {f"{cost.num_classes} classes" for cost in costs}
    text = f"a clip of {config.clip_seconds:g} s ({' or '.join(sorted(inputs))}), {' or '.join(sorted(classes))}"
    if not (measured and config.repeats):
        return text
    here = machine()
    where = here["gpu"] if config.device == "cuda" else f"{here['processor']}, {here['threads']} thread(s)"
    return f"{text}; time: median of {config.repeats} batches of one, {where}, torch {here['torch']}"


def table(costs: Sequence[StudentCost]) -> str:
    """The lines under their headings, numbers aligned to the right. MB are 10⁶ bytes; "folded" is the time of ``fuse()``."""
    rows = [("student", "parameters", "MMACs", "maps MB", "fp32 MB", "fp16 MB", "int8 MB", "ms", "folded ms")]
    for cost in costs:
        megabytes = (cost.activation_bytes, cost.fp32_bytes, cost.fp16_bytes, cost.int8_bytes)
        rows.append(
            (
                cost.name,
                f"{cost.parameters:,}",
                f"{cost.macs / 1e6:,.1f}",
                *(f"{size / 1e6:.2f}" for size in megabytes),
                *("-" if seconds is None else f"{1e3 * seconds:.1f}" for seconds in (cost.seconds, cost.fused_seconds)),
            )
        )
    return text_table(rows)


@plain_style()
def draw_chart(costs: Sequence[StudentCost], path: Path, title: str) -> None:
    """MACs against parameters, both logarithmic: a colour for each family, a name at each point."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="parameters (millions)", ylabel="MACs (millions)")
    axes.set_title(f"Multiply-accumulates against parameters: {title}", fontsize="medium")
    axes.grid(which="both", color="0.92")
    axes.set_axisbelow(True)
    colours: dict[str, str] = {}
    points = {cost.name: (cost.parameters / 1e6, cost.macs / 1e6) for cost in costs}
    for family in dict.fromkeys(cost.family for cost in costs):
        members = sorted((points[cost.name], cost.name) for cost in costs if cost.family == family)
        (line,) = axes.plot(
            *zip(*(point for point, _ in members), strict=True), marker="o", linewidth=1, markersize=5, label=family
        )
        colours |= {name: line.get_color() for _, name in members}
    axes.margins(0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    _label_points(axes, points, colours)
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=130)


_NEAR = ((7, 0), (-7, 0), (0, 7), (0, -7))
_FAR = tuple(
    (across * size * x, up * size * y)
    for size in (14, 24, 36, 48)
    for x, y in ((1, 0.4), (0.4, 1))
    for up in (1, -1)
    for across in (1, -1)
)
"""Where a name may stand, in points from its point; the first that is free. From a far one a line leads to the point."""


def _label_points(axes: Axes, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Puts each name beside its point, where it covers no point, line or other name, if there is such a place."""
    axes.figure.draw_without_rendering()  # fixes where everything lies
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in map(axes.transData.transform, points.values())]
    for line in axes.lines:
        for start, end in itertools.pairwise(axes.transData.transform(line.get_xydata())):
            taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in np.linspace(start, end, 200)]
    names: list[Bbox] = []
    for name, point in points.items():
        for place in (*_NEAR, *_FAR):
            across, up = place
            label = axes.annotate(
                name,
                point,
                place,
                textcoords="offset points",
                ha="left" if across > 0 else "right" if across < 0 else "center",
                va="center" if across else "bottom" if up > 0 else "top",
                fontsize="small",
                color=colours[name],
            )
            box, start = label.get_window_extent(), axes.transData.transform(point)
            end = start + np.array(place) * axes.figure.dpi / 72
            leader = np.linspace(start, end, 50)
            if not any(map(box.overlaps, taken)) and not any(
                other.contains(x, y) for other in names for x, y in leader
            ):
                break
            if place != _FAR[-1]:  # which has to do where none is free
                label.remove()
        taken.append(box)
        names.append(box)
        if place in _FAR:
            style = {"arrowstyle": "-", "linewidth": 0.5, "color": colours[name], "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", point, place, textcoords="offset points", arrowprops=style)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: profile_students(parse(ProfileConfig, arguments, "kd profile")))


if __name__ == "__main__":
    raise SystemExit(main())
