"""Tables only grow: nothing is there twice, nothing half, whoever races and whoever is killed."""

import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tokenmill.pipeline.appended import Keys, append, append_to, names_in, read_table
from tokenmill.pipeline.queries import QUERIES, add_lacking_queries, add_queries, known_queries
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import CacheError, RecipeError
from tokenmill.schemas.queries import query_id_of
from tokenmill.schemas.tables import LABEL_SCHEMA, POLICY_SCHEMA, QUERY_SCHEMA, SCORE_SCHEMA, VERDICT_SCHEMA

from ..conftest import Store


def rows(*texts: str) -> pa.Table:
    return pa.Table.from_pylist([{"query_id": text, "text": text} for text in texts], schema=QUERY_SCHEMA)


def texts_in(folder: Folder) -> list[str]:
    return read_table(folder, QUERIES, QUERY_SCHEMA, ["text"])["text"].to_pylist()


def test_what_is_added_is_read_in_its_order(store: Store) -> None:
    folder = Folder(store.url)
    assert texts_in(folder) == []
    for number in range(11):  # 10 comes after 9, not after 1
        assert append(folder, QUERIES, lambda number=number: rows(f"{number}a", f"{number}b")) == 2
    assert append(folder, QUERIES, lambda: None) == append(folder, QUERIES, lambda: rows()) == 0
    assert texts_in(folder) == [f"{number}{letter}" for number in range(11) for letter in "ab"]
    assert names_in(folder, QUERIES) == [f"{QUERIES}/{number}.parquet" for number in range(1, 12)]
    assert read_table(folder, QUERIES, QUERY_SCHEMA).schema == QUERY_SCHEMA


def test_who_loses_a_race_looks_again(store: Store) -> None:
    folder, asked = Folder(store.url), []

    def lacking() -> pa.Table:
        asked.append(texts_in(folder))
        if len(asked) == 1:
            assert append(folder, QUERIES, lambda: rows("another's")) == 1
        return rows("mine")

    assert append(folder, QUERIES, lacking) == 1
    assert asked == [[], ["another's"]]
    assert texts_in(folder) == ["another's", "mine"]


def test_who_loses_a_race_is_given_the_new_files(store: Store) -> None:
    folder, given = Folder(store.url), []

    def lacking(names: Sequence[str]) -> pa.Table:
        given.append(list(names))
        if len(given) == 1:
            append(folder, QUERIES, lambda: rows("another's"))
        return rows("mine")

    assert append_to(folder, QUERIES, lacking) == 1
    assert given == [[], [f"{QUERIES}/1.parquet"]]
    assert texts_in(folder) == ["another's", "mine"]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed."""
    found, list_files = [], Folder.list

    def noted(self: Folder, prefix: str) -> list[str]:
        found.append(prefix)
        return list_files(self, prefix)

    monkeypatch.setattr(Folder, "list", noted)
    return found


def test_adding_lists_a_folder_once_and_again_after_a_lost_race(tmp_path: Path, listed: list[str]) -> None:
    known, other = known_queries(Folder(str(tmp_path))), Folder(str(tmp_path))
    for number in range(3):
        add_lacking_queries(known, [f"query {number}"])
    assert listed == [QUERIES] * 3

    def lacking() -> pa.Table | None:
        if ("another's",) in known:
            return None
        append(other, QUERIES, lambda: rows("another's"))
        return rows("another's")

    del listed[:]
    assert known.append(lacking) == 0
    assert listed == [QUERIES] * 3  # its own two, and the other's
    assert len(texts_in(other)) == 4


class LookingFileSystem(MemoryFileSystem):
    """A file system whose library looks before it writes, as most do: of two writers both may win."""

    protocol = "looks-first"
    store: dict = {}  # noqa: RUF012


def test_a_store_that_cannot_create_once_takes_rows_of_one_process_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fsspec.register_implementation("looks-first", LookingFileSystem, clobber=True)
    folder = Folder("looks-first://cache")
    for text in ("one", "two", "one"):
        add_queries(folder, [text])
    assert texts_in(folder) == ["one", "two"]
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "event=unguarded_append" in warning.getMessage()
    assert "cache' remedy='let one process at a time add rows there'" in warning.getMessage()


def test_a_local_disk_without_hard_links_still_takes_rows_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    texts = [f"query {number}" for number in range(12)]
    start = threading.Barrier(4)

    def add(turn: int) -> None:
        start.wait()
        for i in range(len(texts)):
            add_queries(Folder(str(tmp_path)), [texts[(i + 3 * turn) % len(texts)]])

    threads = [threading.Thread(target=add, args=[turn]) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts_in(Folder(str(tmp_path)))) == sorted(texts)
    assert not caplog.records


def test_threads_that_race_add_every_query_once(store: Store) -> None:
    texts = [f"query {number}" for number in range(12)]
    start = threading.Barrier(4)

    def add(turn: int) -> None:
        start.wait()
        for i in range(0, len(texts), 3):
            add_queries(Folder(store.url), [texts[(i + turn + j) % len(texts)] for j in range(3)])

    threads = [threading.Thread(target=add, args=[turn]) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts_in(Folder(store.url))) == sorted(texts)


ADDS = """
    import sys
    from tokenmill.pipeline.queries import add_queries
    from tokenmill.pipeline.storage import Folder

    print("ready", flush=True)
    for number in range(int(sys.argv[2]), int(sys.argv[3])):
        add_queries(Folder(sys.argv[1]), [f"query {number}"])
        print(number, flush=True)
