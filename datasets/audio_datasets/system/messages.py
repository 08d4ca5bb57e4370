"""Small helpers for messages that name what was found."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence


def brief(value: object, limit: int = 60) -> str:
    """A value as code, truncated to ``limit`` characters, because values from damaged files may be long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names in quotes, and the number of further ones."""
    shown = ", ".join(brief(name, 200) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def extension_of(name: str) -> str:
    """The kind of a file by its name: ".m4a"."""
    return os.path.splitext(name)[1].lower() or "without a suffix"


def by_kind(names: Iterable[str], kind_of: Callable[[str], str] = extension_of) -> str:
    """How many names there are of each kind, the most frequent first: "13 .m4a, 1 .txt"."""
    kinds = Counter(map(kind_of, names))
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


class Tally:
    """Counts names and keeps the first ones for a message, so that memory does not grow with their number."""

    def __init__(self, limit: int = 10) -> None:
        self.count = 0
        self._first: list[str] = []
        self._limit = limit

    def add(self, names: Iterable[str]) -> None:
        """Counts more names."""
        for name in names:
            self.count += 1
            if len(self._first) < self._limit:
                self._first.append(name)

    def __len__(self) -> int:
        return self.count

    def __str__(self) -> str:
        """In the same form as ``listed``."""
        more = self.count - len(self._first)
        return listed(self._first, self._limit) + (f" and {more} more" if more else "")
