"""Writes the page of an export: one HTML file with all in it, or a folder for a static server."""

import base64
import gzip
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from audio_datasets.system.files import write_text
from kd.deploy.streaming.event_stream import STREAM_WINDOW_SECONDS
from kd.deploy.web.onnxruntime_web import OnnxRuntimeWeb
from teacher_logits.teachers.export_folder import MODEL_FILE, ExportCard

PAGE_FILE = "page.html"
WEB_FOLDER = "web"
HOP_SECONDS = 0.5
_SCRIPTS = ("audio.js", "model.js", "timeline.js", "recorder.js", "app.js")
_TEMPLATES = resources.files("kd.deploy").joinpath("templates", "web")


def write_page(folder: Path, card: ExportCard, name: str, runtime: OnnxRuntimeWeb) -> Path:
    """Writes ``page.html``, which opens from disk: the model of ``folder`` and the runtime are inside it."""
    assets = {
        "model.onnx": (folder / MODEL_FILE).read_bytes(),
        "runtime.wasm": runtime.binary,
        "runtime.mjs": runtime.loader.encode(),
    }
    packed = {asset: base64.b64encode(gzip.compress(content, 9, mtime=0)).decode() for asset, content in assets.items()}
    script = re.sub(r"//# sourceMappingURL=.*", "", runtime.script).replace("</script", "<\\/script")
    path = folder / PAGE_FILE
    write_text(path, _page(folder, card, name, runtime, assets=packed, runtime_script=script, own="", connect="'none'"))
    return path


def write_web_folder(folder: Path, card: ExportCard, name: str, runtime: OnnxRuntimeWeb) -> Path:
    """Writes the folder ``web`` for a static server: ``index.html`` and the files that it loads."""
    web = folder / WEB_FOLDER
    web.mkdir()
    (web / "model.onnx").write_bytes((folder / MODEL_FILE).read_bytes())
    (web / "runtime.wasm").write_bytes(runtime.binary)
    write_text(web / "runtime.mjs", runtime.loader)
    write_text(web / "runtime.js", re.sub(r"//# sourceMappingURL=.*", "", runtime.script))
    write_text(
        web / "index.html",
        _page(folder, card, name, runtime, assets={}, runtime_script="", own=" 'self'", connect="'self'"),
    )
    return web


def _page(folder: Path, card: ExportCard, name: str, runtime: OnnxRuntimeWeb, **values: Any) -> str:
    timeline = {"window_seconds": _timeline_window(folder, card), "hop_seconds": HOP_SECONDS}
    timeline["hop_seconds"] = min(HOP_SECONDS, timeline["window_seconds"])
    facts = {
        "class_names": list(card.class_names),
        "label_groups": card.label_space.to_json(),
        "sample_rate_hz": card.sample_rate_hz,
        "window_seconds": card.window_seconds,
        "short_clips": card.short_clips,
        "thresholds": list(card.thresholds),
        "timeline": timeline,
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    safe = jinja2.utils.markupsafe.Markup
    marked = {key: safe(value) for key, value in values.items() if isinstance(value, str)}
    return environment.from_string(_text("page.html")).render(
        {
            **values,
            **marked,
            "assets": {asset: safe(packed) for asset, packed in values["assets"].items()},
            "name": name,
            "student": card.student.get("name", "an audio tagger"),
            "num_classes": len(card.class_names),
            "about": f"Clips are scored in windows of {card.window_seconds:g} s at {card.sample_rate_hz} Hz, as by kd tag.",
            "timeline": timeline,
            "runtime": runtime,
            "licence": _text("onnxruntime_licence.txt"),
            "style": safe(_text("page.css")),
            "card": safe(json.dumps(facts).replace("<", "\\u003c")),  # "</script>" may be part of a class name
            "scripts": [safe(_text(script)) for script in _SCRIPTS],
        }
    )


def _timeline_window(folder: Path, card: ExportCard) -> float:
    """Seconds: short windows, unless the model takes windows of one length only."""
    import onnx

    samples = onnx.load(folder / MODEL_FILE, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[1]
    if samples.dim_value:
        return samples.dim_value / card.sample_rate_hz
    return min(STREAM_WINDOW_SECONDS, card.window_seconds)


def _text(name: str) -> str:
    return _TEMPLATES.joinpath(name).read_text(encoding="utf-8")
