"""The teachers of a run: opens their stored logits and checks that they fit the student's training clips."""

from collections.abc import Callable

import numpy as np

from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.sampling import are_labelled
from kd.data.windows import Clips
from kd.objectives.catalog import objective_class
from kd.stages.stage_config import StageConfig
from students.frontend import LogMelConfig
from teacher_logits.stores.ensemble import LogitEnsemble, ask_for_link
from teacher_logits.stores.links import TeacherLink

Say = Callable[[str], None]


def open_teachers(config: StageConfig) -> LogitEnsemble | None:
    """The teachers' stored logits, if the configuration names any. Their views are checked against the configuration."""
    if not config.logits:
        return None
    teachers = LogitEnsemble.open(config.logits, config.ensemble, config.teacher_link)
    check_views(config, teachers)
    return teachers


def link_of_space(label_space: LabelSpace) -> TeacherLink:
    """The link that a student is trained with: a softmax in each group of exclusive classes, otherwise a sigmoid."""
    groups = label_space.groups
    return TeacherLink.of_runs([("softmax" if one.exclusive else "sigmoid", len(one.class_names)) for one in groups])


def link_for(teachers: LogitEnsemble | None, target: LabelSpace) -> TeacherLink | None:
    """What turns the teachers' logits into probabilities, for a student with the label space ``target``; None if it does not matter.

    If a single group of exclusive classes is all there is, a softmax of the logits is right for both links: it is what a softmax
    teacher says, and what a sigmoid teacher says given that exactly one of the classes is there.

    Raises:
        ValueError: a link that is needed and not known, or that does not fit the target's exclusive classes.
    """
    if teachers is None:
        return None
    link = teachers.link
    if link is None:
        single = len(target.groups) == 1 and target.exclusive
        if single and (teachers.mean == "logits" or len(teachers.taking_part) == 1):
            return None
        raise ValueError(ask_for_link(teachers.without_link))
    for group, columns in target.parts():
        if group.exclusive and not is_one_distribution(link, columns):
            raise ValueError(
                f"the teacher's link is {link}, so its logits cannot be compared over all {len(group.class_names)} classes of "
                f"{group.name or 'the task'}, of which a clip has exactly one; use --loss bce"
            )
    return link


def is_one_distribution(link: TeacherLink, columns: slice) -> bool:
    """Whether a softmax over these columns of logits is a distribution: within one softmax of the teacher, or over sigmoids alone."""
    touched = [(kind, run) for kind, run in link.runs() if run.start < columns.stop and columns.start < run.stop]
    return len(touched) == 1 or all(kind == "sigmoid" for kind, _ in touched)


def told_link(teachers: LogitEnsemble) -> dict[str, str]:
    """What the user's word on the link adds to a run's inputs; nothing for a sigmoid, which earlier versions took for granted."""
    return {"link": teachers.told} if teachers.told == "softmax" else {}


def check_views(config: StageConfig, teachers: LogitEnsemble) -> None:
    """Raises ValueError unless the teachers heard what the run will show its student."""
    views = teachers.views
    if config.views == "own":
        if views is not None:
            raise ValueError(
                f"{teachers.taking_part[0].path} has logits of {views.views} views of each clip; train on these views with "
                "--views stored, or run the teacher over the clips without views"
            )
        return
    if views is None:
        raise ValueError(
            f"{teachers.taking_part[0].path} has logits of whole clips, not of views; compute some with kd teach --views"
        )
    if config.clip_seconds != views.view_seconds:
        raise ValueError(
            f"the stored views are {views.view_seconds:g} s long; give --clip-seconds {views.view_seconds:g} "
            f"(found {config.clip_seconds:g})"
        )
    frontends = [
        LogMelConfig.from_dict(store.teacher["frontend"]) for store in teachers.taking_part if views.view_mel_jitter
    ]
    if any(frontend != config.frontend for frontend in frontends):
        raise ValueError(
            "the teachers heard views with jittered mel bands, and their front end has other settings than the student's; "
            "use the same settings, or make views with --no-view-mel-jitter"
        )


def training_rows(
    config: StageConfig, teachers: LogitEnsemble | None, clips: Clips, rows: np.ndarray, say: Say, where: str = ""
) -> np.ndarray:
    """The rows to train on: those that have labels or teacher logits to learn from, as ``missing_logits`` says.

    Raises:
        ValueError: teachers of other classes or other audio; missing logits that are refused; nothing to learn from.
    """
    has_labels = are_labelled(clips, rows)
    missing = np.ones(len(rows), dtype=bool) if teachers is None else teachers.check_against(clips, rows)
    if teachers is not None and missing.any():
        examples = listed([clips.clip_id(int(row)) for row in rows[missing]], limit=3)
        found = f"{where}{int(missing.sum())} of {len(rows)} training clips have no teacher logits (such as {examples})"
        if config.missing_logits == "refuse":
            raise ValueError(
                f"{found}; run the teacher over them, train them on their labels with --missing-logits label-only, or train "
                "without them with --missing-logits leave-out"
            )
        if config.missing_logits == "leave-out":
            say(f"{found}; they are left out")
            has_labels, rows, missing = has_labels[~missing], rows[~missing], missing[~missing]
        elif (missing & has_labels).any():
            say(f"{found}; those with labels are trained on their labels only")
    bare = missing & ~has_labels
    if bare.any() and not objective_class(config.objective).learns_from_bare_audio:
        found = f"{where}{int(bare.sum())} of {len(rows)} training clips have neither labels nor teacher logits"
        if config.unlabelled and teachers is None:
            raise ValueError(f"{found}, so --unlabelled would not be used; give teacher logits with --logits")
        say(f"{found} and are left out")
        rows = rows[~bare]
    if not len(rows):
        raise ValueError(f"{where}no training clip has labels or teacher logits to learn from")
    return rows
