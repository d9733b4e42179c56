"""Reading ahead: order, bounds, errors, and an end."""

import threading
from collections.abc import Iterator

import pytest

from tokenmill.pipeline.prefetch import prefetch


def test_items_come_in_order() -> None:
    assert list(prefetch(range(1000), lambda _: 1, 10)) == list(range(1000))


def test_no_more_than_the_bound_waits() -> None:
    made = 0

    def items() -> Iterator[int]:
        nonlocal made
        for i in range(100):
            made += 1
            yield i

    seen = []
    for taken, item in enumerate(prefetch(items(), lambda _: 4, 10), start=1):
        seen.append(made - taken)
        assert item == taken - 1
    # Two items of 4 fit in 10; one more may have been made and be waiting for room.
    assert max(seen) <= 3


def test_an_item_larger_than_the_bound_is_let_in_alone() -> None:
    assert list(prefetch([1, 2, 3], lambda _: 100, 10)) == [1, 2, 3]


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken source")

    ahead = prefetch(items(), lambda _: 1, 10)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken source"):
        next(ahead)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = prefetch(iter(range(10**9)), lambda _: 1, 10)
    assert next(ahead) == 0
    ahead.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == before
