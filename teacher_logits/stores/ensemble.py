"""Ensembles: several logit stores read as one teacher, by taking a weighted mean of their logits.

Shapes: k clips, C classes.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from audio_datasets.audio.views import ViewConfig
from audio_datasets.stores.class_lists import check_same_classes
from audio_datasets.stores.joined import AnyClips
from audio_datasets.system.messages import listed
from teacher_logits.store import ROWS_PER_BLOCK, LogitStore
from teacher_logits.stores.joined import JoinedLogits
from teacher_logits.stores.links import LinkKind, TeacherLink

_log = logging.getLogger(__name__)

MeanOf = Literal["logits", "probabilities"]


@dataclass(frozen=True)
class LogitEnsemble:
    """Several stores read as one teacher: the weighted mean of their logits, or of their probabilities.

    Weights are relative: 2 and 1 mean 2/3 and 1/3. A store with weight 0 is ignored, so it may lack clips. Raises
    ValueError if the class lists differ, a weight is negative, all are 0, or there is no store.
    """

    stores: tuple[LogitStore | JoinedLogits, ...]
    weights: tuple[float, ...]
    mean: MeanOf = "logits"
    """Whether the mean is over logits or probabilities; see ``weighted_mean``."""
    told: LinkKind | None = None
    """The link of teachers whose stores do not record one, as the user says."""

    def __post_init__(self) -> None:
        if not self.stores:
            raise ValueError("an ensemble needs at least one logit store; found none")
        if len(self.stores) != len(self.weights):
            raise ValueError(
                f"one weight per store is needed; found {len(self.stores)} stores and {len(self.weights)} weights"
            )
        if self.mean not in get_args(MeanOf):
            raise ValueError(
                f"the mean of an ensemble must be over one of {list(get_args(MeanOf))}; found {self.mean!r}"
            )
        for store, weight in zip(self.stores, self.weights, strict=True):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"the weight of a logit store must be a positive number, or 0; found {weight} for {store.path}"
                )
        if not any(self.weights):
            raise ValueError("every logit store has weight 0; at least one needs a weight above 0")
        for store in self.stores[1:]:
            check_same_classes(self.stores[0].class_names, store.class_names, str(self.stores[0].path), str(store.path))
        wrong = [store for store in self.stores if self.told and store.link not in (None, self._told_link)]
        if wrong:
            raise ValueError(f"{wrong[0].path} records that its teacher's link is {wrong[0].link}, not {self.told}")

    @classmethod
    def open(
        cls, specs: Sequence[str | Path], mean: MeanOf = "logits", told: LinkKind | None = None
    ) -> "LogitEnsemble":
        """Stores given as ``path`` or ``path:weight``; the weight is 1 if not given.

        ``a.h5+b.h5`` stands for two stores of the same teacher for different clips; they count as one.
        """
        paths, weights = zip(*(parse_weighted_path(str(spec)) for spec in specs), strict=True) if specs else ((), ())
        return cls(tuple(open_logits(path) for path in paths), weights, mean, told)

    @property
    def taking_part(self) -> tuple[LogitStore | JoinedLogits, ...]:
        """The stores whose weight is not 0."""
        return tuple(store for store, weight in zip(self.stores, self.weights, strict=True) if weight)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the C columns mean."""
        return self.stores[0].class_names

    def describe(self) -> list[dict[str, Any]]:
        """For a run's provenance: each store's teacher, weight and fingerprint, and the kind of mean."""
        return [
            {"teacher": store.teacher, "weight": weight, "mean_of": self.mean, "fingerprint": store.fingerprint}
            for store, weight in zip(self.stores, self.weights, strict=True)
        ]

    @property
    def _told_link(self) -> TeacherLink | None:
        return None if self.told is None else TeacherLink.whole(self.told, len(self.class_names))

    @property
    def links(self) -> tuple[TeacherLink | None, ...]:
        """The link of each store that takes part: what it records, or else what the user says; None if neither tells."""
        return tuple(store.link or self._told_link for store in self.taking_part)

    @property
    def link(self) -> TeacherLink | None:
        """What turns the logits that ``read`` gives into probabilities; None if it is not known.

        Teachers with different links have no common logits. The mean of their probabilities is read through a sigmoid.

        Raises ValueError for a mean of logits of different links.
        """
        first, *others = self.links
        if first is None or None in others:
            return None
        if all(link == first for link in others):
            return first
        if self.mean == "logits":
            store, link = next(pair for pair in zip(self.taking_part, self.links, strict=True) if pair[1] != first)
            raise ValueError(
                f"the logits of teachers with different links cannot be averaged: {self.taking_part[0].path} has {first}, "
                f"{store.path} has {link}; average their probabilities with --ensemble probabilities"
            )
        return TeacherLink.whole("sigmoid", len(self.class_names))

    @property
    def without_link(self) -> list[str]:
        """Paths of the stores that take part and whose link is not known."""
        return [str(store.path) for store, link in zip(self.taking_part, self.links, strict=True) if link is None]

    @property
    def views(self) -> ViewConfig | None:
        """Settings of the views that all teachers heard; None if they heard the clips themselves.

        Raises ValueError if they heard different views.
        """
        first, *others = self.taking_part
        for store in others:
            if store.views != first.views:
                raise ValueError(
                    f"teachers heard different views: {first.path} has {first.views or 'none'}, "
                    f"{store.path} has {store.views or 'none'}"
                )
        return first.views

    @property
    def heard_seconds(self) -> float:
        """How much of each clip all teachers heard, from its start; infinite where no store tells."""
        return min(float(store.teacher.get("clip_seconds", math.inf)) for store in self.taking_part)

    def present(self, ids: Sequence[str]) -> np.ndarray:
        """bool (k,): whether every store with a weight above 0 has the clip."""
        return np.logical_and.reduce([store.rows(ids) >= 0 for store in self.taking_part])

    def read(self, ids: Sequence[str], views: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean logits float32 (k, C), and bool (k,): whether every store with a weight above 0 has the clip.

        ``views`` (k,) chooses a view of each clip; without it, logits are the mean over all views in a store. Logits of missing
        clips are zeros, and the caller has to deal with them.
        """
        stores, weights = self.taking_part, [weight for weight in self.weights if weight]
        rows = [store.rows(ids) for store in stores]
        present = np.logical_and.reduce([r >= 0 for r in rows])
        views = None if views is None else np.asarray(views)[present]
        logits = [store.read_rows(found[present], views) for store, found in zip(stores, rows, strict=True)]
        mean = np.zeros((len(ids), len(self.class_names)), dtype=np.float32)
        if self.mean == "probabilities" and len(stores) > 1:
            if self.link is None:
                raise ValueError(ask_for_link(self.without_link))
            mean[present] = weighted_mean(logits, weights, self.mean, self.links, self.link)
        else:
            mean[present] = weighted_mean(logits, weights, "logits")
        return mean, present

    def check_against(self, clip_store: AnyClips, rows: np.ndarray | None = None) -> np.ndarray:
        """Checks that these logits belong to the clips in ``rows`` (default: all) of a clip store.

        Returns bool (k,): True for clips without logits in at least one store with a weight above 0. The caller decides
        whether that is an error. Raises ValueError if the class lists differ, or if a clip's audio is not what the teacher
        heard (according to its digest, if both stores have one); the message names the first such clip.
        """
        check_same_classes(clip_store.class_names, self.class_names, str(clip_store.path), str(self.stores[0].path))
        rows = np.arange(len(clip_store)) if rows is None else np.asarray(rows, dtype=np.int64)
        missing = np.zeros(len(rows), dtype=bool)
        respelled: dict[str, tuple[int, str]] = {}  # by store: how many clips, and one of them
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            part = rows[start : start + ROWS_PER_BLOCK]
            ids = [clip_store.clip_id(int(row)) for row in part]
            heard_now = clip_store.audio_digests(part)
            for store in self.taking_part:
                found = store.rows(ids)
                missing[start : start + len(part)] |= found < 0
                self._count_other_spellings(respelled, store, ids, found)
                heard_then = store.audio_digests(np.maximum(found, 0))
                known = (found >= 0) & heard_now.any(axis=1) & heard_then.any(axis=1)
                other = np.flatnonzero(known & (heard_now != heard_then).any(axis=1))
                if len(other):
                    raise ValueError(
                        f"the audio of clip {ids[other[0]]!r} in {clip_store.path} is not what the teacher heard for "
                        f"{store.path}; run the teacher again over this clip store"
                    )
        for path, (count, example) in respelled.items():
            _log.warning("%s: %d clips are found under another spelling of their id, as %s", path, count, example)
        return missing

    @staticmethod
    def _count_other_spellings(
        respelled: dict[str, tuple[int, str]], store: LogitStore | JoinedLogits, ids: Sequence[str], found: np.ndarray
    ) -> None:
        pairs = [
            (identifier, store.clip_id(row)) for identifier, row in zip(ids, found.tolist(), strict=True) if row >= 0
        ]
        other = [pair for pair in pairs if pair[0] != pair[1]]
        if other:
            count, example = respelled.get(str(store.path), (0, f"{other[0][0]!r} under {other[0][1]!r}"))
            respelled[str(store.path)] = (count + len(other), example)


def ask_for_link(paths: Sequence[str]) -> str:
    """The message about stores that do not record their teacher's link."""
    return (
        f"{listed(paths)} {'does' if len(paths) == 1 else 'do'} not record whether the teacher was trained with a sigmoid (several "
        "labels for a clip, as AudioSet) or with a softmax (one label for each clip). Say so with --teacher-link sigmoid or "
        "--teacher-link softmax"
    )


def open_logits(path: Path) -> LogitStore | JoinedLogits:
    """The store at ``path``. For ``a.h5+b.h5``, unless there is a file with that name, the stores ``a.h5`` and ``b.h5`` as one."""
    parts = str(path).split("+")
    if len(parts) == 1 or path.exists():
        return LogitStore.open(path)
    if not all(parts):
        raise ValueError(f"stores of one teacher are joined as A.h5+B.h5; found {str(path)!r}")
    return JoinedLogits([LogitStore.open(part) for part in parts])


def weighted_mean(
    logits: Sequence[np.ndarray],
    weights: Sequence[float],
    mean: MeanOf,
    links: Sequence[TeacherLink] | None = None,
    link: TeacherLink | None = None,
) -> np.ndarray:
    """The mean of several arrays of logits (k, C), float32.

    The mean of logits is the geometric mean of the odds (of the probabilities, behind a softmax). The mean of probabilities is
    returned as logits, so that the caller can treat both alike. It favours teachers that are sure of a class over teachers that are
    sure of its absence: a probability of 10^-6 lowers the mean hardly more than one of 10^-3. Logits are clipped to ±700 for it,
    which is the range of float64.

    Args:
        links: what turns each array into probabilities, for their mean; a sigmoid if left out.
        link: through which the result is read.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    if mean == "logits" or len(logits) == 1:
        result = np.zeros(logits[0].shape, dtype=np.float32)
        for share, values in zip(shares, logits, strict=True):
            result += np.float32(share) * values
        return result
    sigmoid = TeacherLink.whole("sigmoid", logits[0].shape[1])
    # Average both p and 1 - p: neither mean is lost by rounding, so the logit stays finite and precise.
    yes, no = np.zeros((2, *logits[0].shape))
    for share, values, own in zip(shares, logits, links or [sigmoid] * len(logits), strict=True):
        present, absent = own.odds(values)
        yes += share * present
        no += share * absent
    return (link or sigmoid).logits_of(yes, no)


def parse_weighted_path(spec: str) -> tuple[Path, float]:
    """``"path"`` or ``"path:weight"`` as (path, weight). A path that exists exactly as written has weight 1."""
    head, separator, tail = spec.rpartition(":")
    if not separator or Path(spec).exists():
        return Path(spec), 1.0
    try:
        return Path(head), float(tail)
    except ValueError:
        if Path(head).exists():
            raise ValueError(f"the weight after the colon in {spec!r} must be a number; found {tail!r}") from None
        return Path(spec), 1.0
