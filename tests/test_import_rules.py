"""The house rules that can be read off the code: arrows between packages, circles, sizes of folders, files and functions."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

from kd.cli import COMMANDS

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "kd": ROOT / "kd",
    "teacher_logits": ROOT / "teacher_logits",
    "students": ROOT / "students",
    "audio_datasets": ROOT / "datasets" / "audio_datasets",
}
ALLOWED = {
    "kd": {"kd", "teacher_logits", "students", "audio_datasets"},
    "teacher_logits": {"teacher_logits", "students", "audio_datasets"},
    "students": {"students"},
    "audio_datasets": {"audio_datasets"},
}
LIBRARIES = {
    "kd": {
        *(
            "accelerate",
            "ai_edge_litert",
            "coremltools",
            "jinja2",
            "litert_torch",
            "matplotlib",
            "numpy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "packaging",
            "safetensors",
            "scipy",
            "sklearn",
            "sounddevice",
            "soundfile",
            "timm",
        ),
        *("torch", "transformers", "tyro"),
    },
    "teacher_logits": {
        *("accelerate", "h5py", "numpy", "onnx", "onnxruntime", "scipy", "torch", "torchaudio", "transformers", "tyro"),
    },
    "students": {"numpy", "safetensors", "timm", "torch", "torchaudio"},
    "audio_datasets": {
        "av",
        "docstring_parser",
        "h5py",
        "numpy",
        "pyarrow",
        "soundfile",
        "torch",
        "torchaudio",
        "tqdm",
        "tyro",
    },
}

LARGEST_FOLDER = 12
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
LONGER_FILES = {
    "students/families/dymn.py": "one architecture",
    "datasets/audio_datasets/stores/hdf5_arrays.py": "one subject: arrays in HDF5 files, written, sealed and mapped",
    "kd/doctor.py": "to shrink: checks and measurements of one command",
}
LONGEST_SCRIPT = 150
LONGER_SCRIPTS = {
    *("compare.py", "doctor.py", "evaluate.py", "inspect_student.py", "profile_students.py"),
}
"""Scripts whose logic still has to move into a room."""


@cache
def syntax(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_name(file: Path) -> str:
    base = ROOT / "datasets" if file.is_relative_to(FOLDERS["audio_datasets"]) else ROOT
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Modules that a file imports anywhere; ``from a.b import c`` gives both ``a.b`` and ``a.b.c``."""
    found = set()
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import fails when the file is run as a script"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def python_files() -> list[Path]:
    return [file for folder in FOLDERS.values() for file in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_only_what_the_design_lets_it(package: str) -> None:
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    allowed = ALLOWED[package] | LIBRARIES[package] | set(sys.stdlib_module_names)
    for file in files:
        roots = {name.partition(".")[0] for name in imports(file)}
        assert roots <= allowed, f"{file.relative_to(ROOT)} imports {roots - allowed}"


def in_circles(arrows: dict[str, set[str]]) -> set[str]:
    """The modules that lie on a circle of imports, or on a way from one circle to another."""
    while removable := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets - removable for name, targets in arrows.items() if name not in removable}
    # What is left imports a circle or is in one; those that nothing left imports are not in one.
    while unused := arrows.keys() - {target for targets in arrows.values() for target in targets}:
        arrows = {name: targets for name, targets in arrows.items() if name not in unused}
    return set(arrows)


def test_no_module_is_part_of_an_import_circle() -> None:
    """Imports inside functions and under TYPE_CHECKING count as well."""
    files = {module_name(file): file for file in python_files()}
    arrows = {name: imports(file) & files.keys() - {name} for name, file in files.items()}
    assert any(arrows.values()), "no imports were found"
    assert not in_circles(arrows)


def test_circles_are_found(tmp_path: Path) -> None:
    sources = {
        "a": "import b, e",
        "b": "from c.d import x",
        "c.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import y",
        "e": "import f",
        "f": "",
        "g": "def late():\n    from c import d",
    }
    arrows = {}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
        arrows[name] = imports(tmp_path / f"{name}.py") & sources.keys()
    assert arrows["g"] == {"c.d"}
    assert in_circles(arrows) == {"a", "b", "c.d"}
    assert in_circles(arrows | {"f": {"e"}}) == {"a", "b", "c.d", "e", "f"}
    assert not in_circles(arrows | {"c.d": set()})


def test_folders_files_and_functions_hold_one_subject() -> None:
    too_long = []
    for folder in {file.parent for file in python_files()}:
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        if (
            folder != FOLDERS["kd"] and len(modules) > LARGEST_FOLDER
        ):  # kd/ holds the commands and nothing else, see below
            too_long.append(f"{folder.relative_to(ROOT)}: {len(modules)} modules")
    for file in python_files():
        name = file.relative_to(ROOT).as_posix()
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if (lines > LONGEST_FILE) != (name in LONGER_FILES):
            too_long.append(f"{name}: {lines} lines, {'not ' if name not in LONGER_FILES else ''}in LONGER_FILES")
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    too_long.append(f"{name}:{node.name}: {length} lines")
    assert not too_long, "\n".join(too_long)


def test_kd_holds_one_script_per_command_and_nothing_else() -> None:
    commands = {name.removeprefix("kd.") for name, _ in COMMANDS.values() if name.startswith("kd.")}
    assert {file.stem for file in FOLDERS["kd"].glob("*.py")} == commands | {"__init__", "cli"}


def test_scripts_parse_build_and_call() -> None:
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "kd").glob("*.py")}
    longer = {name: count for name, count in lines.items() if count > LONGEST_SCRIPT}
    assert longer.keys() == LONGER_SCRIPTS, f"longer than {LONGEST_SCRIPT} lines: {longer}"


def test_nothing_at_the_top_level_is_called_datasets() -> None:
    """`datasets` would shadow Hugging Face's package, and a script's folder comes first on the module path."""
    assert not (ROOT / "datasets" / "__init__.py").exists()
    benchmarks = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert not benchmarks & FOLDERS.keys(), "a benchmark would be imported in place of our package"
    for folder in ("kd", "teacher_logits"):
        names = {file.stem for file in FOLDERS[folder].iterdir() if file.suffix == ".py" or file.is_dir()}
        clashes = names & set(sys.stdlib_module_names)
        assert not clashes, f"{folder}/ has files or folders named like standard modules: {clashes}"
