"""What training runs are built from, whatever they train on: accelerator, loader, moving average, run folder."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset

from audio_datasets.files import read_json, write_json
from audio_datasets.stop_signals import outlive_stop_signals
from kd.config import as_json, differences
from kd.loop import LoopConfig
from kd.sampling import EpochBatches


def training_loader(dataset: Dataset, batches: EpochBatches, workers: int, accelerator: Accelerator) -> DataLoader:
    """Loader of whole batches, not yet prepared; its workers live as long as it does."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=outlive_stop_signals,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )


def moving_average(student: nn.Module, loop: LoopConfig, accelerator: Accelerator) -> ModelEmaV3 | None:
    """The moving average of the weights that the configuration asks for, if any."""
    if loop.ema_decay is None:
        return None
    return ModelEmaV3(student, decay=loop.ema_decay, device=accelerator.device)


def check_run_folder(
    out: Path,
    config: Any,
    *,
    resume: bool,
    accelerator: Accelerator,
    changes_nothing: Sequence[str] = (),
) -> None:
    """Writes ``config.json``, or checks that a resumed run has the configuration that it began with.

    ``changes_nothing`` names settings that may differ, since they do not change the result.

    Raises:
        ValueError: a folder with a run in it and no ``--resume``, or a setting that would change the result.
    """
    path = out / "config.json"
    new = as_json(config)
    if path.exists():
        if not resume:
            raise ValueError(f"{out} holds a run already; go on with it by --resume, or choose another --out")
        changed = differences(read_json(path), new, changes_nothing)
        if changed:
            raise ValueError(f"{out} was begun with another configuration:\n  " + "\n  ".join(changed))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(path, new)


def package_versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {name: version(name) for name in ("audio-kd", "torch", "torchaudio", "timm", "accelerate", "scikit-learn")}
