"""Labels come from files and go to files without change, and a bad line costs no other."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from tokenmill.pipeline import labels
from tokenmill.pipeline.appended import read_table
from tokenmill.pipeline.labels import (
    LABELS,
    POLICIES,
    add_policies,
    export_frame_labels,
    export_policies,
    import_frame_labels,
    import_policies,
)
from tokenmill.pipeline.queries import QUERIES
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.queries import query_id_of
from tokenmill.schemas.tables import LABEL_SCHEMA, POLICY_SCHEMA, QUERY_SCHEMA

CAR, DOG, TWIN, EMPTY = (digit * 64 for digit in "abcd")
_numbers = itertools.count()


class FewFrames:
    """A cache with three videos that have candidate frames: of 10 s, of overlapping clips, and of one frame."""

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)
        self._connection = duckdb.connect()
        self._connection.execute("create table videos (video_id varchar, uri varchar, fps double)")
        self._connection.execute("create table duplicates (video_id varchar, uri varchar)")
        self._connection.execute(
            "create table frames (clip_id varchar, video_id varchar, frame int, frame_number bigint, pts_s double)"
        )
        uris = {CAR: "/in/a/car.mp4", DOG: "/in/a/dog.mp4", TWIN: "/in/b/dog.mp4", EMPTY: "/in/empty.mp4"}
        for video_id, uri in uris.items():
            self._connection.execute("insert into videos values (?, ?, 10)", [video_id, uri])
        self._connection.execute("insert into duplicates values (?, '/in/copy of car.mp4')", [CAR])
        every_second = [(f"car{i // 5}", CAR, i % 5 * 10, i * 10, float(i)) for i in range(10)]
        overlapping = [
            (f"dog{clip}", DOG, i, 4 * clip + i, (4 * clip + i) * 2.0) for clip in range(2) for i in range(8)
        ]
        self._connection.executemany(
            "insert into frames values (?, ?, ?, ?, ?)", [*every_second, *overlapping, ("twin", TWIN, 0, 3, 0.3)]
        )

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        return self._connection.sql(query, params=list(parameters)).to_arrow_table()

    def labelled(self, query: str) -> list[tuple[str, int]]:
        """The places of label 1 for a query; all others of its videos must have label 0."""
        rows = read_table(self.folder, LABELS, LABEL_SCHEMA).to_pylist()
        of_query = [row for row in rows if row["query_id"] == query_id_of(query)]
        places = {(row["clip_id"], row["frame"]): row["label"] for row in of_query}
        videos = {row["video_id"] for row in of_query}
        candidates = self.sql("select clip_id, frame from frames where list_contains(?, video_id)", [list(videos)])
        assert set(places) == {(row["clip_id"], row["frame"]) for row in candidates.to_pylist()}
        assert len(places) == len(of_query)
        return sorted(place for place, label in places.items() if label == 1)


@pytest.fixture
def cache() -> FewFrames:
    return FewFrames(f"memory:///labels-{next(_numbers)}")


def lines(*found: dict[str, Any]) -> list[str]:
    return [json.dumps(one) for one in found]


@pytest.mark.parametrize(
    ("says", "wanted"),
    [
        ({"times_s": [0, 6.4]}, [("car0", 0), ("car1", 10)]),
        ({"times_s": [6.6, 6.7, -0.5, 9.5]}, [("car0", 0), ("car1", 20), ("car1", 40)]),
        ({"times_s": [2.5]}, [("car0", 20)]),  # of two that are equally near, the first
        ({"frame_numbers": [0, 64, 95]}, [("car0", 0), ("car1", 10), ("car1", 40)]),
        ({"spans_s": [[1, 3], [8.5, 100]]}, [("car0", 10), ("car0", 20), ("car1", 40)]),
        ({"spans_s": [[1, 2]], "times_s": [5]}, [("car0", 10), ("car1", 0)]),
        ({"times_s": []}, []),
    ],
)
def test_frames_nearest_to_times_and_inside_spans_are_labelled(
    cache: FewFrames, says: dict[str, Any], wanted: list[tuple[str, int]]
) -> None:
    imported = import_frame_labels(cache, lines({"video": "car.mp4", "query": "a car?", **says}), "l.jsonl", "people")
    assert (imported.num_queries, imported.num_labels, imported.problems) == (1, 10, ())
    assert cache.labelled("a car?") == wanted


def test_a_frame_of_two_clips_is_labelled_in_both(cache: FewFrames) -> None:
    import_frame_labels(cache, lines({"video": "a/dog.mp4", "query": "a dog?", "times_s": [8.9, 23]}), "l", "people")
    assert cache.labelled("a dog?") == [("dog0", 4), ("dog1", 0), ("dog1", 7)]


@pytest.mark.parametrize("video", ["/in/a/car.mp4", "car.mp4", "a/car.mp4", CAR, "AAAAAAAA", "copy of car.mp4"])
def test_a_video_is_named_by_uri_path_or_id(cache: FewFrames, video: str) -> None:
    imported = import_frame_labels(cache, lines({"video": video, "query": "q", "times_s": [1]}), "l", "people")
    assert imported.problems == ()
    assert cache.labelled("q") == [("car0", 10)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"video": "cow.mp4"}, "l.jsonl, line 3: no video of the cache is called 'cow.mp4'; accepted: a uri"),
        ({"video": "ar.mp4"}, "no video of the cache"),
        ({"video": "aaaaaaa"}, "no video of the cache is called 'aaaaaaa'; accepted: .* 8 digits or more"),
        ({"video": "dog.mp4"}, "several videos are called 'dog.mp4'"),
        ({"video": 7}, "video: found 7; accepted: a text"),
        ({"video": "empty.mp4"}, "has no candidate frames in the cache"),
        ({"query": "  "}, "query: found '  '; accepted: a text"),
        ({"query": None}, "query: found None"),
        ({"query": "\ud800"}, "query: found "),
        ({"source": ""}, "source: found ''"),
        ({"times_s": 1}, "times_s: found 1; accepted: a list of seconds"),
        ({"times_s": ["1"]}, "times_s: found"),
        ({"times_s": [True]}, "times_s: found"),
        ({"times_s": [float("nan")]}, r"times_s: found \[nan\]"),
        ({"times_s": [10**400]}, "times_s: found"),
        ({"times_s": [100]}, "line 3: no candidate frame is near 100 s: they are from 0 to 9 s"),
        ({"frame_numbers": [1]}, "found the keys .*times_s, frame_numbers; accepted: times_s or frame_numbers"),
        ({"times_s": None, "frame_numbers": [-1]}, "found the keys"),
        ({"spans_s": [[2, 1]]}, r"spans_s: found \[\[2, 1\]\]; accepted: a list of \[from, to\] in seconds"),
        ({"spans_s": [[1, 2, 3]]}, "spans_s: found"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_kept(cache: FewFrames, change: dict[str, Any], said: str) -> None:
    good = {"video": "car.mp4", "query": "good", "times_s": [1]}
    bad = {"video": "car.mp4", "query": "bad", "times_s": [1]} | change
    imported = import_frame_labels(cache, [*lines(good), "", *lines(bad, good | {"query": "after"})], "l.jsonl", "p")
    assert len(imported.problems) == 1
    assert re.search(said, imported.problems[0])
    assert (imported.num_queries, imported.num_labels) == (2, 20)
    texts = read_table(cache.folder, QUERIES, QUERY_SCHEMA)["text"].to_pylist()
    assert texts == ["good", "after"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "found '{'; accepted: a JSON object"),
        ('["car.mp4"]', "accepted: a JSON object"),
        ('{"video": "car.mp4", "query": "q"}', "found the keys video, query; accepted: times_s or"),
        ('{"video": "car.mp4", "query": "q", "frame_numbers": [1.5]}', "a list of frames from 0"),
    ],
)
def test_a_line_of_another_form_is_a_problem(cache: FewFrames, text: str, said: str) -> None:
    imported = import_frame_labels(cache, [text], "l.jsonl", "people")
    assert imported.num_labels == 0
    assert len(imported.problems) == 1
    assert imported.problems[0].startswith("l.jsonl, line 1: ")
    assert said in imported.problems[0]


def test_a_time_without_a_frame_is_a_problem_and_the_others_of_its_line_count(cache: FewFrames) -> None:
    line = {"video": "car.mp4", "query": "q", "times_s": [2, 11, 12], "spans_s": [[3.1, 3.2]]}
    imported = import_frame_labels(cache, lines(line), "l.jsonl", "people")
    assert imported.problems == (
        "l.jsonl, line 1: no candidate frame is near 11 s: they are from 0 to 9 s",
        "l.jsonl, line 1: no candidate frame is near 12 s: they are from 0 to 9 s",
        "l.jsonl, line 1: no candidate frame is from 3.1 to 3.2 s",
    )
    assert cache.labelled("q") == [("car0", 20)]


@pytest.mark.parametrize(("number", "is_near"), [(3, True), (0, True), (8, True), (9, False), (100, False)])
def test_frame_numbers_count_from_the_only_candidate_at_the_rate_of_the_video(
    cache: FewFrames, number: int, is_near: bool
) -> None:
    line = {"video": "b/dog.mp4", "query": "q", "frame_numbers": [number]}
    imported = import_frame_labels(cache, lines(line), "l", "people")
    assert (imported.num_labels, len(imported.problems)) == ((1, 0) if is_near else (0, 1))


def test_what_is_labelled_once_stays(cache: FewFrames) -> None:
    line = {"video": "car.mp4", "query": "q", "times_s": [1]}
    first = import_frame_labels(cache, lines(line, line | {"times_s": [2]}, line | {"query": " q "}), "l", "people")
    assert (first.num_queries, first.num_labels, first.num_known) == (1, 10, 2)
    again = import_frame_labels(cache, lines(line | {"times_s": [3]}), "l", "people")
    assert (again.num_queries, again.num_labels, again.num_known, again.problems) == (1, 0, 1, ())
    assert cache.labelled("q") == [("car0", 10)]
    other = import_frame_labels(cache, lines(line | {"source": "another"}), "l", "people")
    assert (other.num_labels, other.num_known) == (10, 0)
    sources = read_table(cache.folder, LABELS, LABEL_SCHEMA, ["source"])["source"].to_pylist()
    assert sources == ["people"] * 10 + ["another"] * 10


def test_many_lines_are_stored_in_parts(cache: FewFrames, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "ROWS_AT_ONCE", 25)
    found = [{"video": "car.mp4", "query": f"q{i % 6}", "times_s": [i % 6]} for i in range(8)]
    imported = import_frame_labels(cache, lines(*found), "l", "people")
    assert (imported.num_queries, imported.num_labels, imported.num_known) == (6, 60, 2)
    assert [len(cache.labelled(f"q{i}")) for i in range(6)] == [1] * 6


def test_labels_survive_export_and_import(cache: FewFrames) -> None:
    import_frame_labels(
        cache,
        lines(
            {"video": "car.mp4", "query": "is it\u2028über?", "times_s": [1, 6.4]},
            {"video": "a/dog.mp4", "query": "a dog?", "spans_s": [[3, 13]]},
            {"video": "car.mp4", "query": "nothing?", "times_s": []},
            {"video": "b/dog.mp4", "query": "a dog?", "frame_numbers": [3], "source": "another"},
        ),
        "l.jsonl",
        "people",
    )
    exported = list(export_frame_labels(cache))
    assert json.loads(exported[0]) == {
        "video": "/in/a/car.mp4",
        "query": "is it\u2028über?",
        "source": "people",
        "times_s": [1.0, 6.0],
    }
    copy = FewFrames(f"memory:///labels-{next(_numbers)}")
    imported = import_frame_labels(copy, exported, "e.jsonl", "nobody")
    assert (imported.num_queries, imported.num_known, imported.problems) == (3, 0, ())
    for table, schema in ((LABELS, LABEL_SCHEMA), (QUERIES, QUERY_SCHEMA)):
        assert read_table(copy.folder, table, schema) == read_table(cache.folder, table, schema)
    assert import_frame_labels(cache, exported, "e.jsonl", "nobody").num_labels == 0
    assert list(export_frame_labels(cache, "another")) == exported[3:]
    assert list(export_frame_labels(cache, "nobody")) == []


def test_policies_survive_export_and_import(cache: FewFrames) -> None:
    found = [
        {"query": "a car?", "policy": "fragment"},
        {"query": "what is it about?", "policy": "global"},
        {"video": "car.mp4", "query": "a car?", "policy": "global", "p_fragment": 0.3},
    ]
    imported = import_policies(cache, lines(*found), "p.jsonl", "people")
    assert (imported.num_queries, imported.num_labels, imported.num_known, imported.problems) == (2, 3, 0, ())
    rows = read_table(cache.folder, POLICIES, POLICY_SCHEMA)
    assert rows["p_fragment"].to_pylist() == pytest.approx([1, 0, 0.3])
    assert rows["video_id"].to_pylist() == [None, None, CAR]
    exported = list(export_policies(cache))
    assert json.loads(exported[2]) == found[2] | {"video": "/in/a/car.mp4", "source": "people"}
    copy = FewFrames(f"memory:///labels-{next(_numbers)}")
    import_policies(copy, exported, "e.jsonl", "nobody")
    assert read_table(copy.folder, POLICIES, POLICY_SCHEMA) == rows
    assert import_policies(cache, exported, "e.jsonl", "nobody").num_known == 3
    assert list(export_policies(cache, "nobody")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "half"}, "p.jsonl, line 1: policy: found 'half'; accepted: global, fragment"),
        ({"p_fragment": 1.5}, "p_fragment: found 1.5; accepted: a number from 0 to 1"),
        ({"p_fragment": "1"}, "p_fragment: found '1'"),
        ({"video": "cow.mp4"}, "no video of the cache is called 'cow.mp4'"),
        ({"query": ""}, "query: found ''"),
    ],
)
def test_a_bad_policy_is_named_and_the_others_are_kept(cache: FewFrames, change: dict[str, Any], said: str) -> None:
    bad = {"query": "bad", "policy": "fragment"} | change
    imported = import_policies(cache, lines(bad, {"query": "good", "policy": "global"}), "p.jsonl", "people")
    assert (imported.num_labels, len(imported.problems)) == (1, 1)
    assert said in imported.problems[0]


def test_policies_are_added_once(cache: FewFrames) -> None:
    row = {"query_id": "q", "source": "router", "video_id": None, "policy": "global", "p_fragment": 0.25}
    assert add_policies(cache.folder, [row, row | {"policy": "fragment"}]) == 1
    rows = [row | {"p_fragment": 0.5}, row | {"video_id": CAR}, row | {"source": "another"}, row | {"query_id": "r"}]
    assert add_policies(cache.folder, rows) == 3
    assert add_policies(cache.folder, rows) == add_policies(cache.folder, []) == 0
    assert read_table(cache.folder, POLICIES, POLICY_SCHEMA).to_pylist() == [row, *rows[1:]]


def test_a_video_whose_uri_names_another_too_is_exported_by_its_id(cache: FewFrames) -> None:
    cache._connection.execute("update videos set uri = '/in/a/car.mp4' where video_id = ?", [TWIN])
    line = {"video": CAR, "query": "q", "times_s": [1]}
    import_frame_labels(cache, lines(line), "l", "people")
    (exported,) = export_frame_labels(cache)
    assert json.loads(exported)["video"] == CAR


def test_a_cache_without_frames_takes_policies(cache: FewFrames) -> None:
    cache._connection.execute("drop table frames")
    assert import_frame_labels(cache, ["", " "], "l", "people").num_labels == 0
    assert list(export_frame_labels(cache)) == []
    assert import_policies(cache, lines({"query": "q", "policy": "global"}), "p", "people").num_labels == 1
