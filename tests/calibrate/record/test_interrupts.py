"""Ctrl-C waits where a library cannot take it, and is never lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from calibrate.record.interrupts import held_back


@pytest.fixture(autouse=True)
def python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "not put back"
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_comes_when_the_block_is_over() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held_back():
            press()
            press()
            done.append("block")
        done.append("after")
    assert done == ["block"]


def test_long_work_is_interrupted_at_once_and_what_ends_it_is_not() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_back() as at_once:
        try:
            with at_once():
                press()
                done.append("long work")
        finally:
            press()
            done.append("written down")
    assert done == ["written down"]


def test_what_waits_comes_before_long_work_starts() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_back() as at_once:
        press()
        with at_once():
            done.append("long work")
    assert done == []


def test_blocks_in_blocks() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held_back():
            with held_back():
                press()
            done.append("outer")
        done.append("after")
    assert done == ["outer"]


def test_errors_pass_and_nothing_comes_that_was_not_sent() -> None:
    with pytest.raises(ValueError, match="mine"), held_back() as at_once, at_once():
        raise ValueError("mine")


def test_other_handlers_get_it_too() -> None:
    came = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    with held_back():
        press()
        assert came == []
    assert came == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_are_never_interrupted_and_change_no_handler() -> None:
    seen = []

    def work() -> None:
        with held_back() as at_once, at_once():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
