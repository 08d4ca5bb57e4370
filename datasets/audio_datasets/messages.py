"""Small helpers for messages that name what was found."""

from collections.abc import Sequence


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, quoted, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
