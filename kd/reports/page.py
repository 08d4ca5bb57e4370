"""A document as a self-contained HTML page: ``templates/page.html`` with its style and script inlined.

The page loads nothing. Its content security policy allows inline styles, data URIs, and one script, identified by its digest.
Jinja escapes all text. Only charts, the style and the script are inserted unescaped, and these come from our own code.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources

import jinja2

from kd.reports.document import Document, columns_of, is_numeric, printable, shows_on_page_only


def to_html(document: Document) -> str:
    """The document as a self-contained HTML page."""
    return printable(_environment().get_template("page.html").render(document=document))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kd.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script = _template_file("sort_tables.js")
    environment.globals |= {
        "style": _template_file("style.css"),
        "script": script,
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    environment.filters |= {
        "kind": lambda part: type(part).__name__,
        "columns": columns_of,
        "is_numeric": is_numeric,
        "is_fixed": shows_on_page_only,
        "sort_key": lambda value: "" if math.isnan(value) else f"{value:.10g}",
        "percent": lambda value: f"{100 * min(max(value, 0.0), 1.0):.1f}%",
        "curve_path": _curve_path,
        "data_uri": lambda mp3: f"data:audio/mpeg;base64,{base64.b64encode(mp3).decode()}",
    }
    return environment


def _template_file(name: str) -> str:
    return resources.files("kd.reports").joinpath("templates", name).read_text(encoding="utf-8")


def _curve_path(values: Sequence[float]) -> str:
    """The SVG path of a curve in a box of 60 × 20. Empty if there are no values or any of them is NaN."""
    if not values or any(map(math.isnan, values)):
        return ""
    step = 60 / max(len(values) - 1, 1)
    return "M" + " ".join(f"{place * step:.0f} {1 + 18 * (1 - value):.0f}" for place, value in enumerate(values))
