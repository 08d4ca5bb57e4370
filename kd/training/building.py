"""What training runs are built from, whatever they train on: loader, moving average, versions."""

from importlib.metadata import version

from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset

from audio_datasets.system.disk_space import require_space
from audio_datasets.system.stop_signals import outlive_stop_signals
from kd.data.sampling import EpochBatches
from kd.training.checkpoint import checkpoints
from kd.training.loop import LoopConfig, Run, TrainState
from teacher_logits.processes import on_main_process


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


def require_checkpoint_space(accelerator: Accelerator, state: TrainState, run: Run, further_runs: int = 0) -> None:
    """ValueError if there is no room for the checkpoints that a run will keep, and for those of so many runs after it."""
    keep = run.loop.keep_checkpoints
    to_write = max(1, keep + 1 - len(checkpoints(run.checkpoint_folder))) + further_runs * keep
    needed = to_write * checkpoint_bytes(state)
    on_main_process(accelerator, lambda: require_space(run.folder, needed, f"keeping {to_write} more checkpoints"))


def checkpoint_bytes(state: TrainState) -> int:
    """Size of a checkpoint, about: the weights, their average if one is kept, and Adam's two averages of the gradient."""
    copies = 3 + (state.ema is not None)
    return copies * sum(value.numel() * value.element_size() for value in state.student.state_dict().values())


def package_versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {name: version(name) for name in ("audio-kd", "torch", "torchaudio", "timm", "accelerate", "scikit-learn")}
