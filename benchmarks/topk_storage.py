"""Size of a logit store against its error, by how many logits of each clip it keeps.

    python benchmarks/topk_storage.py --logits runs/esc10/logits/mn04_as_mAP_432.h5 --clips runs/esc10/esc10.h5

(``benchmarks/distil_esc10.py`` makes these two.) The errors are means over all clips and classes; the last column is
the mAP of the stored logits themselves, over the classes that have labels. One floor for each class, which is what is
stored, is compared with one for each clip and one for all (the mean probability of what is left out in each case).
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import machine
from scipy.special import expit, logit

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.command import parse
from teacher_logits.compact import cross_entropy, storage_error, write_compact
from teacher_logits.store import LogitStore
from teacher_logits.stores.class_precisions import class_precisions
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.stores.rows import largest


@dataclass(frozen=True)
class StorageConfig:
    """Measure what keeping only the largest logits of each clip saves and costs."""

    logits: Path
    """Logit store with all logits."""
    clips: Path
    """Clip store with the same clips, for their labels."""
    keep: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """How many logits to keep of each clip."""


def error_with_floor(logits: np.ndarray, keep: int, axes: tuple[int, ...]) -> tuple[float, float]:
    """Mean errors of probability and cross entropy with one floor over these axes; logits float16 (n, C)."""
    kept = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(kept, largest(logits, keep)["class"].astype(np.intp), True, axis=1)
    values = logits.astype(np.float64)
    probability = expit(values)
    left_out = np.where(kept, 0.0, probability).sum(axis=axes, keepdims=True) / (~kept).sum(axis=axes, keepdims=True)
    floor = logit(left_out).astype(np.float16).astype(np.float64)
    stored = np.where(kept, values, floor)
    difference = cross_entropy(stored, probability) - cross_entropy(values, probability)
    return float(abs(expit(stored) - probability).mean()), float(difference.mean())


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(StorageConfig, arguments, "topk_storage.py")
    dense, clips = LogitStore.open(config.logits), ClipStore.open(config.clips)
    logits = np.concatenate([block for _, block in dense.blocks()])
    entropy = storage_error(dense, dense).entropy
    print(f"{machine()}; {len(dense)} clips × {len(dense.class_names)} classes of {dense.teacher.get('name')!r}")
    print(f"cross entropy against the teacher's own probabilities, of a student that reproduces them: {entropy:.6f}\n")
    print("| kept | bytes a clip | of dense | probabilities off by | cross entropy | by clip | by store | mAP |")
    print("|---|---|---|---|---|---|---|---|")

    def precision(store: LogitStore) -> float:
        return float(np.nanmean(class_precisions(LogitEnsemble((store,), (1.0,)), clips).ensemble))

    dense_bytes = 2 * len(dense.class_names)
    print(f"| all | {dense_bytes} | 1 | 0 | 0 | 0 | 0 | {precision(dense):.4f} |")
    with tempfile.TemporaryDirectory() as folder:
        for keep in config.keep:
            path = Path(folder) / f"{keep}.h5"
            write_compact(dense, path, keep)
            stored = LogitStore.open(path)
            error = storage_error(dense, stored)
            by_clip, by_store = (error_with_floor(logits, keep, axes)[1] for axes in ((1,), (0, 1)))
            print(
                f"| {keep} | {4 * keep} | {4 * keep / dense_bytes:.2f} | {error.probability:.1e} | "
                f"+{error.cross_entropy / entropy:.2%} | +{by_clip / entropy:.2%} | +{by_store / entropy:.2%} | "
                f"{precision(stored):.4f} |"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
