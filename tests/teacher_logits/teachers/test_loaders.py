"""What a teacher's spec may name, and specs that are refused."""

import pytest
import torch

from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.loaders import load_teacher

CLASSES = ("hiss", "hum, low", "click")


def test_functions_as_teachers(own_teachers):
    teacher = load_teacher(f"{own_teachers}:good")
    assert isinstance(teacher, Teacher)
    assert teacher(torch.rand(2, 4000)).shape == (2, 3)
    assert load_teacher(f"{own_teachers}:Statistics").fingerprint == teacher.fingerprint
    with pytest.raises(ValueError, match="Teacher; found Linear"):
        load_teacher(f"{own_teachers}:no_teacher")
    with pytest.raises(ValueError, match="has no 'nothing'"):
        load_teacher(f"{own_teachers}:nothing")
    with pytest.raises(ValueError, match="no module 'not_there_at_all'"):
        load_teacher("not_there_at_all:teacher")
    with pytest.raises(ValueError, match=f"no module '{own_teachers}.sub'|not a package"):
        load_teacher(f"{own_teachers}.sub:teacher")


def test_an_import_that_fails_inside_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import something_not_installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_not_installed"):
        load_teacher("needs_more:teacher")


@pytest.mark.parametrize("spec", ["mn01", "no/such/run", "clips.h5"])
def test_specs_of_no_known_form_are_refused(spec):
    with pytest.raises(ValueError, match=r"none of: a run folder .* NAME@WEIGHTS .* module:function"):
        load_teacher(spec)


def test_other_wrong_specs(tmp_path, run_folder):
    with pytest.raises(ValueError, match=r"contains no student: there is no student\.json"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match="no such weights file"):
        load_teacher(f"mn01@{tmp_path / 'none.pt'}", class_names=CLASSES)
    with pytest.raises(ValueError, match="unknown student 'mn99'"):
        load_teacher(f"mn99@{tmp_path / 'none.pt'}", class_names=CLASSES)
    with pytest.raises(ValueError, match="clip_seconds must be above 0"):
        load_teacher(run_folder, clip_seconds=0)
