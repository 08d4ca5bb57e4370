"""The label space of a data set: named groups of classes, which exclude each other within a group or do not.

Logits, targets and class names stay flat; a group is a range of adjacent columns. One exclusive group is a single-label task
(cross entropy, accuracy). One non-exclusive group is a multi-label task (BCE, mAP). Two exclusive groups are, for example, a
verb and a noun.

Shapes: n clips, C classes in all groups together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.messages import brief


@dataclass(frozen=True)
class LabelGroup:
    """Classes that are predicted and evaluated together."""

    name: str
    """The group's name in metrics and reports, such as "verb"; empty for the only group of a task."""
    class_names: tuple[str, ...]
    exclusive: bool
    """Whether a clip has exactly one of these classes (softmax) or any number of them (sigmoid)."""

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
            raise ValueError(f"several label groups need different names; found {names}")
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
        """Raises ValueError, naming a clip, unless each clip with known labels has exactly one class of each exclusive group.

        Args:
            targets: (n, C) bool.
            mask: (n, C) bool, where targets are known.
            where: the source of the clips, for the message.
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
        """The reverse of ``to_json``. ValueError for other content."""
        try:
            groups = tuple(
                LabelGroup(str(group["name"]), tuple(map(str, group["class_names"])), group["exclusive"] is True)
                for group in content
            )
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"label groups must be objects with name, class_names and exclusive; found {brief(content)}"
            ) from error
        return cls(groups)
