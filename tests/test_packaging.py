import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_the_four_import_roots_and_nothing_else() -> None:
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    find = settings["packages"]["find"]
    found = [
        package
        for folder in find["where"]
        for package in setuptools.find_packages(str(ROOT / folder), include=find["include"])
    ]
    assert sorted({package.partition(".")[0] for package in found}) == [
        "audio_datasets",
        "kd",
        "students",
        "teacher_logits",
    ]
    for package, patterns in settings["package-data"].items():
        for pattern in patterns:
            assert any(list((ROOT / folder / package).glob(pattern)) for folder in find["where"]), pattern


def test_tested_versions_are_within_the_declared_ranges() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    tested = {name.lower().replace("_", "-"): version for name, version in tested.items()}
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in project["dependencies"] + extras:
        requirement = requirements.Requirement(line)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(tested[requirement.name.lower()]), line


@pytest.mark.parametrize("folder", ["benchmarks", "tests/robustness"])
def test_every_script_finds_what_it_imports(folder: str) -> None:
    """They run for long and seldom, and so do not say at once what a change took away from them."""
    names = sorted(path.stem for path in (ROOT / folder).glob("*.py"))
    command = [sys.executable, "-c", f"import {', '.join(names)}"]
    found = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("index", [None, "http://localhost/cpu"])
def test_make_says_how_much_it_will_download_before_it_does(index: str | None, tmp_path: Path) -> None:
    settings = [f"VENV={tmp_path / 'venv'}", *([f"TORCH_INDEX={index}"] if index else [])]
    done = subprocess.run(
        ["make", "--dry-run", "demo", *settings], cwd=ROOT, capture_output=True, text=True, check=True
    )
    steps = [line for line in done.stdout.splitlines() if "echo 'Inst" in line or "pip install" in line]
    if index is None:
        assert "about 6 GB" in steps[0]
        assert [("--editable" in step, "--index-url" in step) for step in steps[1:]] == [(True, False)]
    else:
        assert "about 2 GB" in steps[0]
        assert [("--editable" in step, "--index-url" in step) for step in steps[1:]] == [(False, True), (True, False)]
        assert f"--index-url {index} torch torchaudio torchvision" in " ".join(done.stdout.replace("\\\n", "").split())
