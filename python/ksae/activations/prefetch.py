# SPDX-License-Identifier: Apache-2.0
"""A background thread that stays a few items ahead of an iterator's user."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _Shared(Generic[T]):
    """What both threads see. The worker holds this and not the iterator the user has, so that
    dropping that iterator stops the worker."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.changed = threading.Condition()
        self.items: deque[T] = deque()
        self.error: BaseException | None = None
        self.ended = False  # the worker puts no more items
        self.stopped = False  # the user takes no more items

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.items.clear()
            self.changed.notify_all()


def _work(shared: _Shared[T], items: Iterator[T]) -> None:
    try:
        while True:
            with shared.changed:
                shared.changed.wait_for(lambda: shared.stopped or len(shared.items) < shared.depth)
                if shared.stopped:
                    break
            item = next(items)  # outside the lock: this is the slow part
            with shared.changed:
                if not shared.stopped:
                    shared.items.append(item)
                shared.changed.notify_all()
            del item
    except StopIteration:
        pass
    except BaseException as error:  # raised again in the user's thread
        shared.error = error
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
        with shared.changed:
            shared.ended = True
            shared.changed.notify_all()


class prefetch(Iterator[T]):
    """Iterate over `items` with up to `depth` of them made ahead by a thread.

    An exception of `items` is raised after the items before it. `close()` (or leaving a `with`
    block, or dropping the object) stops the thread after the item it is making; close waits for it.

    >>> with prefetch(iter(range(3))) as ahead:
    ...     list(ahead)
    [0, 1, 2]
    """

    def __init__(self, items: Iterable[T], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"prefetch: depth must be at least 1, got {depth}")
        self._shared: _Shared[T] = _Shared(depth)
        self._thread = threading.Thread(
            target=_work, args=(self._shared, iter(items)), name="ksae-prefetch", daemon=True
        )
        weakref.finalize(self, self._shared.stop)
        self._thread.start()

    def __next__(self) -> T:
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: shared.items or shared.ended or shared.stopped)
            if shared.items:
                item = shared.items.popleft()
                shared.changed.notify_all()
                return item
            if shared.error is not None:
                error, shared.error = shared.error, None
                raise error
            raise StopIteration

    def close(self) -> None:
        self._shared.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> prefetch[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
