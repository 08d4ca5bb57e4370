"""Training without the clips that cannot be used."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from audio_datasets.audio.bad_clips import BadClipError, ClipList

Example = TypeVar("Example")

MOST_REPLACEMENTS = 100
"""Bad clips in a row, drawn at random, after which a run stops: most of its clips must be bad."""


@dataclass(frozen=True)
class Replacements:
    """Replaces each clip that cannot be used by another one.

    The other clip is drawn uniformly, by a generator keyed by the place in the epoch, so that it depends neither on the
    number of processes or workers nor on where a run was resumed; batches keep their size.
    """

    rows: np.ndarray
    """int64: what is drawn from."""
    skipped: ClipList
    """Where each clip that was replaced is listed, by every worker of every process."""
    listed: set[int] = field(default_factory=set)
    """Rows of the bad clips that this process has listed."""

    def first_usable(
        self, row: int, read: Callable[[int], Example], draws: np.random.Generator, clip_id: Callable[[int], str]
    ) -> Example:
        """What ``read`` gives for ``row`` or, as long as it raises a BadClipError, for another row that is drawn.

        Raises:
            ValueError: one clip after the other is bad.
        """
        for _ in range(MOST_REPLACEMENTS):
            try:
                return read(row)
            except BadClipError as error:
                if row not in self.listed:
                    self.listed.add(row)
                    self.skipped.add(clip_id(row), error.reason)
                row = int(draws.choice(self.rows))
        raise ValueError(
            f"{MOST_REPLACEMENTS} clips drawn at random one after the other cannot be used; repair or leave out the bad ones"
        )
