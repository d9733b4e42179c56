"""Reading ahead: a generator run in a thread of its own, bounded in bytes."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], size_of: Callable[[Item], int], max_bytes: int) -> Iterator[Item]:
    """The items in their order, made ahead in a thread while at most `max_bytes` of them wait.

    One item is always let in, however large. An error of the thread is raised here; closing this generator
    stops the thread.
    """
    ready: deque[tuple[Item, int]] = deque()
    changed = threading.Condition()
    waiting_bytes = 0
    finished = stopped = False
    error: BaseException | None = None

    def has_room(size: int) -> bool:
        return stopped or not ready or waiting_bytes + size <= max_bytes

    def produce() -> None:
        nonlocal waiting_bytes, finished, error
        try:
            for item in items:
                size = size_of(item)
                with changed:
                    changed.wait_for(partial(has_room, size))
                    if stopped:
                        return
                    ready.append((item, size))
                    waiting_bytes += size
                    changed.notify_all()
        except BaseException as caught:
            error = caught
        finally:
            with changed:
                finished = True
                changed.notify_all()

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: ready or finished)
                if not ready:
                    break
                item, size = ready.popleft()
                waiting_bytes -= size
                changed.notify_all()
            yield item
        if error is not None:
            raise error
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join()
