"""Reading ahead: generators run in threads of their own, their items bounded in bytes."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """The items of all `sources`, each made ahead in a thread of its own while at most `max_bytes` of them wait.

    The items of one source keep their order. One item is always let in, however large. An error of a thread is
    raised where the items are taken. `interrupt` is called where `close` comes before the end: it should make
    sources that are waiting for something return or raise.
    """

    def __init__(
        self,
        sources: Sequence[Iterable[Item]],
        size_of: Callable[[Item], int],
        max_bytes: int,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._size_of, self._max_bytes, self._interrupt = size_of, max_bytes, interrupt
        self._ready: deque[tuple[Item, int]] = deque()
        self._changed = threading.Condition()
        self._num_running = len(sources)
        self._is_stopped = False
        self._error: BaseException | None = None
        self.waiting_bytes = 0
        self._threads = [threading.Thread(target=self._produce, args=(s,), name="ahead", daemon=True) for s in sources]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or not self._num_running or self._error)
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                item, size = self._ready.popleft()
                self.waiting_bytes -= size
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """Stop all threads and wait for them."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            is_early = bool(self._num_running)
        if is_early:
            self._interrupt()
        for thread in self._threads:
            thread.join()

    def _has_room(self, size: int) -> bool:
        return self._is_stopped or not self._ready or self.waiting_bytes + size <= self._max_bytes

    def _produce(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                size = self._size_of(item)
                with self._changed:
                    self._changed.wait_for(partial(self._has_room, size))
                    if self._is_stopped:
                        return
                    self._ready.append((item, size))
                    self.waiting_bytes += size
                    self._changed.notify_all()
        except BaseException as caught:
            with self._changed:
                if not self._is_stopped:
                    self._error = self._error or caught
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()
