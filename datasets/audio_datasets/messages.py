"""Small helpers for messages that name what was found."""

from collections.abc import Sequence


def brief(value: object, limit: int = 60) -> str:
    """A value as code, cut after so many characters: what a damaged file holds may be long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, quoted, and how many more there are."""
    shown = ", ".join(brief(name, 200) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
