"""Average precisions of an ensemble as text and as CSV: how good it is, and which classes a teacher makes worse."""

import csv
from pathlib import Path

import numpy as np

from audio_datasets.system.files import written_aside
from audio_datasets.system.tables import no_formulas
from audio_datasets.system.text_tables import text_table
from teacher_logits.stores.class_precisions import ClassPrecisions
from teacher_logits.stores.ensemble import LogitEnsemble

MOST_HURT = 5  # classes named for each store


def summary(precisions: ClassPrecisions, ensemble: LogitEnsemble) -> str:
    """The mAP of each store, of the ensemble, and of the ensemble without each store, with the classes that a store hurts."""
    lines = [
        f"mAP {np.nanmean(by_class):.4f}  {store.path}"
        for store, by_class in zip(ensemble.stores, precisions.stores, strict=True)
    ]
    if len(ensemble.stores) == 1:
        return lines[0]
    whole = np.nanmean(precisions.ensemble)
    lines.append(f"mAP {whole:.4f}  ensemble: mean of {ensemble.mean}, weights {list(ensemble.weights)}")
    for store, without, harm in zip(ensemble.stores, precisions.without, precisions.harm, strict=True):
        if np.isnan(without).all():
            continue
        hurt = [index for index in np.argsort(-harm, kind="stable") if harm[index] > 0]
        named = [f"{ensemble.class_names[index]} {harm[index]:+.4f}" for index in hurt[:MOST_HURT]]
        if len(hurt) > len(named):
            named.append("…")
        listing = f" ({'; '.join(named)})" if named else ""
        lines.append(
            f"mAP {np.nanmean(without):.4f}  without {store.path} ({np.nanmean(without) - whole:+.4f}); "
            f"classes that it hurts: {len(hurt)}{listing}"
        )
    return "\n".join(lines)


def class_table(precisions: ClassPrecisions, ensemble: LogitEnsemble) -> str:
    """A line for each class that occurs, the ensemble's worst first. ``*`` marks classes for which a store hurts the ensemble."""
    several = len(ensemble.stores) > 1
    letters = [f"[{number}]" for number in range(1, len(ensemble.stores) + 1)]
    heads = [*letters, *(["all", *(f"-{letter}" for letter in letters)] if several else [])]
    order = [index for index in np.argsort(precisions.ensemble, kind="stable") if precisions.positives[index]]
    lines = [f"{letter} {store.path}" for letter, store in zip(letters, ensemble.stores, strict=True)]
    if several:
        lines.append("all: the ensemble; -[1]: the ensemble without [1], with * if that is better")
    rows = [["class", "clips", *heads]]
    for index in order:
        cells = [f"{value:.3f}" for value in precisions.stores[:, index]]
        if several:
            cells.append(f"{precisions.ensemble[index]:.3f}")
            for without, harm in zip(precisions.without[:, index], precisions.harm[:, index], strict=True):
                cells.append("-" if np.isnan(without) else f"{without:.3f}{'*' if harm > 0 else ''}")
        rows.append([ensemble.class_names[index], str(precisions.positives[index]), *cells])
    return "\n".join([*lines, text_table(rows, "<><")])


def write_class_table(path: Path, precisions: ClassPrecisions, ensemble: LogitEnsemble) -> None:
    """The same as CSV, with all classes in their original order and all digits; missing values are empty cells."""
    heads, columns = [str(store.path) for store in ensemble.stores], [*precisions.stores]
    if len(ensemble.stores) > 1:
        heads += ["ensemble", *(f"without {store.path}" for store in ensemble.stores)]
        columns += [precisions.ensemble, *precisions.without]
    with (
        written_aside(path) as aside,
        open(aside, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(no_formulas(["class", "clips", *heads]))
        for index, name in enumerate(ensemble.class_names):
            values = ["" if np.isnan(column[index]) else float(column[index]) for column in columns]
            writer.writerow(no_formulas([name, precisions.positives[index], *values]))
