"""Runs an iterator in a thread of its own, a few items ahead of whoever uses them."""

from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")
_END = object()
_CHECK_SECONDS = 0.1


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items in the same order, at most ``depth`` of them waiting. An exception arrives in its place.

    The thread ends when the iterator is exhausted or closed.
    """
    waiting: Queue = Queue(maxsize=depth)
    stop = Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=_CHECK_SECONDS)
                return True
            except Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # raised again where the items are used
            put((_END, error))

    thread = Thread(target=produce, name="decoding ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:  # waiting for ever would also keep signals waiting
                item, error = waiting.get(timeout=_CHECK_SECONDS)
            except Empty:
                continue
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()
