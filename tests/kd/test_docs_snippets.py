"""Every Python snippet of README and docs runs as it stands, page by page, in a folder with the files that it names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
import torch
from onnx import TensorProto, helper

from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_store import ClipStore
from students import create_student, save_student
from students.frontend import LogMelConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOOKS_LIKE_PYTHON = re.compile(r"^    +(from \S+ import |import \w+$|class \w+.*:$|def \w+\(.*:$|@\w+)", re.MULTILINE)

Make = Any
"""A function that makes something, from a fixture; pytest's monkeypatch is passed along with them."""


def snippets(page: Path) -> list[str]:
    return SNIPPET.findall(page.read_text(encoding="utf-8"))


PAGES_WITH_SNIPPETS = [page.relative_to(ROOT).as_posix() for page in PAGES if snippets(page)]


# -- What a page takes for granted: names, and files in the current folder ---------------------------------------------


def for_students(**make: Make) -> dict[str, Any]:
    torch.save(create_student("mn04", num_classes=527).state_dict(), "mn04_as_mAP_432.pt")
    save_student("runs/mine", create_student("mn01", 2), ("fan", "pump"), LogMelConfig())
    return {"waveform": 0.1 * torch.randn(1, 32000)}


def for_clip_stores(**make: Make) -> dict[str, Any]:
    make["store"]("clips.h5", clips=4, seconds=4.0)
    return {}


def for_logit_stores(**make: Make) -> dict[str, Any]:
    store = make["store"]("clips.h5")
    Path("logits").mkdir()
    for name in "ab":
        make["logits"](f"logits/{name}.h5", store)
    clips = ClipStore.open(store)
    return {"class_names": ["a", "b"], "clips": clips, "ids": clips.clip_ids[:3], "rows": np.arange(3)}


def for_results(**make: Make) -> dict[str, Any]:
    Path("runs/esc10/logits").mkdir(parents=True)
    make["logits"]("runs/esc10/logits/mn04_as_mAP_432.h5", make["store"]("runs/esc10/esc10.h5"))
    return {}


def for_inspect(**make: Make) -> dict[str, Any]:
    student = create_student("dymn04", 3, width=0.1).eval()
    return {"student": student, "mel": torch.randn(4, 1, 128, 60), "batch_index": 0}


def for_reports(**make: Make) -> dict[str, Any]:
    run = make["run"]("runs/mine")
    Path("sounds").mkdir()
    for path in run.rglob("predictions.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            for clip_id in arrays["clip_ids"]:
                soundfile.write(Path("sounds", f"{clip_id}.wav"), np.zeros(800), 8000)
    return {}


def for_tagging(**make: Make) -> dict[str, Any]:
    save_student("runs/mine", create_student("mn01", 2), ("fan", "pump"), LogMelConfig(), {"clip_seconds": 1.0})
    waveform = 0.1 * np.random.default_rng(0).standard_normal(44100)
    soundfile.write("street.wav", waveform, 44100)
    return {"waveform": waveform, "audio": 0.1 * torch.randn(2, 32000)}


def for_teachers(**make: Make) -> dict[str, Any]:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), "big.onnx")
    # Drawing 86 million weights that nothing looks at would take longer than all else here.
    make["monkeypatch"].setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    public = create_student("passt_s", 3, stride=16, time_positions=62)
    torch.save(public.state_dict(), "passt-s-p16-s16.pt")
    return {"names": ["a", "b"], "class_names": list("abcdefghij"), "mel": torch.randn(1, 1, 128, 100)}


GIVEN: dict[str, Callable[..., dict[str, Any]]] = {
    "docs/students.md": for_students,
    "docs/clip_store.md": for_clip_stores,
    "docs/logit_store.md": for_logit_stores,
    "docs/results.md": for_results,
    "docs/inspect.md": for_inspect,
    "docs/reports.md": for_reports,
    "docs/tag.md": for_tagging,
    "docs/teachers.md": for_teachers,
}
"""Pages that are not here take nothing for granted."""


@pytest.mark.parametrize("page", PAGES_WITH_SNIPPETS)
def test_snippets_of_a_page_run_in_their_order(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_tiny_store: Make,
    make_tiny_logits: Make,
    make_run: Make,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    make = {"store": make_tiny_store, "logits": make_tiny_logits, "run": make_run, "monkeypatch": monkeypatch}
    names = {"__name__": "snippet", **GIVEN.get(page, lambda **_: {})(**make)}
    for number, code in enumerate(snippets(ROOT / page), start=1):
        exec(compile(code, f"{page}, snippet {number}", "exec"), names)


def test_python_in_a_page_is_marked_as_such() -> None:
    """An indented block would be shown, and never run."""
    unmarked = {
        page.name: found.group().strip()
        for page in PAGES
        if (found := LOOKS_LIKE_PYTHON.search(SNIPPET.sub("", page.read_text(encoding="utf-8"))))
    }
    assert not unmarked


def test_the_first_snippet_hears_a_dog_bark(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the public weights and a real recording, as a user would try it."""
    monkeypatch.chdir(tmp_path)
    Path("mn04_as_mAP_432.pt").symlink_to(reference_dir / "data" / "checkpoints" / "mn04_as_mAP_432.pt")
    reference = np.load(reference_dir / "reference" / "mn04_as_esc10_clips.npz")
    assert reference["clip"][0] == "1-100032-A-0.ogg"  # a dog
    names = {"waveform": torch.from_numpy(reference["waveform_int16_32k"][:1] / np.float32(32768))}
    exec(snippets(ROOT / "docs" / "students.md")[0], names)
    logits = names["logits"].detach().numpy()[0]
    np.testing.assert_allclose(logits, reference["logits"][0], atol=0.05)
    classes = read_class_names(reference_dir / "data" / "labels" / "audioset_class_labels_indices.csv")
    best = [classes[index] for index in np.argsort(-logits)[:5]]
    assert "Bark" in best
    assert "Speech" not in best
