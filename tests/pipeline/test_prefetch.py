"""Reading ahead: order, bounds, errors, and an end."""

import contextlib
import threading
from collections.abc import Iterable, Iterator

import pytest

from tokenmill.pipeline.prefetch import ReadAhead


def ahead_of(*sources: Iterable[int], size: int = 1, max_bytes: int = 10) -> ReadAhead[int]:
    return ReadAhead(sources, lambda _: size, max_bytes)


def test_items_of_one_source_come_in_order() -> None:
    assert list(ahead_of(range(1000))) == list(range(1000))


def test_items_of_all_sources_come() -> None:
    found = list(ahead_of(range(0, 300), range(300, 600), range(600, 900)))
    assert sorted(found) == list(range(900))
    assert [item for item in found if item < 300] == list(range(300))


def test_no_more_than_the_bound_waits() -> None:
    made = 0

    def items() -> Iterator[int]:
        nonlocal made
        for i in range(100):
            made += 1
            yield i

    seen, waiting = [], []
    ahead = ahead_of(items(), size=4)
    for taken, item in enumerate(ahead, start=1):
        seen.append(made - taken)
        waiting.append(ahead.waiting_bytes)
        assert item == taken - 1
    # Two items of 4 fit in 10; one more may have been made and be waiting for room.
    assert max(seen) <= 3
    assert max(waiting) <= 8


def test_an_item_larger_than_the_bound_is_let_in_alone() -> None:
    assert list(ahead_of([1, 2, 3], size=100)) == [1, 2, 3]


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken source")

    found = iter(ahead_of(items()))
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken source"):
        next(found)


def test_closing_ends_the_threads_and_interrupts_sources_that_wait() -> None:
    before = threading.active_count()
    gate = threading.Event()

    def waits() -> Iterator[int]:
        gate.wait()
        yield -1

    with contextlib.closing(ReadAhead([iter(range(10**9)), waits()], lambda _: 1, 10, gate.set)) as ahead:
        assert next(iter(ahead)) == 0
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_nothing_is_interrupted_after_the_end() -> None:
    interrupted = threading.Event()
    with contextlib.closing(ReadAhead([range(3)], lambda _: 1, 10, interrupted.set)) as ahead:
        assert list(ahead) == [0, 1, 2]
    assert not interrupted.is_set()
