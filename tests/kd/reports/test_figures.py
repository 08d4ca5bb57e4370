"""The figures of reports: the numbers in Matplotlib's artists must be those that the figure was made from."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color, to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kd.reports.figures import (
    COLOURS,
    LARGEST_NUMBERED_MATRIX,
    RIGHT,
    WRONG,
    Lines,
    class_bars,
    confusion_matrix,
    cost_and_quality,
    headline_points,
    learning_curves,
    precision_recall,
)

Drawn = Callable[..., Figure]
RECALL = np.linspace(0.1, 1.0, 10)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Calls a function that draws a figure and returns the Matplotlib figure behind its SVG."""

    def draw(make: Callable[..., str], *arguments: object) -> Figure:
        made: list[Figure] = []
        save = Figure.savefig
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, *a, **k: made.append(figure) or save(figure, *a, **k))
            svg = make(*arguments)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        (figure,) = made
        return figure

    return draw


def lines_of(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """(x, y) of every line that shows something, in the order of drawing."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if len(line.get_xdata())]


def labels_of(texts: list) -> list[str]:
    return [text.get_text() for text in texts]


# --- Learning curves ---------------------------------------------------------------------------------------------------


def test_learning_curves_show_each_part_and_their_mean(drawn: Drawn) -> None:
    first, second = (
        (np.array([1, 2, 3]), np.array([0.9, 0.5, 0.1])),
        (np.array([1, 2, 3, 4]), np.array([0.7, 0.3, 0.3, 8])),
    )
    figure = drawn(learning_curves, [Lines("training loss", {"loss": [first, second]})])
    axes = figure.axes[0]
    assert (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_yscale()) == ("training loss", "epochs", "linear")
    *parts, (epochs, mean) = lines_of(axes)
    assert parts == [([1, 2, 3], [0.9, 0.5, 0.1]), ([1, 2, 3, 4], [0.7, 0.3, 0.3, 8])]
    assert epochs == [1, 2, 3]  # only where all parts have a value
    assert mean == pytest.approx([0.8, 0.4, 0.2])
    thin, _, thick = (line for line in axes.lines if len(line.get_xdata()))
    assert thin.get_linewidth() < thick.get_linewidth()
    assert thin.get_alpha() < 1
    assert axes.get_legend() is None


def test_learning_curves_name_several_quantities_by_colour(drawn: Drawn) -> None:
    steps = np.array([1, 2])
    curves = {"loss": [(steps, np.array([3.0, 2.0]))], "label loss": [(steps, np.array([2.0, 1.5]))]}
    axes = drawn(learning_curves, [Lines("training loss", curves)]).axes[0]
    assert lines_of(axes) == [([1, 2], [3.0, 2.0]), ([1, 2], [2.0, 1.5])]
    legend = axes.get_legend()
    named = dict(zip(labels_of(legend.get_texts()), legend.get_lines(), strict=True))
    shown = {tuple(line.get_ydata()): line.get_color() for line in axes.lines if len(line.get_xdata())}
    assert named["loss"].get_color() == shown[(3.0, 2.0)] == COLOURS[0]
    assert named["label loss"].get_color() == shown[(2.0, 1.5)] == COLOURS[1]


def test_learning_curves_have_a_panel_each_and_hide_the_rest(drawn: Drawn) -> None:
    steps = np.array([1, 2])
    panels = [
        Lines(title, {title: [(steps, np.array([0.1, 10.0**-place]))]}, logarithmic=place == 4)
        for place, title in enumerate("abcde")
    ]
    figure = drawn(learning_curves, panels)
    *shown, hidden = figure.axes
    assert [axes.get_title(loc="left") for axes in shown] == list("abcde")
    assert [lines_of(axes)[0][1][1] for axes in shown] == pytest.approx([10.0**-place for place in range(5)])
    assert [axes.get_yscale() for axes in shown] == ["linear"] * 4 + ["log"]
    assert not hidden.get_visible()


def test_a_single_epoch_is_a_point(drawn: Drawn) -> None:
    axes = drawn(learning_curves, [Lines("loss", {"loss": [(np.array([1]), np.array([0.5]))]})]).axes[0]
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in markers] == [([1], [0.5])]


def test_long_curves_are_thinned_but_keep_their_ends(drawn: Drawn) -> None:
    epochs = np.arange(1, 1001)
    axes = drawn(learning_curves, [Lines("loss", {"loss": [(epochs, epochs**2)]})]).axes[0]
    ((x, y),) = lines_of(axes)
    assert (x[0], x[-1], len(x)) == (1, 1000, 200)
    assert y == [value**2 for value in x]
    assert set(np.diff(x)) <= {5, 6}


# --- Classes -----------------------------------------------------------------------------------------------------------


def bars_of(axes: Axes) -> dict[str, tuple[float, float]]:
    """For each class label, the place and the length of the bar beside it."""
    ticks = dict(zip(axes.get_yticks().tolist(), labels_of(axes.get_yticklabels()), strict=True))
    (bars,) = axes.containers[:1]
    found = {}
    for bar in bars:
        place = bar.get_y() + bar.get_height() / 2
        found[ticks[round(place)]] = (place, bar.get_width())
    return found


def test_class_bars_have_the_length_of_the_value(drawn: Drawn) -> None:
    axes = drawn(class_bars, ["hiss", "hum", "click"], np.array([0.9, 0.25, 0.5]), None, "accuracy", 0.55).axes[0]
    found = bars_of(axes)
    assert {name: width for name, (_, width) in found.items()} == {"hiss": 0.9, "hum": 0.25, "click": 0.5}
    places = [place for place, _ in found.values()]
    assert places == sorted(places, reverse=True)  # the first class is at the top
    assert axes.get_xlabel() == "accuracy"
    assert axes.get_xlim() == (0, 1)
    assert axes.get_ylim() == pytest.approx((-2.7, 0.7))
    (mean,) = axes.lines
    assert list(mean.get_xdata()) == [0.55, 0.55]
    assert [(note.get_text(), note.xy[0]) for note in axes.texts] == [("mean 0.550", 0.55)]


def test_class_bars_show_the_spread_of_those_that_have_one(drawn: Drawn) -> None:
    values, spreads = np.array([0.9, 0.25, 0.5, 1.4]), np.array([0.05, np.nan, 0.0, 0.2])
    axes = drawn(class_bars, ["a", "b", "c", "d"], values, spreads, "AP").axes[0]
    (errors,) = (container for container in axes.containers if isinstance(container, ErrorbarContainer))
    segments = [segment.tolist() for segment in errors[2][0].get_segments()]
    expected = [[[0.85, 0.0], [0.95, 0.0]], [[1.2, -3.0], [1.6, -3.0]]]
    np.testing.assert_allclose(segments, expected)
    assert axes.get_xlim() == (0, 1.4)
    assert not axes.texts  # no mean was given


def test_long_class_names_are_shortened(drawn: Drawn) -> None:
    name = "a class\nwith " + "a very " * 20 + "long name"
    (label,) = labels_of(drawn(class_bars, [name], np.array([0.5]), None, "AP").axes[0].get_yticklabels())
    assert label == "a class with a very a very a very a very a…"


# --- Confusion matrix --------------------------------------------------------------------------------------------------


def cells_of(axes: Axes) -> dict[tuple[int, int], Rectangle]:
    """Each cell by (true class, chosen class), from where it is drawn."""
    return {
        (round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)): patch
        for patch in axes.patches
        if isinstance(patch, Rectangle)
    }


def test_confusion_matrix_puts_true_classes_in_rows(drawn: Drawn) -> None:
    confusion = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 3]])
    axes = drawn(confusion_matrix, confusion, ["hiss", "hum", "click"]).axes[0]
    cells = cells_of(axes)
    assert cells.keys() == {(0, 0), (0, 1), (1, 1), (2, 0), (2, 2)}  # empty cells are blank
    for (true, chosen), cell in cells.items():
        assert (cell.get_width(), cell.get_height()) == (1, 1)
        assert same_color(to_hex(cell.get_facecolor()), RIGHT if true == chosen else WRONG)
    strength = {place: cell.get_alpha() for place, cell in cells.items()}
    assert strength[1, 1] == pytest.approx(0.8)  # all of the class
    assert strength[0, 1] == pytest.approx(0.12 + 0.68 * 0.2)
    assert strength[2, 0] == pytest.approx(0.12 + 0.68 * 0.25)
    written = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "8", (0, 1): "2", (1, 1): "5", (2, 0): "1", (2, 2): "3"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("chosen", "true")
    for ticks, labels in ((axes.get_xticks(), axes.get_xticklabels()), (axes.get_yticks(), axes.get_yticklabels())):
        assert list(ticks) == [0, 1, 2]
        assert labels_of(labels) == ["hiss", "hum", "click"]
    assert axes.get_xlim() == (-0.5, 2.5)
    assert axes.get_ylim() == (2.5, -0.5)  # the first class is at the top


def test_a_large_confusion_matrix_has_no_numbers(drawn: Drawn) -> None:
    classes = LARGEST_NUMBERED_MATRIX + 1
    confusion = 3 * np.eye(classes, dtype=np.int64)
    confusion[0] = 0  # a class without clips
    axes = drawn(confusion_matrix, confusion, [f"class {index}" for index in range(classes)]).axes[0]
    assert not axes.texts
    assert cells_of(axes).keys() == {(index, index) for index in range(1, classes)}


# --- Precision over recall ---------------------------------------------------------------------------------------------


def test_precision_over_recall_of_all_classes_and_of_some(drawn: Drawn) -> None:
    curves = np.array([1 - 0.5 * RECALL, 0.6 - 0.4 * RECALL, 1 - RECALL**2])
    mean = curves.mean(axis=0)
    panels = [(f"class {index}", curves[index % 3]) for index in (2, 0, 1, 5, 4)]  # more than fit in one row
    everything, *single = drawn(precision_recall, RECALL, curves, mean, panels).axes
    assert (everything.get_xlabel(), everything.get_ylabel()) == ("recall", "precision")
    shown = lines_of(everything)
    for (x, y), expected in zip(shown, [*curves, mean], strict=True):
        np.testing.assert_allclose((x, y), (RECALL, expected))
    assert everything.lines[-1].get_linewidth() > everything.lines[0].get_linewidth()
    assert [axes.get_title(loc="left") for axes in single] == [name for name, _ in panels]
    for axes, (_, curve) in zip(single, panels, strict=True):
        ((x, y),) = lines_of(axes)
        np.testing.assert_allclose((x, y), (RECALL, curve))
        (filled,) = axes.collections
        outline = filled.get_paths()[0].vertices
        assert outline[:, 1].min() == 0
        assert outline[:, 1].max() == pytest.approx(curve.max())
    for axes in (everything, *single):
        assert axes.get_xlim() == (0, 1)
        assert axes.get_ylim() == (0, 1.02)


def test_of_many_classes_some_curves_are_drawn_and_the_mean_is_of_all(drawn: Drawn) -> None:
    curves = np.linspace(0, 1, 600)[:, None] * np.ones(len(RECALL))
    everything, _ = drawn(precision_recall, RECALL, curves, curves.mean(axis=0), [("one", curves[0])]).axes
    *some, (_, mean) = lines_of(everything)
    assert len(some) == 200
    assert [y[0] for _, y in some] == pytest.approx(curves[::3, 0].tolist())
    assert mean == pytest.approx([0.5] * len(RECALL))


# --- Several runs ------------------------------------------------------------------------------------------------------


def test_headline_points_show_each_part_and_the_mean(drawn: Drawn) -> None:
    axes = drawn(headline_points, ["first", "second"], [[0.8, 0.9, 0.85], [0.4]], "accuracy").axes[0]
    assert axes.get_xlabel() == "accuracy"
    assert dict(zip(labels_of(axes.get_yticklabels()), axes.get_yticks().tolist(), strict=True)) == {
        "first": 0,
        "second": -1,
    }
    points, mean, other_points, other_mean = lines_of(axes)
    assert points == ([0.8, 0.9, 0.85], [0, 0, 0])
    assert mean == (pytest.approx([0.85, 0.85]), [-0.3, 0.3])
    assert other_points == ([0.4], [-1])
    assert other_mean == (pytest.approx([0.4, 0.4]), pytest.approx([-1.3, -0.7]))
    assert axes.get_ylim() == pytest.approx((-1.6, 0.6))
    low, high = axes.get_xlim()
    assert low < 0.4 < 0.9 < high


def test_cost_and_quality_puts_each_run_at_its_cost(drawn: Drawn) -> None:
    names, macs, values = ["mn04", "mn10"], [110_640_000, 541_100_000], [0.432, 0.471]
    axes = drawn(cost_and_quality, names, macs, values, "mAP").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("multiply-accumulates (millions)", "mAP")
    assert axes.get_xscale() == "log"
    assert lines_of(axes) == [([pytest.approx(110.64)], [0.432]), ([pytest.approx(541.1)], [0.471])]
    assert [line.get_color() for line in axes.lines] == list(COLOURS[:2])
    notes = {note.get_text(): note.xy for note in axes.texts}
    assert notes == {"mn04": (pytest.approx(110.64), 0.432), "mn10": (pytest.approx(541.1), 0.471)}
