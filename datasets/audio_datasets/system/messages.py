"""Small helpers for messages that name what was found."""

from collections.abc import Iterable, Sequence


def brief(value: object, limit: int = 60) -> str:
    """A value as code, cut after so many characters: what a damaged file holds may be long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, quoted, and how many more there are."""
    shown = ", ".join(brief(name, 200) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


class Tally:
    """Counts names and keeps the first, for a message: its memory does not grow with how many there are."""

    def __init__(self, limit: int = 10) -> None:
        self.count = 0
        self._first: list[str] = []
        self._limit = limit

    def add(self, names: Iterable[str]) -> None:
        """Counts some more."""
        for name in names:
            self.count += 1
            if len(self._first) < self._limit:
                self._first.append(name)

    def __len__(self) -> int:
        return self.count

    def __str__(self) -> str:
        """As ``listed`` shows them."""
        more = self.count - len(self._first)
        return listed(self._first, self._limit) + (f" and {more} more" if more else "")
