"""Tables list their rows: videos by URI, or videos in a binary column."""

import hashlib
import io
import json
import resource
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.sources import list_sources
from tokenmill.schemas.errors import SourceError
from tokenmill.schemas.recipe import BytesSource, FilesSource, Source, TableSource

SHA = hashlib.sha256(b"video").hexdigest()


def listing_of(source: Source) -> pa.Table:
    """The videos of one source."""
    return list_sources([source])


def names_of(listing: pa.Table, base: str) -> list[str]:
    return [uri.removeprefix(base + "/") for uri in listing["uri"].to_pylist()]


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


class TestTables:
    def test_csv_columns_find_their_places(self, store):
        store.put("videos/a b.mp4", b"video")
        text = (
            "uri,sha256,size_bytes,num_frames,fps,width,height,caption,label,score,code,day\n"
            f'videos/a b.mp4,{SHA.upper()},5,120,29.97,640,360,"two\nlines",3,0.5,007,2024-01-02\n'
            f"videos/b.mp4,{SHA},,,,,,,4,,008,\n"
        )
        uri = store.put("list.csv", text.encode())
        first, second = listing_of(TableSource(kind="table", path=uri)).to_pylist()
        assert json.loads(first.pop("metadata")) == {
            "label": 3,
            "score": 0.5,
            "code": "007",
            "day": "2024-01-02",
        }
        assert first == {
            "uri": f"{store.url}/videos/a b.mp4",
            "stamp": SHA,
            "caption": "two\nlines",
            "digest": SHA,
            "size_bytes": 5,
            "num_frames": 120,
            "fps": 29.97,
            "width": 640,
            "height": 360,
        }
        assert json.loads(second["metadata"]) == {"label": 4, "code": "008"}
        assert second["caption"] is None
        assert second["fps"] is None

    def test_json_lines_keep_what_each_object_has(self, store):
        lines = [
            {
                "uri": "b.mp4",
                "caption": "bé",
                "num_frames": 7,
                "tags": ["x", {"y": 1}],
                "none": None,
                "mixed": "1",
            },
            {"uri": "a.mp4", "mixed": 1, "score": float("nan"), "it's/odd~": True},
        ]
        text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n"
        uri = store.put("list.JSONL", text.encode())
        second, first = listing_of(TableSource(kind="table", path=uri)).to_pylist()
        assert (first["caption"], first["num_frames"]) == ("bé", 7)
        assert json.loads(first["metadata"]) == {"tags": ["x", {"y": 1}], "mixed": "1"}
        assert json.loads(second["metadata"]) == {"mixed": 1, "it's/odd~": True}

    def test_parquet_keeps_its_types_and_drops_binaries_and_nulls(self, store):
        table = pa.table(
            {
                "path": ["a.mp4", "b.mp4"],
                "text": ["A", None],
                "fps": pa.array([25, float("nan")], pa.float32()),
                "num_frames": pa.array([10.0, None], pa.float64()),
                "when": pa.array([0, None], pa.timestamp("s", "Asia/Tokyo")),
                "scores": [[1.5, float("nan")], None],
                "thumbnail": [b"\xff", b"\x00"],
                "kind": pa.array(["k", None]).dictionary_encode(),
            }
        )
        uri = store.put("list.parquet", parquet_of(table))
        source = TableSource(kind="table", path=uri, uri_column="path", caption_column="text")
        first, second = listing_of(source).to_pylist()
        assert (first["caption"], first["fps"], first["num_frames"]) == ("A", 25.0, 10)
        metadata = json.loads(first["metadata"])
        assert metadata == {"when": "1970-01-01 00:00:00+00", "scores": [1.5, None], "kind": "k"}
        assert (second["caption"], second["fps"], second["metadata"]) == (None, None, None)

    def test_relative_uris_begin_at_their_table_and_have_one_spelling(self, store):
        lines = [
            "uri",
            "./x/a.mp4",
            "x//b.mp4",
            "../c.mp4",
            "/abs/../d.mp4",
            "file:///e.mp4",
            "s3://k/../f.mp4",
        ]
        uri = store.put("deep/list.csv", "\n".join(lines).encode())
        listing = listing_of(TableSource(kind="table", path=uri, identity="uri"))
        inside = [f"{store.url}/{name}" for name in ("deep/x/a.mp4", "deep/x/b.mp4", "c.mp4")]
        assert listing["uri"].to_pylist() == sorted([*inside, "/d.mp4", "/e.mp4", "s3://k/../f.mp4"])

    def test_numbers_of_a_csv_keep_every_digit(self, tmp_path):
        rows = "uri,big,version,score\na,12345678901234567890,1.10,0.25\nb,12345678901234567891,1.2,1.5\n"
        (tmp_path / "list.csv").write_text(rows)
        listing = listing_of(TableSource(kind="table", path=str(tmp_path / "list.csv")))
        assert json.loads(listing["metadata"][0].as_py()) == {
            "big": "12345678901234567890",
            "version": "1.10",
            "score": 0.25,
        }

    def test_row_without_a_digest_has_the_stamp_and_size_of_its_file(self, store):
        store.put("a#1.mp4", b"12345")
        uri = store.put("list.csv", f"uri,sha256\na#1.mp4,\ngone.mp4,\nknown.mp4,{SHA}\n".encode())
        found, gone, known = listing_of(TableSource(kind="table", path=uri)).to_pylist()
        assert found["stamp"] == listing_of(FilesSource(path=f"{store.url}/a#1.mp4"))["stamp"][0].as_py()
        assert (found["size_bytes"], found["digest"]) == (5, None)
        assert (gone["stamp"], gone["size_bytes"]) == ("missing", None)
        assert (known["stamp"], known["size_bytes"]) == (SHA, None)

    def test_uri_in_an_unknown_store_does_not_end_the_listing(self, tmp_path):
        (tmp_path / "list.csv").write_text("uri\nfoo://x.mp4\n")
        listing = listing_of(TableSource(kind="table", path=str(tmp_path / "list.csv")))
        assert listing.select(["uri", "stamp"]).to_pylist() == [{"uri": "foo://x.mp4", "stamp": ""}]

    def test_identity_by_uri_names_rows_without_looking(self, tmp_path):
        (tmp_path / "list.csv").write_text(f"uri,sha256\ns3://nowhere/a.mp4,\ns3://nowhere/b.mp4,{SHA}\n")
        source = TableSource(kind="table", path=str(tmp_path / "list.csv"), identity="uri")
        named = "uri:" + hashlib.sha256(b"s3://nowhere/a.mp4").hexdigest()
        assert listing_of(source)["digest"].to_pylist() == [named, SHA]

    def test_glob_reads_every_table_from_its_own_folder(self, store):
        store.put("one/list.csv", b"uri\na.mp4\n")
        store.put("two/list.tsv", b"uri\tcaption\nb.mp4\tB, and more\n")
        listing = listing_of(TableSource(kind="table", path=f"{store.url}/*/list.*", identity="uri"))
        assert names_of(listing, store.url) == ["one/a.mp4", "two/b.mp4"]
        assert listing["caption"].to_pylist() == [None, "B, and more"]

    def test_late_text_in_a_column_of_numbers_keeps_the_column_text(self, tmp_path):
        rows = [f"{i}.mp4,{i}" for i in range(200_000)]
        (tmp_path / "list.csv").write_text("uri,label\n" + "\n".join(rows) + "\nlast.mp4,none\n")
        listing = listing_of(TableSource(kind="table", path=str(tmp_path / "list.csv"), identity="uri"))
        by_name = dict(zip(names_of(listing, str(tmp_path)), listing["metadata"].to_pylist(), strict=True))
        assert json.loads(by_name["7.mp4"]) == {"label": "7"}
        assert json.loads(by_name["last.mp4"]) == {"label": "none"}

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            (
                "t.csv",
                "url,x\na,1\n",
                r"t\.csv: no column 'uri' \(did you mean 'url'\?\); found url, x: name the",
            ),
            ("t.jsonl", '{"path": "a", "x": 1}\n', r"t\.jsonl: no column 'uri'; found path, x"),
            ("t.csv", "uri,uri\na,b\n", r"several columns are called 'uri': rename all but one"),
            ("t.csv", "uri,x\na,1\n,2\n", r"t\.csv: row 2: uri is None, accepted is the path or URL"),
            ("t.jsonl", '{"uri": "a"}\n{"uri": " "}\n', r"row 2: uri is ' ', accepted is the path or URL"),
            ("t.jsonl", '{"uri": "a"}\n\n{"uri": \n', r"row 2: not a JSON object: '{\"uri\":'"),
            (
                "t.jsonl",
                '{"uri": "a"}\n[NaN]\n',
                r"row 2: not a JSON object: '\[null\]': every line holds one",
            ),
            ("t.jsonl", '{"uri": "a"}\n{"x": NaN\n', r"row 2: not a JSON object: '{\"x\": NaN': every line"),
            ("t.csv", "uri,sha256\na,\nb,123\n", r"row 2: sha256 is '123', accepted is 64 hex digits"),
            ("t.csv", "uri,num_frames\na,3\nb,many\n", r"row 2: num_frames is 'many', accepted is int64"),
            ("t.csv", "uri,num_frames\na,-3\n", r"row 1: num_frames is -3, accepted is 0 or more"),
            ("t.jsonl", '{"uri": "a", "fps": 0}\n', r"row 1: fps is 0\.0, accepted is more than 0"),
            ("t.csv", "uri,x\n", r"t\.csv: the table has no rows"),
            ("t.jsonl", "\n", r"t\.jsonl: the table has no rows"),
            ("t.csv", "", r"t\.csv: Empty CSV file"),
            ("t.csv", "uri,x\na,1,2\n", r"t\.csv: CSV parse error: Expected 2 columns, got 3"),
            ("t.parquet", "not parquet", r"t\.parquet: not a Parquet file, or truncated"),
            ("t.xlsx", "x", r"t\.xlsx: not a table: accepted are files ending in \.csv, \.tsv, \.jsonl"),
        ],
    )
    def test_wrong_table_is_refused(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(SourceError, match=message) as caught:
            listing_of(TableSource(kind="table", path=str(tmp_path / name)))
        assert "\n" not in str(caught.value)

    def test_column_that_json_cannot_hold_is_refused(self, tmp_path):
        table = pa.table({"uri": ["a"], "half": pa.array([1.5], pa.float16())})
        pq.write_table(table, tmp_path / "t.parquet")
        with pytest.raises(SourceError, match=r"t\.parquet: the columns \['half'\] cannot become JSON .*: remove or"):
            listing_of(TableSource(kind="table", path=str(tmp_path / "t.parquet")))

    def test_columns_that_differ_in_case_are_two(self, tmp_path):
        (tmp_path / "t.csv").write_text("uri,Label,label\na,1,2\n")
        (row,) = listing_of(TableSource(kind="table", path=str(tmp_path / "t.csv"))).to_pylist()
        assert json.loads(row["metadata"]) == {"Label": 1, "label": 2}

    def test_text_that_is_not_utf8_is_refused(self, tmp_path):
        for name, text in (("t.csv", b"uri\n\xff.mp4\n"), ("t.jsonl", b'{"uri": "\xff"}\n')):
            (tmp_path / name).write_bytes(text)
            with pytest.raises(SourceError, match=rf"{name}: .*(?i:utf-?8)"):
                listing_of(TableSource(kind="table", path=str(tmp_path / name)))

    def test_million_rows_fit_in_a_gigabyte(self, tmp_path):
        num_rows = 1_000_000
        numbers = pa.array(range(num_rows), pa.int64())
        names = pc.binary_join_element_wise("s3://bucket/videos/", numbers.cast(pa.string()), ".mp4", "")
        table = pa.table({"uri": names, "label": names, "score": numbers.cast(pa.float64())})
        pq.write_table(table, tmp_path / "list.parquet")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        listing = listing_of(TableSource(kind="table", path=str(tmp_path / "list.parquet"), identity="uri"))
        grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert listing.num_rows == num_rows
        assert grown_bytes < 1 << 30
        uris = listing["uri"]
        assert pc.all(pc.less(uris[:-1], uris[1:])).as_py()
        row = listing.slice(777_777, 1).to_pylist()[0]
        assert json.loads(row["metadata"])["label"] == row["uri"]


class TestBytes:
    def test_cells_become_rows_in_order(self, store):
        table = pa.table({"the video": [b"x" * i for i in range(12)], "caption": ["c"] * 12, "n": range(12)})
        uri = store.put("part #1.parquet", parquet_of(table, row_group_size=5))
        source = BytesSource(kind="bytes", path=uri, video_column="the video")
        listing = listing_of(source)
        assert listing["uri"].to_pylist() == [f"{uri}#column=the%20video&row={i:02d}" for i in range(12)]
        assert [json.loads(text) for text in listing["metadata"].to_pylist()] == [{"n": i} for i in range(12)]
        assert set(listing["caption"].to_pylist()) == {"c"}
        assert len(set(listing["stamp"].to_pylist())) == 1
        assert listing["size_bytes"].null_count == 12

    def test_folder_of_parquet_files(self, store):
        for name in ("b.parquet", "a.parquet"):
            store.put(name, parquet_of(pa.table({"video": [b"1"], "sha256": [SHA]})))
        listing = listing_of(BytesSource(kind="bytes", path=store.url))
        assert names_of(listing, store.url) == [
            "a.parquet#column=video&row=0",
            "b.parquet#column=video&row=0",
        ]
        assert listing["digest"].to_pylist() == [SHA, SHA]

    def test_column_of_paths_is_refused(self, tmp_path):
        pq.write_table(pa.table({"video": ["a.mp4"]}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=r"column 'video' is string, whole videos are binary: .*kind: table"):
            listing_of(BytesSource(kind="bytes", path=str(tmp_path)))

    def test_absent_column_is_refused(self, tmp_path):
        pq.write_table(pa.table({"videos": [b"1"]}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=r"no column 'video' \(did you mean 'videos'\?\); found videos"):
            listing_of(BytesSource(kind="bytes", path=str(tmp_path)))

    def test_other_file_is_refused(self, tmp_path):
        (tmp_path / "x.bin").write_bytes(b"0123456789" * 10)
        with pytest.raises(SourceError, match=r"x\.bin: not a Parquet file, or truncated"):
            listing_of(BytesSource(kind="bytes", path=str(tmp_path / "x.bin")))

    def test_files_without_rows_are_refused(self, tmp_path):
        pq.write_table(pa.table({"video": pa.array([], pa.binary())}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match="the Parquet files have no rows: name others, or fill them"):
            listing_of(BytesSource(kind="bytes", path=str(tmp_path)))
