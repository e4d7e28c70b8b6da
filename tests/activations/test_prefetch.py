# SPDX-License-Identifier: Apache-2.0
"""The prefetching thread: order, errors and shutdown."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from itertools import count

import pytest

from ksae.activations import prefetch


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ksae-prefetch"]


def test_order_and_end() -> None:
    ahead = prefetch(range(50), depth=3)
    assert list(ahead) == list(range(50))
    assert list(ahead) == []
    ahead.close()
    assert not workers()


def test_it_stays_ahead_but_not_too_far() -> None:
    made = threading.Semaphore(0)
    numbers: list[int] = []

    def items() -> Iterator[int]:
        for i in count():
            numbers.append(i)
            made.release()
            yield i

    with prefetch(items(), depth=2) as ahead:
        for _ in range(2):
            assert made.acquire(timeout=10)  # made with nothing taken
        assert next(ahead) == 0
        assert made.acquire(timeout=10)
        assert not made.acquire(timeout=0.05)
        assert numbers == [0, 1, 2]
    assert not workers()


def test_an_exception_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    with prefetch(items()) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(ValueError, match="broken"):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)
    assert not workers()


def test_close_stops_an_endless_stream_and_closes_it() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from count()
        finally:
            closed.set()

    ahead = prefetch(items())
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert closed.is_set()
    assert not workers()
    with pytest.raises(StopIteration):
        next(ahead)


def test_dropping_it_stops_the_thread() -> None:
    ahead = prefetch(count())
    next(ahead)
    (thread,) = workers()
    del ahead
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_bad_depth() -> None:
    with pytest.raises(ValueError, match="prefetch: depth must be at least 1, got 0"):
        prefetch([], depth=0)
