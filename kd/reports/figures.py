"""Charts of reports, as SVG to be placed in a page.

Text stays text, so it can be searched. Black and grey become the page's text and line colours, for light and dark mode.

Shapes: C classes, R points of recall.
"""

import itertools
import math
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

import numpy as np

from audio_datasets.system.files import digest_of
from kd.reports.plain_matplotlib import Axes, Figure, LogLocator, MaxNLocator, Rectangle, cycler, plain_style

WIDTH_PIXELS = 900
PIXELS_PER_INCH = 72  # Matplotlib's SVG files use one pixel per point
COLOURS = ("#2f7fd0", "#e07a2f", "#2fa36b", "#c94f7c", "#8a6bd8", "#8c7a3f")
RIGHT, WRONG = COLOURS[0], COLOURS[1]
LARGEST_NUMBERED_MATRIX = 25

# Placeholder colours that no chart uses. In the finished SVG they are replaced by the colours of the page.
_INK, _LINE = "#010203", "#040506"
_PAGE_COLOURS = {_INK: "currentColor", _LINE: "var(--line)"}

_SETTINGS = {
    "svg.fonttype": "none",  # write text as text, not as outlines: searchable and small
    "svg.hashsalt": "report",  # the same chart always gives the same ids
    "text.parse_math": False,  # a class may be called "$"
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Lines:
    """A panel of curves."""

    title: str
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]
    """The curves by name: one (x, y) for each part of the run. If there are several parts, their mean is drawn as a thick line."""
    logarithmic: bool = False


def learning_curves(panels: Sequence[Lines]) -> str:
    """Panels of curves over epochs, in a grid."""
    with _styled():
        columns = 3 if len(panels) == 3 else 2
        rows = math.ceil(len(panels) / columns)
        figure = _figure(270 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            axes.set_title(panel.title)
            axes.set_xlabel("epochs")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if panel.logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            for colour, (name, curves) in zip(itertools.cycle(COLOURS), panel.curves.items()):
                _draw_curves(axes, name, curves, colour)
            if len(panel.curves) > 1:
                axes.legend(fontsize="small")
        return _svg(figure, "; ".join(panel.title for panel in panels))


def _draw_curves(axes: Axes, name: str, curves: Sequence[tuple[np.ndarray, np.ndarray]], colour: str) -> None:
    for x, y in map(_thinned, curves):
        several = len(curves) > 1
        axes.plot(x, y, color=colour, linewidth=1 if several else 2, alpha=0.35 if several else 1)
        if len(x) == 1:
            axes.plot(x, y, "o", color=colour)
    everywhere = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    if len(curves) > 1 and everywhere:
        mean = np.mean([y[np.isin(x, everywhere)] for x, y in curves], axis=0)
        axes.plot(*_thinned((np.array(everywhere), mean)), color=colour, linewidth=2.2)
    axes.plot([], [], color=colour, linewidth=2, label=name)


def _thinned(curve: tuple[np.ndarray, np.ndarray], at_most: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """At most ``at_most`` points of a curve, evenly spaced, including the first and the last."""
    x, y = curve
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), at_most)).round().astype(int))
    return x[chosen], y[chosen]


def class_bars(
    names: Sequence[str], values: np.ndarray, spreads: np.ndarray | None, axis_label: str, mean: float | None = None
) -> str:
    """A horizontal bar for each class, the first at the top, with error bars for ``spreads`` and a line at ``mean``."""
    with _styled():
        figure = _figure(21 * len(names) + 62)
        axes = figure.add_subplot(xlabel=axis_label)
        places = -np.arange(len(names))
        axes.barh(places, values, height=0.72, color=COLOURS[0], alpha=0.85)
        if spreads is not None:
            some = np.isfinite(spreads) & (spreads > 0)
            axes.errorbar(
                values[some], places[some], xerr=spreads[some], fmt="none", ecolor=_INK, elinewidth=1, capsize=2
            )
        if mean is not None:
            axes.axvline(mean, color=COLOURS[1], linestyle="--", linewidth=1.4)
            axes.annotate(f"mean {mean:.3f}", (mean, 1), (4, 2), xycoords=("data", "axes fraction"),
                          textcoords="offset points", color=COLOURS[1], fontsize="small")  # fmt: skip
        axes.set_yticks(places, [_shortened(name) for name in names])
        axes.set_xlim(0, max(1.0, float(np.nanmax(values, initial=0.0))))
        axes.set_ylim(places[-1] - 0.7, 0.7)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        return _svg(figure, f"{axis_label} of {len(names)} classes")


