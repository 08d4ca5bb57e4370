"""Names of clips, classes and files: which are allowed, and which are the same name written in two ways."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

# Control characters, half of a surrogate pair, and what ends a line or a paragraph. Everything else can be shown: no-break and
# ideographic spaces, the joiners of Persian, Indic scripts and emoji, and characters newer than Python's tables.
NOT_ALLOWED = frozenset({"Cc", "Cs", "Zl", "Zp"})


def normal(name: str) -> str:
    """The name in Unicode's normalization form C: "é" as one character, and not as "e" with an accent behind it (form D).

    macOS writes file names in form D, and everyone else in form C. Both look the same, and stand for one name here.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_writable(text: str) -> bool:
    """Whether text can be written as UTF-8; half of a surrogate pair, as of a file name in other bytes, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def problem_of(name: str) -> str | None:
    """Why this cannot be the name of a clip, as words for a message; None if it can."""
    if not name.strip():
        return "the name is empty"
    if name.isprintable():
        return None
    if not is_writable(name):
        odd = next(character for character in name if not is_writable(character))
        byte = f"byte 0x{ord(odd) - 0xDC00:02X}" if "\udc80" <= odd <= "\udcff" else f"U+{ord(odd):04X}"
        return f"the name is not in UTF-8 ({byte})"
    odd = next((character for character in name if unicodedata.category(character) in NOT_ALLOWED), None)
    return None if odd is None else f"the name holds a control character (U+{ord(odd):04X})"


def other_forms(name: str) -> tuple[str, ...]:
    """The name in Unicode's forms C and D, those apart that are the name itself."""
    if name.isascii() or not is_writable(name):
        return ()
    forms = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return tuple(dict.fromkeys(form for form in forms if form != name))


def as_on_disk(folder: Path, name: str) -> Path:
    """The file of this name in ``folder`` in whichever Unicode form the disk has it; as it is written if there is none."""
    path = folder / name
    if name.isascii() or os.path.lexists(path):
        return path
    return next(_in_other_forms(folder, Path(name).parts), path)


def _in_other_forms(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """What there is below ``folder`` under this path, its parts in any form; two folders may differ by their form alone."""
    if not parts:
        yield folder
        return
    for form in (parts[0], *other_forms(parts[0])):
        if os.path.lexists(folder / form):
            yield from _in_other_forms(folder / form, parts[1:])
