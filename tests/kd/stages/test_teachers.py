"""The teachers of a run: clips without logits, classes and views that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from audio_datasets.tasks.unlabelled import SoundFolder
from kd.data.unlabelled import WithUnlabelled
from kd.stages.stage_config import StageConfig
from kd.stages.teachers import link_for, link_of_space, open_teachers, told_link, training_rows
from teacher_logits.stores.links import TeacherLink


def stage(**settings: Any) -> StageConfig:
    return StageConfig(**{"out": Path("run"), "student": "mn01", "clip_seconds": 0.4, **settings})


def test_clips_without_teachers_are_refused_left_out_or_kept(
    tiny_store: Path, make_tiny_logits: Callable[..., Path]
) -> None:
    logits = make_tiny_logits("part.h5", tiny_store, rows=range(0, 12, 2))
    clips, rows, said = ClipStore.open(tiny_store), np.array([0, 1, 2, 5, 6]), []

    def chosen(missing: str) -> list[int]:
        config = stage(logits=(str(logits),), missing_logits=missing)
        return training_rows(config, open_teachers(config), clips, rows, said.append, "fold 1: ").tolist()

    with pytest.raises(ValueError, match="fold 1: 2 of 5 training clips have no teacher logits .such as 'clip-0001'"):
        chosen("refuse")
    assert said == []
    assert chosen("leave-out") == [0, 2, 6]
    assert "they are left out" in said[0]
    assert chosen("label-only") == rows.tolist()
    assert "trained on their labels only" in said[1]
    assert training_rows(stage(), None, clips, rows, said.append).tolist() == rows.tolist()


def test_teachers_of_other_classes_are_refused(
    tiny_store: Path, make_tiny_store: Callable[..., Path], make_tiny_logits: Callable[..., Path]
) -> None:
    other = make_tiny_store("other.h5", class_names=("hiss", "hum, low", "knock"))
    config = stage(logits=(str(make_tiny_logits("other-logits.h5", other)),))
    with pytest.raises(ValueError, match="'knock'"):
        training_rows(config, open_teachers(config), ClipStore.open(tiny_store), np.arange(4), print)


def test_stored_views_need_teachers_that_heard_views(tiny_logits: Path) -> None:
    with pytest.raises(ValueError, match="not of views; compute some with kd teach --views"):
        open_teachers(stage(logits=(str(tiny_logits),), views="stored"))


def test_a_clip_with_neither_labels_nor_logits_is_left_out_aloud(
    tiny_store: Path, make_tiny_logits: Callable[..., Path], tmp_path: Path
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(more / name, np.zeros(800), 8000)
    labelled = ClipStore.open(tiny_store)
    clips = WithUnlabelled(labelled, [SoundFolder(more, labelled.class_names)])
    logits, rows, said = make_tiny_logits("part.h5", tiny_store, rows=range(6)), np.array([0, 7, 12, 13]), []
    assert training_rows(stage(), None, clips, rows, said.append).tolist() == [0, 7]
    assert said == ["2 of 4 training clips have neither labels nor teacher logits and are left out"]
    config = stage(logits=(str(logits),), missing_logits="label-only")
    assert training_rows(config, open_teachers(config), clips, rows, said.append).tolist() == [0, 7]
    with pytest.raises(ValueError, match="so --unlabelled would not be used; give teacher logits with --logits"):
        training_rows(stage(unlabelled=(more,)), None, clips, rows, said.append)
    with pytest.raises(ValueError, match="no training clip has labels or teacher logits"):
        training_rows(stage(), None, clips, rows[2:], said.append)


# -- Links -------------------------------------------------------------------------------------------------------------

CLASS_NAMES = ("hiss", "hum, low", "click")
SEVERAL, ONE = (LabelSpace.single(CLASS_NAMES, exclusive) for exclusive in (False, True))


@pytest.mark.parametrize("link", ["sigmoid", "softmax", None])
def test_a_link_is_asked_for_where_it_matters(
    link: str | None, tiny_store: Path, make_tiny_logits: Callable[..., Path]
) -> None:
    logits = str(make_tiny_logits("logits.h5", tiny_store, link=link))
    teachers = open_teachers(stage(logits=(logits,)))
    if link is None:
        assert link_for(teachers, ONE) is None
        for config in (stage(logits=(logits,)), stage(logits=(logits, logits), ensemble="probabilities")):
            with pytest.raises(
                ValueError, match=r"logits\.h5' .*not record whether the teacher was trained with a sigmoid"
            ):
                link_for(open_teachers(config), SEVERAL)
        told = open_teachers(stage(logits=(logits,), teacher_link="softmax"))
        assert link_for(told, SEVERAL) == TeacherLink.whole("softmax", 3)
        assert told_link(told) == {"link": "softmax"}
    else:
        assert link_for(teachers, SEVERAL) == link_for(teachers, ONE) == TeacherLink.whole(link, 3)
        assert told_link(teachers) == {}
    assert link_for(None, SEVERAL) is None


def test_logits_of_several_softmaxes_are_not_compared_with_one_another(
    tiny_store: Path, make_tiny_logits: Callable[..., Path]
) -> None:
    pair = TeacherLink.of_runs([("softmax", 2), ("sigmoid", 1)])
    logits = make_tiny_logits("logits.h5", tiny_store, link=pair.to_json())
    teachers = open_teachers(stage(logits=(str(logits),)))
    with pytest.raises(ValueError, match="cannot be compared over all 3 classes of the task.*--loss bce"):
        link_for(teachers, ONE)
    groups = LabelSpace((LabelGroup("a", CLASS_NAMES[:2], True), LabelGroup("b", CLASS_NAMES[2:], False)))
    assert link_for(teachers, groups) == link_for(teachers, SEVERAL) == pair == link_of_space(groups)
