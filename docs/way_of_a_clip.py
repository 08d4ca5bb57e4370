"""Draws docs/way_of_a_clip.png: from a clip's bytes to the loss, and from a teacher's logit to the target."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

ROOMS = {
    "audio_datasets": "#dbe9f6",
    "teacher_logits": "#fde5cf",
    "students": "#dff0d8",
    "kd": "#ece2f3",
}
# name: (x, y, room, first line, second line)
STOPS = {
    "corpus": (0, 2, "audio_datasets", "Corpus", "corpora/*.py → Listing"),
    "store": (1, 2, "audio_datasets", "Clip store", "pack.py, stores/"),
    "sampler": (2, 3, "kd", "Sampler", "data/sampling.py"),
    "example": (2, 2, "kd", "Training example", "data/examples.py"),
    "inputs": (3, 2, "kd", "Log-mel, mixup", "objectives/base.py"),
    "student": (4, 3, "students", "Student", "families/*.py → logits"),
    "loss": (4, 2, "kd", "Losses", "objectives/"),
    "step": (5, 2, "kd", "Step", "training/loop.py"),
    "teacher": (1, 1, "teacher_logits", "Teacher", "precompute.py, teachers/"),
    "logits": (1, 0, "teacher_logits", "Logit store", "store.py"),
    "ensemble": (2, 0, "teacher_logits", "Ensemble", "stores/ensemble.py"),
    "targets": (4, 1, "kd", "Teacher's targets", "σ(z / T) or softmax"),
    "windows": (2, 4, "kd", "Windows", "data/windows.py"),
    "metrics": (5, 4, "kd", "Metrics, report", "evaluation/, reports/"),
}
ARROWS = [
    ("corpus", "store"),
    ("store", "example"),
    ("sampler", "example"),
    ("example", "inputs"),
    ("inputs", "student"),
    ("student", "loss"),
    ("inputs", "loss"),
    ("loss", "step"),
    ("store", "teacher"),
    ("teacher", "logits"),
    ("logits", "ensemble"),
    ("ensemble", "example"),
    ("example", "targets"),
    ("targets", "loss"),
    ("store", "windows"),
    ("windows", "student"),
    ("student", "metrics"),
]
WIDTH, HEIGHT = 0.82, 0.52


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(15.5, 6.4))
    for first, second in ARROWS:
        (x0, y0), (x1, y1) = STOPS[first][:2], STOPS[second][:2]
        if x0 == x1:
            start, end = (x0, y0 + HEIGHT / 2 * (1 if y1 > y0 else -1)), (x1, y1 - HEIGHT / 2 * (1 if y1 > y0 else -1))
        else:
            start, end = (x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1)
        axes.annotate(
            "", end, start, arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 1.3, "shrinkA": 1, "shrinkB": 1}
        )
    for x, y, room, name, place in STOPS.values():
        box = (x - WIDTH / 2, y - HEIGHT / 2)
        axes.add_patch(FancyBboxPatch(box, WIDTH, HEIGHT, boxstyle="round,pad=0.02", fc=ROOMS[room], ec="#777777"))
        axes.text(x, y + 0.09, name, ha="center", va="center", fontsize=10, weight="bold")
        axes.text(x, y - 0.12, place, ha="center", va="center", fontsize=7.6, family="monospace")
    handles = [FancyBboxPatch((0, 0), 1, 1, fc=color, ec="#777777") for color in ROOMS.values()]
    axes.legend(handles, list(ROOMS), loc="upper left", frameon=False, fontsize=9, title="folder", title_fontsize=9)
    axes.set_xlim(-0.6, 5.6)
    axes.set_ylim(-0.5, 4.5)
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
