"""Ctrl-C at moments that can take it.

A KeyboardInterrupt may come between any two bytecodes, also inside a library that is returning a
database connection: SQLAlchemy then logs a traceback, and where it cleans up in a weak reference's
callback, Python swallows the interruption.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

AtOnce = Callable[[], AbstractContextManager[None]]


@contextmanager
def held_back() -> Iterator[AtOnce]:
    """Ctrl-C waits for the end of the block, and does then what it would have done.

    Yields:
        A context manager's factory: inside of it Ctrl-C is taken at once, for work that is long and
        can be stopped anywhere.
    """
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread is interrupted; a handler that is not Python's cannot be put back.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield nullcontext
        return
    waiting = False

    def wait(*_: object) -> None:
        nonlocal waiting
        waiting = True

    def take() -> None:
        nonlocal waiting
        signal.signal(signal.SIGINT, before)
        if waiting:
            waiting = False
            signal.raise_signal(signal.SIGINT)

    @contextmanager
    def at_once() -> Iterator[None]:
        take()
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, wait)

    signal.signal(signal.SIGINT, wait)
    try:
        yield at_once
    finally:
        take()
