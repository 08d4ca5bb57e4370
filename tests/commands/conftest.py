"""What several tests of commands start from."""

from pathlib import Path

import pytest

from audio_datasets.stores.clip_store import ClipStore
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig


@pytest.fixture(scope="module")
def run_folder(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random mn01 for the classes of the shared clip store. Tests may damage copies of it only."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    names = ClipStore.open(tiny_store).class_names
    save_student(folder, create_student("mn01", 3), names, LogMelConfig(), {"clip_seconds": 0.5})
    return folder
