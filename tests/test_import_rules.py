"""The arrows of the design: which package may import which."""

import ast
import sys
from pathlib import Path

import pytest

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


def imported_roots(file: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import fails when the file is run as a script"
            roots.add(node.module.partition(".")[0])
    return roots


@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_only_what_the_design_lets_it(package: str) -> None:
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    for file in files:
        ours = imported_roots(file) & FOLDERS.keys()
        assert ours <= ALLOWED[package], f"{file.relative_to(ROOT)} imports {ours - ALLOWED[package]}"


def test_students_need_no_data_and_no_training_libraries() -> None:
    allowed = {"torch", "torchaudio", "timm", "numpy", "safetensors", "students", *sys.stdlib_module_names}
    for file in FOLDERS["students"].rglob("*.py"):
        assert imported_roots(file) <= allowed, file


def test_nothing_at_the_top_level_is_called_datasets() -> None:
    """`datasets` would shadow Hugging Face's package, and a script's folder comes first on the module path."""
    assert not (ROOT / "datasets" / "__init__.py").exists()
    benchmarks = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert not benchmarks & FOLDERS.keys(), "a benchmark would be imported in place of our package"
    for folder in ("kd", "teacher_logits"):
        clashes = {file.stem for file in FOLDERS[folder].glob("*.py")} & set(sys.stdlib_module_names)
        assert not clashes, f"{folder}/ has files named like standard modules: {clashes}"
