"""Makes the next item of a sequence in a thread while the last one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Nobody wants the item any more that is being made."""


def while_wanted(items: Iterable[T], stop: Event) -> Iterator[T]:
    """Yields items until `stop` is set; then raises Stopped."""
    for item in items:
        if stop.is_set():
            raise Stopped
        yield item


def one_ahead(items: Iterator[T], stop: Event) -> Iterator[T]:
    """Yields items, of which a thread makes the next one meanwhile; an error in it is raised where the item is due.

    The thread ends with this generator, which sets `stop` for what makes the item.
    """
    end = object()
    with ThreadPoolExecutor(1, "rows") as thread:
        try:
            made = thread.submit(next, items, end)
            while (item := made.result()) is not end:
                made = thread.submit(next, items, end)
                yield item
        finally:
            stop.set()
