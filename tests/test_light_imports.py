"""Importing our packages needs neither the slow libraries nor those that come with CUDA."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import importlib, pkgutil, sys

class Broken:
    '''What torchaudio and torchvision are beside a CPU-only torch: installed, but built for CUDA's libraries.'''
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchaudio", "torchvision", "timm"):
            raise OSError("libtorch_cuda.so: cannot open shared object file")

sys.meta_path.insert(0, Broken())
import kd.cli, kd.finetune, kd.pretrain, kd.evaluate, teacher_logits.precompute, audio_datasets.pack
slow = {"timm", "sklearn", "torchaudio", "torchvision", "matplotlib", "transformers", "onnxruntime"} & set(sys.modules)
print("slow:", sorted(slow))

names = [
    module.name
    for package in ("audio_datasets", "students", "teacher_logits", "kd")
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
]
failed = []
for name in names:
    try:
        importlib.import_module(name)
    except OSError:
        failed.append(name)
print("need CUDA's libraries:", failed, "of", len(names))

import numpy as np
from audio_datasets.audio.codec import resample
try:
    resample(np.zeros(4410, dtype=np.float32), 44100, 32000)
except ValueError as error:
    print(error)
"""


def test_imports_without_cuda_and_without_slow_libraries(environment: dict[str, str]) -> None:
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'datasets'}"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    slow, imported, message = done.stdout.splitlines()
    assert slow == "slow: []"
    # Only loaded where batch norms are synchronised between processes.
    prefix, _, count = imported.partition(" of ")
    assert prefix == "need CUDA's libraries: ['kd.training.batch_norm.synchronized']"
    assert int(count) > 100
    assert "torchaudio does not fit the installed torch" in message
    assert "install both from the same index" in message