def confusion_matrix(confusion: np.ndarray, names: Sequence[str]) -> str:
    """A matrix of counts (C, C), with a row for each true class and a column for each chosen class.

    Correct choices are blue and wrong ones orange. The opacity of a cell grows with its share of the true class. Empty cells are
    blank. Counts are written into the cells if there are at most ``LARGEST_NUMBERED_MATRIX`` classes.
    """
    with _styled():
        classes = len(names)
        numbered = classes <= LARGEST_NUMBERED_MATRIX
        size = 680 if numbered else min(900, 260 + 13 * classes)
        figure = _figure(size, width_pixels=min(WIDTH_PIXELS, size + 110))
        axes = figure.add_subplot(xlabel="chosen", ylabel="true")
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        for true, chosen in np.argwhere(confusion > 0):
            colour = RIGHT if true == chosen else WRONG
            strength = 0.12 + 0.68 * shares[true, chosen]
            axes.add_patch(Rectangle((chosen - 0.5, true - 0.5), 1, 1, color=colour, alpha=strength, linewidth=0))
            if numbered:
                axes.text(chosen, true, str(confusion[true, chosen]), ha="center", va="center", fontsize="small")
        axes.set_xlim(-0.5, classes - 0.5)
        axes.set_ylim(classes - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        shown = [_shortened(name, 24) for name in names]
        small = 12 if numbered else 9
        axes.set_xticks(range(classes), shown, rotation=90, fontsize=small)
        axes.set_yticks(range(classes), shown, fontsize=small)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(True)
        return _svg(figure, f"Confusion matrix of {classes} classes")


def precision_recall(
    recall: np.ndarray, precision: np.ndarray, mean: np.ndarray, panels: Sequence[tuple[str, np.ndarray]]
) -> str:
    """The curves of all classes (C, R) and their mean (R,) in one panel, and below it a panel for each named curve (R,)."""
    with _styled():
        columns = 4
        rows = math.ceil(len(panels) / columns)
        figure = _figure(330 + 210 * rows)
        grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.5, *[1] * rows])
        axes = figure.add_subplot(grid[0, :], title="all classes and their mean", xlabel="recall", ylabel="precision")
        for curve in precision[:: max(1, len(precision) // 200)]:
            axes.plot(recall, curve, color=COLOURS[0], linewidth=0.7, alpha=0.25)
        axes.plot(recall, mean, color=COLOURS[1], linewidth=2.4)
        _unit_square(axes)
        for place, (name, curve) in enumerate(panels):
            axes = figure.add_subplot(grid[1 + place // columns, place % columns])
            axes.set_title(_shortened(name, 26), fontsize="small")
            axes.fill_between(recall, curve, color=COLOURS[0], alpha=0.15, linewidth=0)
            axes.plot(recall, curve, color=COLOURS[0], linewidth=1.6)
            axes.tick_params(labelsize="small")
            _unit_square(axes)
        return _svg(figure, "Precision over recall")


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)


def headline_points(names: Sequence[str], values: Sequence[Sequence[float]], metric: str) -> str:
    """A row for each run, with a point for each of its parts and a bar at their mean."""
    with _styled():
        figure = _figure(34 * len(names) + 80)
        axes = figure.add_subplot(xlabel=metric)
        for place, found in enumerate(values):
            axes.plot(found, [-place] * len(found), "o", color=COLOURS[0], alpha=0.55, markersize=7, markeredgewidth=0)
            mean = float(np.mean(found))
            axes.plot([mean, mean], [-place - 0.3, -place + 0.3], color=COLOURS[1], linewidth=2.6)
        axes.set_yticks([-place for place in range(len(names))], [_shortened(name, 40) for name in names])
        axes.set_ylim(-len(names) + 0.4, 0.6)
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, f"{metric} of {len(names)} runs")


def cost_and_quality(names: Sequence[str], macs: Sequence[float], values: Sequence[float], metric: str) -> str:
    """Each run as a point: its metric against the multiply-accumulates of its student."""
    with _styled():
        figure = _figure(380)
        axes = figure.add_subplot(xlabel="multiply-accumulates (millions)", ylabel=metric, xscale="log")
        for colour, name, cost, value in zip(itertools.cycle(COLOURS), names, macs, values, strict=False):
            axes.plot(cost / 1e6, value, "o", color=colour, markersize=9)
            axes.annotate(
                _shortened(name, 40),
                (cost / 1e6, value),
                (0, 9),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
        axes.margins(0.18)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        return _svg(figure, f"{metric} over multiply-accumulates of {len(names)} runs")


# --- SVG ---------------------------------------------------------------------------------------------------------------


def _styled():
    return plain_style(_SETTINGS)


def _figure(height_pixels: float, width_pixels: float = WIDTH_PIXELS) -> Figure:
    return Figure((width_pixels / PIXELS_PER_INCH, height_pixels / PIXELS_PER_INCH), layout="constrained")


def _shortened(name: str, at_most: int = 44) -> str:
    name = " ".join(name.split())
    return name if len(name) <= at_most else name[: at_most - 1].rstrip() + "…"


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element. Its ids are unique, so a page can hold several."""
    buffer = StringIO()
    with warnings.catch_warnings():
        # Matplotlib's font lacks some scripts. It only measures the text; the browser draws it with its own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", _LINK[1:].partition("}")[0])
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    # Ids must be unique within the page, so they start with the digest of the chart.
    own = digest_of(buffer.getvalue())[:8]
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                value = f"{own}-{value}"
            elif name == _LINK:
                value = value.replace("#", f"#{own}-")
            else:
                value = value.replace("url(#", f"url(#{own}-")
                for stand_in, colour in _PAGE_COLOURS.items():
                    value = value.replace(stand_in, colour)
            element.set(name, value)
    width = root.get("viewBox", "").split()[2]
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("style", f"max-width: {width}px")
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")
