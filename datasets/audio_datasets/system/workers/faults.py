"""Faults that are neither the user's mistake nor ours: a worker that was killed, and memory that ran out. As plain messages."""

import errno
import re

SAVED = "What was saved is kept; run the same command again"
LESS = "use fewer --workers or a smaller --batch-size"
CAUSES = {
    "Killed": "the system ends processes so when memory runs out",
    "Bus error": "shared memory or a disk ran out of room, or a file was cut short while it was read",
    "Segmentation fault": "a library crashed, perhaps on a damaged file; --workers 0 shows where",
    "Aborted": "a library gave up, perhaps for lack of memory",
}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "bad_alloc")


def fault_message(error: BaseException) -> str | None:
    """A plain message for an error of a data-loading worker or about memory; None for any other error."""
    texts, kind = [str(error)], type(error)
    while (error := error.__cause__ or error.__context__) is not None:
        texts.append(str(error))
    return worker_message(texts) or memory_message(texts[0], kind)


def worker_message(texts: list[str]) -> str | None:
    """The message for PyTorch's reports of a data-loading worker that has ended; None if there is none among them."""
    if not texts[0].startswith("DataLoader worker (pid"):
        return None
    together = " ".join(texts)
    pid = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", together)
    signal = re.search(r"killed by signal: ([A-Za-z ]+\w)", together)
    code = re.search(r"exit code (\d+)", together)
    if signal:
        cause = CAUSES.get(signal[1])
        how = f"was ended by a signal: {signal[1]}" + (f" ({cause})" if cause else "")
    else:
        how = "ended" + (f" with exit code {code[1]}" if code else "") + " while it was needed"
    return f"data-loading worker (process {pid[1] if pid else '?'}) {how}. {SAVED}; if it happens again, {LESS}"


def memory_message(text: str, kind: type[BaseException]) -> str | None:
    """The message for an error about memory, also one that a worker passes on; None if the error is about something else."""
    said = text.rpartition("\n")[2] if text.startswith("Caught ") else text  # the last line of a worker's traceback
    is_memory = issubclass(kind, MemoryError) or text.startswith("Caught MemoryError ")
    if not is_memory and not any(sign in said for sign in _OUT_OF_MEMORY):
        return None
    worker = re.search(r"in DataLoader worker process (\d+)", text)
    asked = re.search(r"(?:tried to allocate|Unable to allocate) ([\d.]+ ?[A-Za-z]+)", text, re.IGNORECASE)
    where = f" in data-loading worker {worker[1]}" if worker else ""
    where += " on the GPU" if "CUDA" in text else ""
    amount = f" ({asked[1]} were asked for)" if asked else ""
    return f"out of memory{where}{amount}. {SAVED} with less: {LESS}"


def system_hint(number: int | None) -> str:
    """What to do about an OSError with this number; empty if its own message says enough."""
    return {
        errno.ENOSPC: "Finished work is kept; free some space and run again",
        errno.EDQUOT: "Finished work is kept; free some space and run again",
        errno.EMFILE: "Raise the limit on open files (ulimit -n 1024), or use fewer --workers",
        errno.ENFILE: "The system has no open files left for anybody; close other programs",
        errno.ENOMEM: f"{SAVED} with less: {LESS}",
    }.get(number, "")
