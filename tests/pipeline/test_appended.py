"""Tables only grow: nothing is there twice, nothing half, whoever races and whoever is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from tokenmill.pipeline.appended import Keys, append, names_in, read_table
from tokenmill.pipeline.queries import QUERIES, add_queries
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import CacheError, RecipeError
from tokenmill.schemas.queries import query_id_of
from tokenmill.schemas.tables import QUERY_SCHEMA

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


def test_keys_read_each_file_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    append(folder, QUERIES, lambda: rows("one", "one", "two"))
    keys = Keys(folder, QUERIES, QUERY_SCHEMA, ["query_id", "example"])
    assert keys.read() == {("one", None), ("two", None)}
    (tmp_path / QUERIES / "1.parquet").write_bytes(b"not looked at again")
    append(folder, QUERIES, lambda: rows("three"))
    assert keys.read() == {("one", None), ("two", None), ("three", None)}


def test_queries_are_added_once(store: Store) -> None:
    folder = Folder(store.url)
    ids = add_queries(folder, ["a car ", "a dog", "a car"], ["a car"])
    assert ids == [query_id_of("a car"), query_id_of("a dog"), query_id_of("a car"), query_id_of(example="a car")]
    assert add_queries(folder, ["a dog", "a cat"]) == [query_id_of("a dog"), query_id_of("a cat")]
    assert read_table(folder, QUERIES, QUERY_SCHEMA).to_pylist() == [
        {"query_id": ids[0], "text": "a car", "example": None},
        {"query_id": ids[1], "text": "a dog", "example": None},
        {"query_id": ids[3], "text": None, "example": "a car"},
        {"query_id": query_id_of("a cat"), "text": "a cat", "example": None},
    ]
    with pytest.raises(RecipeError, match="an empty text"):
        add_queries(folder, ["a tree", " "])
    assert len(texts_in(folder)) == 4
