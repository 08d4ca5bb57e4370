"""Creates data loaders. All commands use this, so that their workers share, stop and fail in the same way."""

from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from audio_datasets.system.stop_signals import outlive_stop_signals
from audio_datasets.system.workers.sharing import batches_need_pipes, collate_anywhere, pass_batches


def create_loader(dataset: Dataset, *, workers: int, on_gpu: bool = False, **options: Any) -> DataLoader:
    """A data loader with ``workers`` processes, or with none.

    Args:
        on_gpu: whether the batches go to a GPU; they are then loaded into pinned memory.
        options: further options of ``DataLoader``, such as ``batch_sampler``. With ``batch_size=None`` an item is a batch.

    Raises:
        ValueError: the workers need more open files than this process may have.
    """
    in_batches = options.get("batch_size", 1) is not None
    if workers:
        options["worker_init_fn"] = partial(_begin, through_pipes=batches_need_pipes(workers))
        options["persistent_workers"] = options.get("persistent_workers", False)
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate_anywhere if in_batches else None,
        pin_memory=on_gpu,
        **{name: value for name, value in options.items() if workers or name != "persistent_workers"},
    )


def _begin(worker: int, through_pipes: bool) -> None:
    outlive_stop_signals(worker)
    pass_batches(through_pipes)