"""


def adding(url: str, begin: int, end: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(ADDS), url, str(begin), str(end)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_whole_files_and_others_go_on(tmp_path: Path) -> None:
    with adding(str(tmp_path), 0, 10_000) as killed, adding(str(tmp_path), 5, 25) as other:
        assert killed.stdout is not None
        told = [next(killed.stdout) for _ in range(12)]
        os.kill(killed.pid, signal.SIGKILL)
        assert other.wait() == 0
    folder = Folder(str(tmp_path))
    texts = texts_in(folder)
    assert len(texts) == len(set(texts))
    assert set(texts) >= {f"query {number}" for number in [*range(int(told[-1]) + 1), *range(5, 25)]}
    assert add_queries(folder, ["one more"]) == [query_id_of("one more")]


@pytest.mark.parametrize("harm", ["cut", "a changed byte", "other columns"])
def test_a_damaged_file_is_named(tmp_path: Path, harm: str) -> None:
    folder = Folder(str(tmp_path))
    append(folder, QUERIES, lambda: rows("one"))
    append(folder, QUERIES, lambda: rows("a text that is long enough to have a byte in the middle"))
    path = tmp_path / QUERIES / "2.parquet"
    data = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "a changed byte":
        data[data.index(b"long enough")] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
        append(folder, QUERIES, lambda: pa.table({"query": ["one"]}))
    with pytest.raises(CacheError, match=r"queries/2\.parquet: damaged \(.+\): delete it"):
        read_table(folder, QUERIES, QUERY_SCHEMA)
    path.unlink()
    assert texts_in(folder) == ["one"]


@pytest.mark.parametrize(
    ("table", "schema", "remedy"),
    [
        ("labels", LABEL_SCHEMA, "restore it from a copy, or delete it and import its labels again"),
        ("policies", POLICY_SCHEMA, "restore it from a copy, or delete it and import its labels again"),
        ("verdicts", VERDICT_SCHEMA, "restore it from a copy, or delete it and let the judge decide again"),
        ("scores/siglip", SCORE_SCHEMA, "delete it; what it held is made again"),
    ],
)
def test_what_a_damaged_file_held_is_brought_back_as_its_table_allows(
    tmp_path: Path, table: str, schema: pa.Schema, remedy: str
) -> None:
    folder = Folder(str(tmp_path))
    folder.create(f"relevance/{table}/1.parquet", b"PAR1")
    with pytest.raises(CacheError, match=rf"{table}/1\.parquet: damaged \(.+\): {remedy}$"):
        read_table(folder, f"relevance/{table}", schema)


def test_keys_read_each_file_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    append(folder, QUERIES, lambda: rows("one", "one", "two"))
    keys = Keys(folder, QUERIES, QUERY_SCHEMA, ["query_id", "text"])
    assert keys.read() == {("one", "one"), ("two", "two")}
    (tmp_path / QUERIES / "1.parquet").write_bytes(b"not looked at again")
    append(folder, QUERIES, lambda: rows("three"))
    assert ("three", "three") not in keys
    assert keys.read() == {("one", "one"), ("two", "two"), ("three", "three")}
    assert ("three", "three") in keys


def test_queries_are_added_once(store: Store) -> None:
    folder = Folder(store.url)
    ids = add_queries(folder, ["a car ", "a dog", "a car"])
    assert ids == [query_id_of("a car"), query_id_of("a dog"), query_id_of("a car")]
    assert add_queries(folder, ["a dog", "a cat"]) == [query_id_of("a dog"), query_id_of("a cat")]
    assert read_table(folder, QUERIES, QUERY_SCHEMA).to_pylist() == [
        {"query_id": ids[0], "text": "a car"},
        {"query_id": ids[1], "text": "a dog"},
        {"query_id": query_id_of("a cat"), "text": "a cat"},
    ]
    with pytest.raises(RecipeError, match="an empty text"):
        add_queries(folder, ["a tree", " "])
    assert len(texts_in(folder)) == 3
