"""Tags as text, for people and for programs, and embeddings as a file.

Shapes: n rows, E embedding size.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from audio_datasets.audio.bad_clips import one_line
from audio_datasets.system.files import written_aside
from audio_datasets.system.tables import no_formulas
from kd.deploy.tagging.tags import Tags, ranked

Form = Literal["table", "json", "csv"]
TOP = 5
WIDEST_NAME = 60


@dataclass(frozen=True)
class TagText:
    """Formats the tags of one file after the other."""

    class_names: tuple[str, ...]
    form: Form
    windows: bool
    """Also each window."""
    top: int | None
    """At most so many classes, the highest scores first."""
    only_present: bool
    """Only classes that reach their thresholds."""

    def heading(self, width: int) -> str | None:
        """What comes before the first file; ``width`` is that of the longest file name."""
        if self.form == "csv":
            return _csv_line(["file", "start_seconds", "end_seconds", *self.class_names])
        return f"{'file':{_column(width)}}  tags (* reaches its threshold)" if self.form == "table" else None

    def of_file(self, name: str, tags: Tags, width: int) -> str:
        """The lines of one file, without the last line break."""
        if self.form == "json":
            return self._json(name, tags)
        spans = [(0.0, tags.duration_seconds, tags.scores)]
        if self.form == "csv":
            if self.windows:
                spans = [(window.start_seconds, window.end_seconds, window.scores) for window in tags.windows]
            rows = [
                [one_line(name), f"{start:.3f}", f"{end:.3f}", *map(_digits, scores)] for start, end, scores in spans
            ]
            return "\n".join(map(_csv_line, rows))
        column = _column(width)
        lines = [f"{one_line(name):{column}}  {self._shown(tags, tags.scores)}".rstrip()]
        if self.windows:
            for window in tags.windows:
                span = f"  {window.start_seconds:8.2f} to {window.end_seconds:8.2f} s"
                lines.append(f"{span:{column}}  {self._shown(tags, window.scores)}".rstrip())
        return "\n".join(lines)

    def _chosen(self, tags: Tags, scores: np.ndarray) -> np.ndarray:
        """Numbers of the classes to show, the highest score first."""
        order = ranked(scores)
        if self.only_present:
            order = order[scores[order] >= tags.thresholds[order]]
        return order[: self.top]

    def _shown(self, tags: Tags, scores: np.ndarray) -> str:
        marks = scores >= tags.thresholds
        chosen = self._chosen(tags, scores)
        shown = [f"{self.class_names[index]} {scores[index]:.3f}{'*' if marks[index] else ' '}" for index in chosen]
        return "  ".join(shown) if shown else "(no class reaches its threshold)"

    def _json(self, name: str, tags: Tags) -> str:
        content = {
            "file": name,
            "duration_seconds": round(tags.duration_seconds, 3),
            "present": tags.present,
            "scores": self._by_class(tags, tags.scores),
        }
        if self.windows:
            content["windows"] = [
                {
                    "start_seconds": round(window.start_seconds, 3),
                    "end_seconds": round(window.end_seconds, 3),
                    "scores": self._by_class(tags, window.scores),
                }
                for window in tags.windows
            ]
        return json.dumps(content)  # in ASCII, which any terminal and any file name survives

    def _by_class(self, tags: Tags, scores: np.ndarray) -> dict[str, float]:
        return {self.class_names[index]: float(_digits(scores[index])) for index in self._chosen(tags, scores)}


@dataclass
class EmbeddingRows:
    """Embeddings of files, or of their windows, until they are written."""

    windows: bool
    _files: list[str] = field(default_factory=list)
    _spans: list[tuple[float, float]] = field(default_factory=list)
    _embeddings: list[np.ndarray] = field(default_factory=list)

    def add(self, name: str, tags: Tags) -> None:
        whole = (0.0, tags.duration_seconds, tags.embedding)
        rows = [(w.start_seconds, w.end_seconds, w.embedding) for w in tags.windows] if self.windows else [whole]
        for start, end, embedding in rows:
            self._files.append(one_line(name))
            self._spans.append((start, end))
            self._embeddings.append(embedding)

    def write(self, path: Path, embedding_dim: int) -> int:
        """Writes ``embeddings`` (n, E) float32, ``files`` (n,), ``start_seconds`` and ``end_seconds`` (n,); returns n."""
        spans = np.array(self._spans, dtype=np.float64).reshape(-1, 2)
        embeddings = np.array(self._embeddings, dtype=np.float32).reshape(-1, embedding_dim)
        with written_aside(path) as aside, open(aside, "wb") as file:
            np.savez(
                file,
                embeddings=embeddings,
                files=np.array(self._files, dtype=np.str_),
                start_seconds=spans[:, 0],
                end_seconds=spans[:, 1],
            )
        return len(embeddings)


def _column(width: int) -> int:
    return min(max(width, 24), WIDEST_NAME)


def _digits(score: float) -> str:
    return f"{score:.6g}"


def _csv_line(row: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(no_formulas(row))
    return line.getvalue()
