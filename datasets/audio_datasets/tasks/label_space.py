"""What the classes of a data set mean together: named groups, each of classes that exclude each other or do not.

Logits, targets and class names stay flat; a group is a run of neighbouring columns. One exclusive group is a single-label task
(cross entropy, accuracy); one group that is not is a multi-label task (BCE, mAP); two exclusive groups are, for example, a verb
and a noun.

Shapes: n clips, C classes of all groups together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.messages import brief


@dataclass(frozen=True)
class LabelGroup:
    """Classes that are predicted and judged together."""

    name: str
    """What the group is called in metrics and reports, as "verb"; empty for the only group of a task."""
    class_names: tuple[str, ...]
    exclusive: bool
    """Whether a clip has exactly one of these classes (softmax); else any number of them (sigmoid)."""

    def __post_init__(self) -> None:
        if not self.class_names:
            raise ValueError(f"label group {self.name!r} has no classes")


@dataclass(frozen=True)
class LabelSpace:
    """All groups of a data set, in the order of their columns. Class names are unique over all groups."""

    groups: tuple[LabelGroup, ...]

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names) or (len(names) > 1 and "" in names):
            raise ValueError(f"label groups need names of their own where there are several; found {names}")
        check_class_names(self.class_names)

    @classmethod
    def single(cls, class_names: Iterable[str], exclusive: bool) -> "LabelSpace":
        """One group without a name: an ordinary single-label (``exclusive``) or multi-label task."""
        return cls((LabelGroup("", tuple(class_names), exclusive),))

    @property
    def class_names(self) -> tuple[str, ...]:
        """All classes in the order of the columns, (C,)."""
        return tuple(name for group in self.groups for name in group.class_names)

    @property
    def exclusive(self) -> bool:
        """Whether every group's classes exclude each other."""
        return all(group.exclusive for group in self.groups)

    def columns(self, group: LabelGroup) -> slice:
        """The columns of one of the groups."""
        start = 0
        for other in self.groups:
            if other is group or other == group:
                return slice(start, start + len(group.class_names))
            start += len(other.class_names)
        raise ValueError(f"no such label group: {group.name!r}")

    def parts(self) -> list[tuple[LabelGroup, slice]]:
        """Each group with its columns."""
        return [(group, self.columns(group)) for group in self.groups]

    def check_targets(self, targets: np.ndarray, mask: np.ndarray, clip_ids: Sequence[str], where: object) -> None:
        """ValueError, naming a clip, unless each clip whose labels are known has exactly one class of each exclusive group.

        Args:
            targets: (n, C) bool.
            mask: (n, C) bool, where targets are known.
            where: what the clips are of, for the message.
        """
        for group, columns in self.parts():
            if not group.exclusive:
                continue
            known = mask[:, columns].all(axis=1)
            wrong = np.flatnonzero(known & (targets[:, columns].sum(axis=1) != 1))
            if len(wrong):
                row = int(wrong[0])
                found = [name for name, has in zip(group.class_names, targets[row, columns], strict=True) if has]
                which = f" of {group.name}" if group.name else ""
                raise ValueError(f"{where}: each clip has exactly one label{which}; clip {clip_ids[row]!r} has {found}")

    def to_json(self) -> list[dict[str, Any]]:
        """As JSON: the groups with their classes."""
        return [
            {"name": group.name, "class_names": list(group.class_names), "exclusive": group.exclusive}
            for group in self.groups
        ]

    @classmethod
    def from_json(cls, content: Any) -> "LabelSpace":
        """What ``to_json`` gave; ValueError for anything else."""
        try:
            groups = tuple(
                LabelGroup(str(group["name"]), tuple(map(str, group["class_names"])), group["exclusive"] is True)
                for group in content
            )
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"label groups are objects with name, class_names and exclusive; found {brief(content)}"
            ) from error
        return cls(groups)
