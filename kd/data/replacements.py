"""Training despite clips that cannot be used, by replacing them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from audio_datasets.audio.bad_clips import BadClipError, ClipList

Example = TypeVar("Example")

MOST_REPLACEMENTS = 100
"""A run stops after this many bad clips in a row, drawn at random: most of its clips must be bad."""


@dataclass(frozen=True)
class Replacements:
    """Replaces each clip that cannot be used by another one.

    The other clip is drawn uniformly, by a generator keyed by the position in the epoch. It depends neither on the number of
    processes or workers nor on where a run was resumed, and batches keep their size. A clip with labels is replaced by one with
    labels, and one without by one without, so batches keep their proportions too.
    """

    rows: np.ndarray
    """int64: the rows to draw from."""
    skipped: ClipList
    """The list of replaced clips. Every worker of every process adds to it."""
    listed: set[int] = field(default_factory=set)
    """Rows of the bad clips that this process has listed."""
    has_labels: np.ndarray | None = None
    """bool, for each of ``rows``: whether the clip has labels; None if all have."""

    def _like(self, row: int) -> np.ndarray:
        """The rows that have labels if the clip at ``row`` has, and otherwise those that have none."""
        if self.has_labels is None:
            return self.rows
        return self.rows[self.has_labels == self.has_labels[self.rows == row].any()]

    def first_usable(
        self, row: int, read: Callable[[int], Example], draws: np.random.Generator, clip_id: Callable[[int], str]
    ) -> Example:
        """``read(row)`` or, if that raises a BadClipError, ``read`` of another row, drawn until one can be used.

        Raises:
            ValueError: too many clips in a row are bad.
        """
        for _ in range(MOST_REPLACEMENTS):
            try:
                return read(row)
            except BadClipError as error:
                if row not in self.listed:
                    self.listed.add(row)
                    self.skipped.add(clip_id(row), error.reason)
                row = int(draws.choice(self._like(row)))
        raise ValueError(
            f"{MOST_REPLACEMENTS} randomly drawn clips in a row cannot be used; repair the bad clips or leave them out"
        )
