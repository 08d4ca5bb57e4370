"""A teacher that knows the classes already: which of its classes are ours, and what its stored logits come to on the test clips."""

import csv
import io
import statistics
from collections.abc import Sequence

from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.system.messages import listed
from kd.distilling.arms import Distillation
from kd.distilling.config import DistillConfig
from kd.distilling.teacher_weights import TeacherStart
from kd.evaluation.label_metrics import label_metrics
from kd.run_folder.results import Headline
from students.card import read_card
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.teachers.class_mapping import read_class_map

CLASS_MAP_FILE = "class_map.csv"
"""In the run folder: maps classes of the same name, where the teacher has more of them or another order."""


def check_given_teacher(config: DistillConfig, start: TeacherStart, class_names: Sequence[str]) -> str | None:
    """The class map by name that the teacher needs, as CSV text; None if it needs none or one is given.

    Raises:
        ValueError: ``--class-map`` or ``--teacher-class-names`` cannot be read, or the teacher lacks one of the classes.
    """
    if config.teacher != "given":
        return None
    known = None if config.teacher_class_names is None else read_class_names(config.teacher_class_names)
    if config.class_map is not None:
        read_class_map(config.class_map)
        return None
    if start.run_folder is not None:
        known = read_card(start.run_folder).class_names
    if known is None or tuple(known) == tuple(class_names):
        return None
    missing = [name for name in class_names if name not in set(known)]
    if missing:
        raise ValueError(
            f"--teacher given: {start.teacher} does not know {len(missing)} of {len(class_names)} classes by these names: "
            f"{listed(missing)}; map its {len(known)} classes with --class-map, or leave out --teacher to make a teacher from your labels"
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("teacher_class", "class"), *((name, name) for name in class_names)])
    return text.getvalue()


def tested_teacher(distillations: Sequence[Distillation], metric: str) -> Headline:
    """The metric of the teacher's stored logits on the test clips of each division."""
    values = []
    for one in distillations:
        clips, rows = one.clip_list.clips, one.clip_list.part.test
        logits, _ = LogitEnsemble.open([one.logits]).read([clips.clip_id(int(row)) for row in rows])
        values.append(label_metrics(clips.label_space, clips.targets(rows), clips.mask(rows), logits)[metric])
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Headline(metric, tuple(values), statistics.mean(values), spread, "folds" if len(values) > 1 else None)
