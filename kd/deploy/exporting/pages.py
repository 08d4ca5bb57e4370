"""The files of an export folder that people read: README.md, card.md, parity.html, and the script tag.py."""

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from audio_datasets.system.files import write_json, write_text
from kd.deploy.exporting.subject import Subject
from teacher_logits.teachers.export_folder import ExportCard

_TEMPLATES = resources.files("kd.deploy").joinpath("templates")


def write_pages(folder: Path, subject: Subject, card: ExportCard, parity: dict[str, Any]) -> None:
    """Writes all of them, and ``parity.json``, into ``folder``."""
    config = subject.student.config
    values = {
        "name": subject.name,
        "card": card,
        "student": config.name,
        "options": ", ".join(f"{name}={value}" for name, value in config.options.items()),
        "num_classes": len(card.class_names),
        "parameters": sum(parameter.numel() for parameter in subject.student.parameters()),
        "provenance": card.provenance,
        "parity": parity,
        "costs": parity["costs"],
        "megabytes": f"{parity['costs']['bytes'] / 1e6:.2f}",
        "samples": subject.window.samples,
    }
    write_json(folder / "parity.json", parity)
    for name in ("README.md", "card.md", "parity.html"):
        environment = jinja2.Environment(
            autoescape=name.endswith(".html"),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            keep_trailing_newline=True,
        )
        text = environment.from_string(_template(name)).render(values)
        write_text(folder / name, text)
    if card.input == "waveform":
        write_text(folder / "tag.py", _template("tag.py"))


def _template(name: str) -> str:
    return _TEMPLATES.joinpath(name).read_text(encoding="utf-8")
