"""Exports every student of the catalog with trained batch norms, and compares each with PyTorch from waveform to logits.

    python tests/robustness/export_catalog.py [STUDENT…]

Takes half an hour for all of them on two cores, and goes on after a failure. Exit code 1 if a student cannot be exported, or a logit
differs by more than 1e-4 (beyond logits of 16, in proportion to them), and by more than four times what rounding in the front end
changes in PyTorch: a random network of eighty layers magnifies it.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from audio_datasets.system.text_tables import text_table
from audio_datasets.tasks.label_space import LabelSpace
from kd.deploy.exporting.clips import ClipSet
from kd.deploy.exporting.parity import FLOAT_TOLERANCE, LARGEST_LOGIT, ROUNDING_MARGIN, effect_of_rounding
from kd.deploy.exporting.runtime import ExportedModel
from kd.deploy.graph.network import ExportedNetwork
from kd.deploy.graph.onnx_file import onnx_model
from students import create_student, list_students
from students.frontend import LogMel
from students.interface import Student

CLASSES = 10


def trained(name: str) -> Student:
    """A student whose batch norms know the statistics of ``signals``, and have weights that differ from a fresh one's."""
    torch.manual_seed(0)
    student = create_student(name, CLASSES)
    for module in student.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all batches
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    frontend = type(student).published_frontend()
    student.train()
    with torch.no_grad():
        for batch in range(4):
            student(LogMel(frontend)(signals(6, round((student.clip_seconds or 1.0) * frontend.sample_rate_hz), batch)))
    return student.eval()


def signals(count: int, samples: int, seed: int) -> torch.Tensor:
    """Noises of different levels."""
    draws = torch.Generator().manual_seed(seed)
    levels = 10.0 ** -torch.rand(count, 1, generator=draws)
    return levels * torch.randn(count, samples, generator=draws).clamp(-3, 3) / 3


class Agreement(NamedTuple):
    """How far one student's export agrees with PyTorch, and what it took."""

    difference: float
    """Largest difference of a logit."""
    largest_logit: float
    rounding: float
    """Largest effect on a logit of rounding in the front end, in PyTorch."""
    megabytes: float
    seconds: float

    @property
    def holds(self) -> bool:
        allowed = FLOAT_TOLERANCE * max(1.0, self.largest_logit / LARGEST_LOGIT)
        return self.difference <= max(allowed, ROUNDING_MARGIN * self.rounding)


def check(name: str, one_clip: bool, folder: Path) -> Agreement:
    """Exports a student and compares it with PyTorch, for batches and lengths that it was not traced with."""
    student = trained(name)
    frontend = type(student).published_frontend()
    fixed = student.clip_seconds is not None
    rate = frontend.sample_rate_hz
    network = ExportedNetwork(
        student, frontend, LabelSpace.single([f"class {index}" for index in range(CLASSES)], False), one_clip=one_clip
    )
    started = time.perf_counter()
    example = signals(1 if one_clip else 2, round((student.clip_seconds or 2.0) * rate), 9)
    path = folder / "model.onnx"
    path.write_bytes(onnx_model(network, example, fixed_length=fixed).SerializeToString())
    seconds = time.perf_counter() - started
    model, log_mel = ExportedModel(path, frontend), LogMel(frontend)
    largest, logit, rounding = 0.0, 0.0, 0.0
    for number, length in enumerate((example.shape[1],) if fixed else (1, rate, 3 * rate + 17)):
        waveform = signals(1 if one_clip else 3, length, 20 + number)
        with torch.inference_mode():
            wanted = student(log_mel(waveform)).logits.numpy()
        largest = max(largest, float(np.abs(model(waveform.numpy())[1] - wanted).max()))
        logit = max(logit, float(np.abs(wanted).max()))
        heard = ClipSet("signals", ("all",), lambda _, waveform=waveform: waveform.numpy())
        rounding = max(rounding, effect_of_rounding(student, frontend, heard))
    return Agreement(largest, logit, rounding, path.stat().st_size / 1e6, seconds)


def main() -> int:
    names = sys.argv[1:] or list_students()
    rows, wrong = [("student", "largest difference", "largest logit", "effect of rounding", "MB", "export s")], 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for one_clip in (False, True) if name.startswith("dymn") else (False,):
                label = f"{name}{' (batch 1)' if one_clip else ''}"
                try:
                    found = check(name, one_clip, Path(folder))
                except Exception as error:  # of the exporter or the runtime; the other students are still to be checked
                    rows.append(
                        (label, "failed", type(error).__name__, str(error).strip().partition("\n")[0][:100], "", "")
                    )
                    print(*rows[-1], flush=True)
                    wrong += 1
                    continue
                wrong += not found.holds
                numbers = (f"{found.difference:.1e}", f"{found.largest_logit:.1f}", f"{found.rounding:.1e}")
                rows.append((label, *numbers, f"{found.megabytes:.1f}", f"{found.seconds:.0f}"))
                print(*rows[-1], "" if found.holds else "WRONG", flush=True)
    print(text_table(rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
