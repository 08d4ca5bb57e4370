"""Students from outside the package, named ``module:Class``, and which of them a saved student may ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from students import create_student, list_students, load_weights
from students.card import load_student, save_student
from students.catalog import default_options, family_of, options_for
from students.frontend import LogMelConfig
from students.outside import ALLOW_VARIABLE
from students.profile import profile_student
from students.weights import weights_fingerprint

MODULE = "students_outside_toy"
TOY = f"{MODULE}:Toy"
ROOT = Path(__file__).parents[2]

SOURCE = """
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from students.interface import Student, StudentOutput

Path("imported").touch()


@dataclass(frozen=True)
class ToyOptions:
    channels: int = 8
    n_mels: int = 128

    def __post_init__(self):
        if self.channels < 1:
            raise ValueError(f"channels must be above 0; found {self.channels}")


class Toy(Student):
    Options = ToyOptions

    def __init__(self, num_classes, options):
        super().__init__(num_classes, options.channels)
        self.features = nn.Sequential(nn.Conv2d(1, options.channels, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(options.channels, num_classes))

    def forward(self, mel):
        x = self.features(mel)
        return StudentOutput(self.classifier(x), x.mean((2, 3)))

    def output_biases(self):
        return self.classifier[-1].bias


class Bare(Toy):
    Options = Student.Options

    def __init__(self, num_classes, options):
        super().__init__(num_classes, ToyOptions())


class Undecided(Toy):
    @dataclass(frozen=True)
    class Options:
        channels: int


class Optionless(Toy):
    Options = dict


def not_a_class(): ...
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The toy student's name; its module lies in the working directory."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return TOY


def python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script in a fresh process, which has imported nothing yet."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "datasets")))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_is_created_with_its_options(toy: str) -> None:
    student = create_student(toy, 3, channels=4)
    assert (student.config.name, student.config.options) == (TOY, {"channels": 4, "n_mels": 128})
    assert default_options(toy) == {"channels": 8, "n_mels": 128}
    assert options_for(toy, {"channels": 4}, LogMelConfig(n_mels=64), epochs=3) == {"channels": 4, "n_mels": 64}
    assert isinstance(student, family_of(toy))
    assert student(torch.randn(2, 1, 128, 20)).logits.shape == (2, 3)
    assert create_student(f"{MODULE}:Bare", 3).config.options == {}
    assert TOY not in list_students()
    with pytest.raises(ValueError, match=f"unknown option 'depth' for {TOY}; choices: channels, n_mels"):
        create_student(toy, 3, depth=2)
    with pytest.raises(ValueError, match="channels must be above 0; found 0"):
        create_student(toy, 3, channels=0)


def test_it_is_saved_loaded_and_profiled(toy: str, tmp_path: Path) -> None:
    student = create_student(toy, 3, channels=4)
    save_student(tmp_path / "run", student, ["a", "b", "c"], LogMelConfig())
    assert json.loads((tmp_path / "run" / "student.json").read_text())["student"]["name"] == TOY
    loaded = load_student(tmp_path / "run")
    card = loaded.card
    assert card.config == student.config
    assert weights_fingerprint(loaded) == weights_fingerprint(student)
    other = create_student(toy, 3, channels=4)
    load_weights(other, tmp_path / "run" / "student.safetensors")
    assert weights_fingerprint(other) == weights_fingerprint(student)
    with pytest.raises(ValueError, match=f"does not contain the weights of {TOY} with the chosen options"):
        load_weights(create_student(toy, 3), tmp_path / "run" / "student.safetensors")
    more = create_student(toy, 5, channels=4)
    load_weights(more, tmp_path / "run" / "student.safetensors", new_classes=True)
    assert torch.equal(more.features[0].weight, student.features[0].weight)
    assert profile_student(student, n_mels=8, frames=20).macs == 4 * 10 * 4 * 9 + 4 * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_anywhere:Toy", "there is no module 'no_such_module_anywhere'"),
        (f"{MODULE}:Nothing", f"{MODULE} has no class 'Nothing'"),
        (f"{MODULE}:ToyOptions", "must be a subclass of students.interface.Student; found the class ToyOptions"),
        (f"{MODULE}:not_a_class", "must be a subclass of students.interface.Student; found <function"),
        (f"{MODULE}:Student", "must be a subclass of students.interface.Student"),
        (f"{MODULE}:Optionless", "its attribute Options must be a dataclass"),
        (f"{MODULE}:Undecided", "every option needs a default"),
        ("mn01:", "unknown student 'mn01:'; choices: mn01, .* or module:Class"),
    ],
)
def test_what_is_no_student_is_refused(toy: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_student(name, 3)


def test_a_strangers_card_imports_nothing_unless_it_is_allowed(toy: str, tmp_path: Path) -> None:
    save_student("run", create_student(toy, 3), ["a", "b", "c"], LogMelConfig())
    load = "from students.card import load_student; print(load_student('run'{}).card.config.name)"

    def imported_by(script: str, **environment: str) -> tuple[bool, subprocess.CompletedProcess]:
        Path("imported").unlink(missing_ok=True)
        result = python(script, tmp_path, **environment)
        return Path("imported").exists(), result

    imported, result = imported_by(load.format(""))
    assert not imported
    assert f"needs the student '{TOY}', and loading it would run the code in '{MODULE}'" in result.stderr
    assert f"set {ALLOW_VARIABLE}={TOY}" in result.stderr
    imported, result = imported_by("from students.card import read_card; read_card('run')")
    assert not imported
    assert result.returncode == 1
    imported, _ = imported_by(load.format(", allow=['other:Toy']"), **{ALLOW_VARIABLE: f"{MODULE}:Bare"})
    assert not imported
    for script, environment in (
        (load.format(f", allow=['{TOY}']"), {}),
        (load.format(""), {ALLOW_VARIABLE: f"other:Toy, {TOY}"}),
        (f"from students import create_student; create_student('{TOY}', 2); {load.format('')}", {}),
    ):
        imported, result = imported_by(script, **environment)
        assert imported
        assert result.stdout.strip() == TOY, result.stderr


def test_reading_an_allowed_card_imports_nothing_yet(toy: str, tmp_path: Path) -> None:
    save_student("run", create_student(toy, 3), ["a", "b", "c"], LogMelConfig())
    Path("imported").unlink(missing_ok=True)
    result = python(f"from students.card import read_card; read_card('run', ['{TOY}'])", tmp_path)
    assert result.returncode == 0, result.stderr
    assert not Path("imported").exists()
