"""How far an exported model agrees with PyTorch, over clips.

Shapes: B batch, N samples, n clips, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from audio_datasets.audio.bad_clips import BadClipError
from audio_datasets.system.command import progress
from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace
from kd.deploy.exporting.clips import ClipSet
from kd.evaluation.label_metrics import label_metrics
from students.frontend import LogMel, LogMelConfig
from students.interface import Student

Network = Callable[[np.ndarray], np.ndarray]
"""Windows (B, N) -> logits (B, C)."""

FLOAT_TOLERANCE = 1e-4
"""Largest difference of a logit where weights and activations are float32."""
MEL_TOLERANCE = 5e-5
"""Difference between the log-mels of the two front ends, on their usual scale; both round in float32."""
ROUNDING_MARGIN = 4.0
LARGEST_LOGIT = 16.0
"""Beyond logits of this size the tolerance grows with them, as float32's rounding does."""


@dataclass(frozen=True)
class Limits:
    """What a stored form may lose. An export that loses more is refused."""

    score_difference: float
    """Largest mean difference of scores."""
    top1_agreement: float
    """Smallest share of clips with the same first class; where labels are known, accuracy and mAP are judged in its place."""
    metric_drop: float
    """Largest drop of accuracy or mAP."""


LIMITS = {
    ("fp16", "fp32"): Limits(0.002, 0.98, 0.005),
    ("int8", "fp32"): Limits(0.01, 0.9, 0.01),
    ("fp32", "int8"): Limits(0.02, 0.6, 0.02),
    ("fp16", "int8"): Limits(0.02, 0.6, 0.02),
    ("int8", "int8"): Limits(0.02, 0.6, 0.02),
}


