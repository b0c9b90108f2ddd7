"""Progress of running steps, told to whoever listens: the terminal, or Prefect."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one running step is.

    Attributes
    ----------
    label
        The row of the display it belongs to.
    done, total
        In `unit`s.
    unit
        What is counted, such as `samples` or `blocks`.
    """

    label: str
    done: int
    total: int
    unit: str


Listener = Callable[[Progress], None]
_listeners: list[Listener] = []


def tell(progress: Progress) -> None:
    """Pass progress on to every listener."""
    for listener in tuple(_listeners):
        listener(progress)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear all progress of this process for a while."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
