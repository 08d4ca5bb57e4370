"""``kd compact-logits``: copies a logit store with only the k largest logits of each clip, and measures the error."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, log_expit

from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.paths.outputs import Output, check_outputs, is_hdf5
from teacher_logits.store import ROWS_PER_BLOCK, LogitStore, write_logit_store


@dataclass(frozen=True)
class CompactConfig:
    """Keep only the largest logits of each clip, and one floor value per class in place of the rest."""

    logits: Path
    """Logit store with all logits."""
    out: Path
    """Logit store to write."""
    keep: int
    """Number of logits to keep for each clip (or for each view of a clip)."""
    replace: bool = False
    """Replace --out if it exists."""


@dataclass(frozen=True)
class StorageError:
    """The error of a compact store relative to the dense one, as means over all clips and classes."""

    probability: float
    """Mean absolute difference of probabilities."""
    cross_entropy: float
    """Excess binary cross entropy, against the teacher's original probabilities, of a student that reproduces the stored ones:
    a Kullback-Leibler divergence, in nats."""
    entropy: float
    """Binary cross entropy of a student that reproduces the original probabilities: the lowest possible value."""


def compact(config: CompactConfig) -> None:
    """Writes the compact store and prints what was saved and what was lost.

    Raises ValueError for a store that is compact already, a number to keep that is no less than the number of classes,
    and an ``out`` that exists, unless it is to be replaced.
    """
    check_outputs(config, [Output(config.out, is_hdf5, "a logit store")], config.replace, "replace it with --replace")
    dense = LogitStore.open(config.logits)
    if dense.keep is not None:
        raise ValueError(
            f"{dense.path} already keeps only {dense.keep} logits of each clip; use the store with all logits"
        )
    if config.out.exists() and not config.replace:
        raise ValueError(f"{config.out} exists; choose another --out, or replace it with --replace")
    write_compact(dense, config.out, config.keep)
    before, after = config.logits.stat().st_size, config.out.stat().st_size
    error = storage_error(dense, LogitStore.open(config.out))
    print(f"{config.out} written: {after / 1e6:,.2f} MB instead of {before / 1e6:,.2f} MB ({before / after:.1f}×)")
    print(
        f"mean error of the stored probabilities: {error.probability:.2e}; cross entropy of a student that reproduces them: "
        f"{error.entropy + error.cross_entropy:.6f} ({error.entropy:.6f} with all logits)"
    )


def write_compact(dense: LogitStore, path: Path, keep: int) -> None:
    """Writes a store with the ``keep`` largest logits of each row of ``dense``; everything else is copied."""
    with progress(total=len(dense), desc="compact", unit="clip") as bar:

        def blocks():
            for rows, logits in dense.blocks():
                yield logits
                bar.update(len(rows) // dense.num_views)

        write_logit_store(
            path,
            clip_ids=dense.encoded_clip_ids,
            audio_digests=dense.audio_digests(np.arange(len(dense))),
            logit_blocks=blocks(),
            class_names=dense.class_names,
            teacher=dense.teacher,
            clip_store_fingerprint=dense.clip_store_fingerprint,
            keep=keep,
        )


def storage_error(dense: LogitStore, stored: LogitStore) -> StorageError:
    """The error of the second store relative to the first; both contain the same clips in the same order."""
    sums = np.zeros(3)
    blocks = zip(dense.blocks(ROWS_PER_BLOCK), stored.blocks(ROWS_PER_BLOCK), strict=True)
    for (_, own), (_, kept) in progress(blocks, desc="compare", unit="block", leave=False):
        own, kept = own.astype(np.float64), kept.astype(np.float64)
        probability = expit(own)
        difference = cross_entropy(kept, probability) - cross_entropy(own, probability)
        sums += abs(probability - expit(kept)).sum(), difference.sum(), cross_entropy(own, probability).sum()
    values = len(dense) * dense.num_views * len(dense.class_names)
    return StorageError(*(sums / values).tolist())


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Binary cross entropy of each element."""
    return -targets * log_expit(logits) - (1 - targets) * log_expit(-logits)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: compact(parse(CompactConfig, arguments, "kd compact-logits")))


if __name__ == "__main__":
    raise SystemExit(main())