@dataclass(frozen=True)
class Parity:
    """Two networks' logits for the same clips."""

    names: tuple[str, ...]
    reference: np.ndarray
    """(n, C) of PyTorch."""
    exported: np.ndarray
    """(n, C)"""
    label_space: LabelSpace
    description: str
    targets: np.ndarray | None = None
    known: np.ndarray | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Clips that could not be decoded, with the reason."""

    @property
    def largest_difference(self) -> float:
        return float(np.abs(self.exported - self.reference).max())

    @property
    def worst_clip(self) -> str:
        return self.names[int(np.abs(self.exported - self.reference).max(1).argmax())]

    @property
    def top1_agreement(self) -> float:
        """Share of clips with the same first class in every group."""
        same = [
            self.exported[:, columns].argmax(1) == self.reference[:, columns].argmax(1)
            for _, columns in self.label_space.parts()
        ]
        return float(np.all(same, axis=0).mean())

    @property
    def score_difference(self) -> float:
        """Mean over clips and classes."""
        return float(np.abs(scores(self.exported, self.label_space) - scores(self.reference, self.label_space)).mean())

    def metrics(self) -> dict[str, dict[str, float]]:
        """Of both networks, and the drop; empty where labels are not known."""
        if self.targets is None or not len(self.targets):
            return {}
        found = {}
        for name, logits in (("pytorch", self.reference), ("exported", self.exported)):
            metrics = label_metrics(self.label_space, self.targets.astype(np.float32), self.known, logits)
            found[name] = {key: value for key, value in metrics.items() if isinstance(value, float)}
        shared = found["pytorch"].keys() & found["exported"].keys()
        found["drop"] = {key: found["pytorch"][key] - found["exported"][key] for key in sorted(shared)}
        return found

    def per_class(self) -> dict[str, dict[str, float]]:
        """For each class the difference of its scores and, with labels, the recall at the first place and its drop."""
        ours, theirs = scores(self.reference, self.label_space), scores(self.exported, self.label_space)
        rows = {}
        for index, name in enumerate(self.label_space.class_names):
            row = {"score_difference": float(np.abs(ours[:, index] - theirs[:, index]).max())}
            if self.targets is not None and (having := self.targets[:, index] & self.known[:, index]).any():
                columns = next(part for _, part in self.label_space.parts() if part.start <= index < part.stop)
                hits = [
                    float((logits[having, columns].argmax(1) + columns.start == index).mean())
                    for logits in (self.reference, self.exported)
                ]
                row |= {"clips": int(having.sum()), "recall": hits[1], "drop": hits[0] - hits[1]}
            rows[name] = row
        return rows

    def to_json(self) -> dict[str, Any]:
        """The comparison as ``parity.json`` has it."""
        return {
            "clips": self.description,
            "num_clips": len(self.names),
            "skipped_clips": dict(self.skipped),
            "largest_logit_difference": self.largest_difference,
            "mean_logit_difference": float(np.abs(self.exported - self.reference).mean()),
            "mean_score_difference": self.score_difference,
            "worst_clip": self.worst_clip,
            "top1_agreement": self.top1_agreement,
            "metrics": self.metrics(),
            "classes": self.per_class(),
        }


def scores(logits: np.ndarray, label_space: LabelSpace) -> np.ndarray:
    """(n, C) logits -> (n, C) scores"""
    tensor = torch.from_numpy(np.asarray(logits, dtype=np.float32))
    parts = [
        tensor[:, columns].softmax(1) if group.exclusive else tensor[:, columns].sigmoid()
        for group, columns in label_space.parts()
    ]
    return torch.cat(parts, dim=1).numpy()


def pytorch_network(student: Student, frontend: LogMelConfig) -> Network:
    """The student as it was trained, with nothing folded."""
    log_mel = LogMel(frontend)

    def network(windows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return student(log_mel(torch.from_numpy(windows))).logits.numpy()

    return network


def compare(reference: Network, exported: Network, clips: ClipSet, label_space: LabelSpace, what: str) -> Parity:
    """Both networks over all clips; logits are averaged over a clip's windows. Clips that cannot be decoded are listed.

    Raises ValueError if none can be decoded, and for an export whose logits are not finite.
    """
    kept, pairs, skipped = [], [], {}
    for number, name in enumerate(progress(clips.names, desc=what, unit="clip", leave=False)):
        try:
            windows = clips.windows(number)
        except BadClipError as error:
            skipped[name] = error.reason
            continue
        pair = np.stack([network(windows).mean(0) for network in (reference, exported)])
        if not np.isfinite(pair).all():
            raise ValueError(
                f"the {'export' if np.isfinite(pair[0]).all() else 'student'} gives logits that are not finite for clip {name!r}"
            )
        kept.append(number)
        pairs.append(pair)
    if not kept:
        raise ValueError(f"none of {clips.description} can be decoded: {listed(list(skipped))}")
    both = np.stack(pairs, axis=1)
    return Parity(
        tuple(clips.names[number] for number in kept),
        both[0],
        both[1],
        label_space,
        clips.description,
        None if clips.targets is None else clips.targets[kept],
        None if clips.known is None else clips.known[kept],
        skipped,
    )


def refuse_float_difference(parity: Parity, what: str, rounding: Callable[[], float]) -> None:
    """Raises ValueError, naming the clip, if a float32 graph differs from PyTorch by more than rounding.

    ``rounding`` gives the change of a logit that rounding in the front end can cause (see ``effect_of_rounding``). A student that
    was hardly trained may enlarge it a hundredfold, and is no worse in the export than in PyTorch.
    """
    allowed = FLOAT_TOLERANCE * max(1.0, float(np.abs(parity.reference).max()) / LARGEST_LOGIT)
    if parity.largest_difference <= allowed:
        return
    allowed = max(allowed, ROUNDING_MARGIN * rounding())
    if parity.largest_difference > allowed:
        raise ValueError(
            f"{what} does not agree with PyTorch: for clip {parity.worst_clip!r} a logit differs by "
            f"{parity.largest_difference:.2g} (allowed: {allowed:.2g}); nothing was written. This is a fault of the export"
        )
    print(
        f"this student magnifies rounding: a logit differs by {parity.largest_difference:.2g} from PyTorch's for clip "
        f"{parity.worst_clip!r}, and a change of its log-mel by {MEL_TOLERANCE:g} has an effect of the same size"
    )


def effect_of_rounding(student: Student, frontend: LogMelConfig, clips: ClipSet) -> float:
    """The largest change of a logit, in PyTorch, if each value of a clip's log-mel changes by up to ``MEL_TOLERANCE``."""
    log_mel, draws, largest = LogMel(frontend), torch.Generator().manual_seed(0), 0.0
    for number in range(len(clips.names)):
        try:
            waveform = torch.from_numpy(clips.windows(number))
        except BadClipError:  # which the comparison has listed
            continue
        with torch.inference_mode():
            mel = log_mel(waveform)
            moved = mel + MEL_TOLERANCE * (2.0 * torch.rand(mel.shape, generator=draws) - 1.0)
            largest = max(largest, float((student(moved).logits - student(mel).logits).abs().max()))
    return largest


def lost_too_much(parity: Parity, weights: str, activations: str) -> str:
    """What a stored form loses beyond its limits, in words; "" if nothing."""
    limits = LIMITS.get((weights, activations))
    if limits is None:
        return ""
    found = []
    if parity.score_difference > limits.score_difference:
        found.append(
            f"scores differ by {parity.score_difference:.4f} on average (allowed: {limits.score_difference:g})"
        )
    if not parity.metrics() and parity.top1_agreement < limits.top1_agreement:
        found.append(
            f"the first class is the same for {parity.top1_agreement:.1%} of the clips (at least {limits.top1_agreement:.0%})"
        )
    for name, drop in parity.metrics().get("drop", {}).items():
        if name in ("accuracy", "mAP") and drop > limits.metric_drop:
            found.append(f"{name} drops by {drop:.4f} (allowed: {limits.metric_drop:g})")
    return "; ".join(found)
