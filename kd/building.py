"""What training runs are built from, whatever they train on: loader, moving average, versions."""

from importlib.metadata import version

from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset

from audio_datasets.stop_signals import outlive_stop_signals
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


def package_versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {name: version(name) for name in ("audio-kd", "torch", "torchaudio", "timm", "accelerate", "scikit-learn")}
