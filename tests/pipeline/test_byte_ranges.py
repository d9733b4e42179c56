"""Byte ranges: exactly what was asked for is read, at once where it lies together."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tokenmill.pipeline import byte_ranges
from tokenmill.pipeline.byte_ranges import ByteRange, read_ranges
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import CacheError, StorageError

from ..conftest import Store

DATA = {"a": bytes(range(200)), "b": bytes(range(100, 150))}


def folder_of(store: Store) -> Folder:
    for name, data in DATA.items():
        store.put(name, data)
    return Folder(store.url)


def test_ranges_come_in_the_order_asked_from_any_store(store: Store) -> None:
    asked = [("a", 150, 10), ("b", 0, 5), ("a", 0, 3), ("a", 3, 4), ("a", 199, 1), ("b", 49, 1), ("a", 5, 4)]
    ranges = [ByteRange(*one) for one in asked]
    parts, num_bytes = read_ranges(folder_of(store), ranges)
    assert parts == [DATA[name][offset : offset + size] for name, offset, size in asked]
    assert num_bytes == sum(one.size for one in ranges)  # what two share is read twice
    assert read_ranges(folder_of(store), []) == ([], 0)


def test_ranges_that_touch_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    store, requests = Store(url="memory:///ranges"), []
    plain = MemoryFileSystem.cat_file

    def noted(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        requests.append((path.rpartition("/")[2], start, end))
        return plain(self, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    ranges = [ByteRange("a", 4, 4), ByteRange("a", 0, 4), ByteRange("b", 8, 2), ByteRange("a", 9, 2)]
    read_ranges(folder_of(store), ranges)
    assert requests == [("a", 0, 8), ("a", 9, 11), ("b", 8, 10)]
    requests.clear()
    monkeypatch.setattr(byte_ranges, "MERGED_BYTES", 7)
    assert read_ranges(folder_of(store), ranges)[1] == 12
    assert requests == [("a", 0, 4), ("a", 4, 8), ("a", 9, 11), ("b", 8, 10)]
    fsspec.filesystem("memory").store.clear()


def test_a_file_that_is_too_short_or_absent_is_named(store: Store) -> None:
    folder = folder_of(store)
    with pytest.raises(CacheError, match=r"b: 10 bytes were asked for at 45, found 5: tokenmill verify CACHE"):
        read_ranges(folder, [ByteRange("b", 45, 10)])
    with pytest.raises(StorageError, match="no such file"):
        read_ranges(folder, [ByteRange("c", 0, 1)])
