"""A run folder with a tiny student, sounds of several rates, lengths and formats, and a browser for exported pages."""

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio_datasets.tasks.label_space import LabelSpace
from students import create_student
from students.card import save_student
from students.frontend import LogMel, LogMelConfig

NAMES = ("dog", "rain, heavy", "clock")
FRONTEND = LogMelConfig(sample_rate_hz=16000, n_fft=512, window_samples=400, hop_samples=160, n_mels=24, fmax_hz=7000.0)


def write_tiny_run(folder: Path, exclusive: bool = False, short_clips: str = "pad") -> Path:
    """A run folder with a student of three classes and windows of 1 s, which says different things of different sounds."""
    torch.manual_seed(1)
    student = create_student("mn01", len(NAMES), n_mels=FRONTEND.n_mels).eval()
    norms = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # without statistics of its inputs a student says the same of every sound
        norm.train().momentum = None
    time = torch.arange(16000) / 16000
    sweeps = torch.sin(torch.tensor([800.0, 2000.0, 4000.0, 8000.0])[:, None] * time * (1 + time)) * time
    heard = (0.4 * sweeps + 0.1 * torch.randn(4, 16000)) * torch.tensor([[1.0], [0.3], [1.0], [1.0]])
    heard[3, 5000:] = 0
    with torch.no_grad():
        logits = student(LogMel(FRONTEND)(heard)).logits
        student.classifier[-1].weight.div_(8 * logits.std())
    provenance = {
        "clip_seconds": 1.0,
        "label_groups": LabelSpace.single(NAMES, exclusive).to_json(),
        "config": {"short_clips": short_clips},
    }
    save_student(folder, student, NAMES, FRONTEND, provenance)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-label run folder; tests only read it."""
    return write_tiny_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five sounds, one of them in a folder of its own, and a text file."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for name, rate, seconds, channels in (
        ("short.wav", 16000, 0.3, 1),
        ("stereo.wav", 44100, 2.6, 2),
        ("long.ogg", 22050, 4.4, 1),
        ("inside/odd.flac", 11025, 1.01, 1),
        ("speech.mp3", 32000, 3.3, 1),
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        time = np.arange(round(rate * seconds)) / rate
        swept = np.sin(2 * np.pi * (200 + 400 * time) * time) * (time % 1.0)
        wave = 0.4 * swept[:, None] + 0.1 * rng.standard_normal((len(time), channels))
        soundfile.write(path, wave, rate)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def make_tagging_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder of its own for a test: ``make_tagging_run("a", exclusive=True)``."""
    return lambda name, **options: write_tiny_run(tmp_path / name, **options)


@pytest.fixture(scope="session")
def onnxruntime_web() -> Path | None:
    """Where pages get their runtime from: KD_ONNXRUNTIME_WEB, else None for npm. Skipped where there is neither."""
    given = os.environ.get("KD_ONNXRUNTIME_WEB")
    if given is None and shutil.which("npm") is None:
        pytest.skip("no onnxruntime-web: npm is not installed, and KD_ONNXRUNTIME_WEB is not set")
    return None if given is None else Path(given)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser of playwright's. Skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"pages are tested in Chromium, and none is installed ({', '.join(names)})")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def drop_on_page(chromium: Any, tmp_path: Path) -> Iterator[Callable[[Path, Sequence[Path]], tuple[list[dict], str]]]:
    """Opens a page from disk at a phone's width and drops files on it: their scores as the page saves them, and what it says."""
    from playwright.sync_api import expect

    contexts = []

    def drop(page_file: Path, files: Sequence[Path]) -> tuple[list[dict], str]:
        context = chromium.new_context(viewport={"width": 390, "height": 844})
        contexts.append(context)
        page, addresses = context.new_page(), []
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(page_file.resolve().as_uri())
        status = page.locator("#status")
        expect(status).to_have_text(re.compile("Ready|cannot"), timeout=120_000)
        assert status.inner_text() == "Ready."
        contents = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
        page.evaluate(_DROP, contents)
        expect(status).to_have_text(re.compile("Done|cannot"), timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page is wider than a phone"
        assert {address.partition(":")[0] for address in addresses} <= {"file", "blob", "data"}
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "tags.jsonl")
        return list(map(json.loads, (tmp_path / "tags.jsonl").read_text().splitlines())), status.inner_text()

    yield drop
    for context in contexts:
        context.close()


_DROP = """files => {
  const data = new DataTransfer();
  for (const [name, content] of files) {
    data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
  }
  const options = { dataTransfer: data, bubbles: true, cancelable: true };
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
}"""
