"""Sources list what they hold, the same way wherever it is kept, and refuse in one line."""

import contextlib
import hashlib
import io
import json
import logging
import os
import resource
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.sources import list_source, list_sources
from tokenmill.schemas.errors import SourceError
from tokenmill.schemas.recipe import BytesSource, FilesSource, TableSource, WebDatasetSource
from tokenmill.schemas.tables import SOURCE_SCHEMA

SHA = hashlib.sha256(b"video").hexdigest()
NOBODY = 65534
ODD_NAMES = ("a#b.mp4", "sub/naïve café.MOV", "sub/x%20y&z=1.webm")


def names_of(listing: pa.Table, base: str) -> list[str]:
    return [uri.removeprefix(base + "/") for uri in listing["uri"].to_pylist()]


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def plain_user_folder() -> Iterator[Path]:
    """A folder that any user may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def as_plain_user() -> Iterator[None]:
    """Do as a user whom permissions bind; root, as which tests may run, reads everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def tar_of(members: Mapping[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class TestFiles:
    def test_folder_gives_its_videos_sorted_at_any_depth(self, store):
        for name in (*ODD_NAMES, "notes.txt", ".hidden.mp4", ".cache/x.mp4", "sub/.h/x.mp4"):
            store.put(name, name.encode())
        listing = list_source(FilesSource(path=store.url))
        assert listing.schema == SOURCE_SCHEMA
        assert names_of(listing, store.url) == sorted(ODD_NAMES)
        assert listing["size_bytes"].to_pylist() == [len(name.encode()) for name in sorted(ODD_NAMES)]
        assert listing["digest"].null_count == 3

    def test_stamp_stays_while_a_file_stays_and_changes_with_it(self, store):
        store.put("a.mp4", b"one")
        source = FilesSource(path=store.url)
        first = list_source(source)["stamp"].to_pylist()
        assert first == list_source(source)["stamp"].to_pylist()
        store.put("a.mp4", b"two")
        assert first != list_source(source)["stamp"].to_pylist()

    def test_glob_alone_decides_what_is_a_video(self, store):
        for name in ("a.mp4", "b.bin", "sub/c.mp4", ".d.bin"):
            store.put(name, b"x")
        assert names_of(list_source(FilesSource(path=f"{store.url}/*")), store.url) == ["a.mp4", "b.bin"]
        assert names_of(list_source(FilesSource(path=f"{store.url}/**/*.mp4")), store.url) == [
            "a.mp4",
            "sub/c.mp4",
        ]
        assert names_of(list_source(FilesSource(path=f"{store.url}/.*.bin")), store.url) == [".d.bin"]

    def test_one_file_needs_no_extension(self, store):
        uri = store.put("#1 clip", b"x")
        assert list_source(FilesSource(path=uri))["uri"].to_pylist() == [uri]

    def test_folder_whose_name_looks_like_a_glob_is_that_folder(self, tmp_path):
        (tmp_path / "[1] *").mkdir()
        (tmp_path / "[1] *" / "a.mp4").write_bytes(b"x")
        listing = list_source(FilesSource(path=str(tmp_path / "[1] *")))
        assert listing["uri"].to_pylist() == [str(tmp_path / "[1] *" / "a.mp4")]

    def test_extensions_are_the_recipes(self, store):
        store.put("a.mp4", b"x")
        store.put("b.Y4M", b"x")
        assert names_of(list_source(FilesSource(path=store.url, extensions=(".y4m",))), store.url) == ["b.Y4M"]

    def test_local_paths_become_absolute(self, tmp_path, monkeypatch):
        (tmp_path / "a.mp4").write_bytes(b"x")
        monkeypatch.chdir(tmp_path)
        expected = [str(tmp_path / "a.mp4")]
        for path in (".", "a.mp4", "*.mp4", f"file://{tmp_path}"):
            assert list_source(FilesSource(path=path))["uri"].to_pylist() == expected

    def test_link_to_nothing_is_listed_as_missing(self, tmp_path):
        (tmp_path / "a.mp4").symlink_to(tmp_path / "gone.mp4")
        assert list_source(FilesSource(path=str(tmp_path)))["stamp"].to_pylist() == ["missing"]

    def test_absent_folder_is_refused(self, store):
        store.put("a.mp4", b"x")
        with pytest.raises(SourceError, match=r"/nowhere: it does not exist: check the path$"):
            list_source(FilesSource(path=f"{store.url}/nowhere"))

    def test_folder_without_videos_is_refused_with_what_it_has(self, store):
        store.put("a.txt", b"x")
        store.put("b.txt", b"x")
        with pytest.raises(SourceError, match=r"found 2 files, none of them ending in \.mp4, \.avi: name another"):
            list_source(FilesSource(path=store.url, extensions=("mp4", "avi")))

    def test_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(SourceError, match="found an empty folder: name another folder"):
            list_source(FilesSource(path=str(tmp_path)))

    def test_glob_without_a_file_is_refused(self, store):
        store.put("sub/a.mp4", b"x")
        with pytest.raises(SourceError, match="the glob matches nothing: check it"):
            list_source(FilesSource(path=f"{store.url}/*.mp4"))
        with pytest.raises(SourceError, match="the glob matches 1 folders but no file"):
            list_source(FilesSource(path=f"{store.url}/s*"))

    @pytest.mark.parametrize(("name", "kind"), [("list.csv", "table"), ("x.parquet", "table"), ("x.tar", "webdataset")])
    def test_table_or_tar_is_no_video(self, tmp_path, name, kind):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(SourceError, match=f"{name}: not a video: .* write kind: {kind}"):
            list_source(FilesSource(path=str(tmp_path / name)))

    def test_unknown_protocol_is_refused(self):
        with pytest.raises(SourceError, match=r"^foo://x: Protocol not known: foo: accepted are local paths and URLs"):
            list_source(FilesSource(path="foo://x"))

    def test_chained_url_is_refused(self):
        with pytest.raises(SourceError, match="chained URLs cannot be listed: unpack the files"):
            list_source(FilesSource(path="zip://*.mp4::memory://a.zip"))

    def test_unreadable_folder_is_refused_though_others_have_videos(self, plain_user_folder):
        (plain_user_folder / "a.mp4").write_bytes(b"x")
        (plain_user_folder / "locked").mkdir(mode=0)
        with as_plain_user(), pytest.raises(SourceError, match="permission denied: change its owner or mode"):
            list_source(FilesSource(path=str(plain_user_folder)))

    def test_name_that_is_not_utf8_is_refused(self, tmp_path):
        with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb") as file:
            file.write(b"x")
        with pytest.raises(SourceError, match="the name is not UTF-8: rename the file"):
            list_source(FilesSource(path=str(tmp_path)))

    @pytest.mark.s3
    def test_absent_bucket_is_refused(self, s3_server):
        with pytest.raises(SourceError, match="s3://no-such-bucket/x: it does not exist"):
            list_source(FilesSource(path="s3://no-such-bucket/x"))

    @pytest.mark.s3
    def test_absent_credentials_are_refused(self, s3_server, monkeypatch, tmp_path):
        import s3fs

        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            with pytest.raises(SourceError, match="no credentials for the store: set AWS_ACCESS_KEY_ID and"):
                list_source(FilesSource(path="s3://tokenmill-tests/x"))
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


class TestTables:
    def test_csv_columns_find_their_places(self, store):
        store.put("videos/a b.mp4", b"video")
        text = (
            "uri,sha256,size_bytes,num_frames,fps,width,height,caption,label,score,code,day\n"
            f'videos/a b.mp4,{SHA.upper()},5,120,29.97,640,360,"two\nlines",3,0.5,007,2024-01-02\n'
            f"videos/b.mp4,{SHA},,,,,,,4,,008,\n"
        )
        uri = store.put("list.csv", text.encode())
        first, second = list_source(TableSource(kind="table", path=uri)).to_pylist()
        assert json.loads(first.pop("metadata")) == {
            "label": 3,
            "score": 0.5,
            "code": "007",
            "day": "2024-01-02",
        }
        assert first == {
            "uri": f"{store.url}/videos/a b.mp4",
            "stamp": "",
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
        second, first = list_source(TableSource(kind="table", path=uri)).to_pylist()
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
        first, second = list_source(source).to_pylist()
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
        listing = list_source(TableSource(kind="table", path=uri, identity="uri"))
        inside = [f"{store.url}/{name}" for name in ("deep/x/a.mp4", "deep/x/b.mp4", "c.mp4")]
        assert listing["uri"].to_pylist() == sorted([*inside, "/d.mp4", "/e.mp4", "s3://k/../f.mp4"])

    def test_row_without_a_digest_has_the_stamp_and_size_of_its_file(self, store):
        store.put("a#1.mp4", b"12345")
        uri = store.put("list.csv", f"uri,sha256\na#1.mp4,\ngone.mp4,\nknown.mp4,{SHA}\n".encode())
        found, gone, known = list_source(TableSource(kind="table", path=uri)).to_pylist()
        assert found["stamp"] == list_source(FilesSource(path=f"{store.url}/a#1.mp4"))["stamp"][0].as_py()
        assert (found["size_bytes"], found["digest"]) == (5, None)
        assert (gone["stamp"], gone["size_bytes"]) == ("missing", None)
        assert (known["stamp"], known["size_bytes"]) == ("", None)

    def test_uri_in_an_unknown_store_does_not_end_the_listing(self, tmp_path):
        (tmp_path / "list.csv").write_text("uri\nfoo://x.mp4\n")
        listing = list_source(TableSource(kind="table", path=str(tmp_path / "list.csv")))
        assert listing.select(["uri", "stamp"]).to_pylist() == [{"uri": "foo://x.mp4", "stamp": ""}]

    def test_identity_by_uri_names_rows_without_looking(self, tmp_path):
        (tmp_path / "list.csv").write_text(f"uri,sha256\ns3://nowhere/a.mp4,\ns3://nowhere/b.mp4,{SHA}\n")
        source = TableSource(kind="table", path=str(tmp_path / "list.csv"), identity="uri")
        named = "uri:" + hashlib.sha256(b"s3://nowhere/a.mp4").hexdigest()
        assert list_source(source)["digest"].to_pylist() == [named, SHA]

    def test_glob_reads_every_table_from_its_own_folder(self, store):
        store.put("one/list.csv", b"uri\na.mp4\n")
        store.put("two/list.tsv", b"uri\tcaption\nb.mp4\tB, and more\n")
        listing = list_source(TableSource(kind="table", path=f"{store.url}/*/list.*", identity="uri"))
        assert names_of(listing, store.url) == ["one/a.mp4", "two/b.mp4"]
        assert listing["caption"].to_pylist() == [None, "B, and more"]

    def test_late_text_in_a_column_of_numbers_keeps_the_column_text(self, tmp_path):
        rows = [f"{i}.mp4,{i}" for i in range(200_000)]
        (tmp_path / "list.csv").write_text("uri,label\n" + "\n".join(rows) + "\nlast.mp4,none\n")
        listing = list_source(TableSource(kind="table", path=str(tmp_path / "list.csv"), identity="uri"))
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
            list_source(TableSource(kind="table", path=str(tmp_path / name)))
        assert "\n" not in str(caught.value)

    def test_text_that_is_not_utf8_is_refused(self, tmp_path):
        for name, text in (("t.csv", b"uri\n\xff.mp4\n"), ("t.jsonl", b'{"uri": "\xff"}\n')):
            (tmp_path / name).write_bytes(text)
            with pytest.raises(SourceError, match=rf"{name}: .*(?i:utf-?8)"):
                list_source(TableSource(kind="table", path=str(tmp_path / name)))

    def test_million_rows_fit_in_a_gigabyte(self, tmp_path):
        num_rows = 1_000_000
        numbers = pa.array(range(num_rows), pa.int64())
        names = pc.binary_join_element_wise("s3://bucket/videos/", numbers.cast(pa.string()), ".mp4", "")
        table = pa.table({"uri": names, "label": names, "score": numbers.cast(pa.float64())})
        pq.write_table(table, tmp_path / "list.parquet")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        listing = list_source(TableSource(kind="table", path=str(tmp_path / "list.parquet"), identity="uri"))
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
        listing = list_source(source)
        assert listing["uri"].to_pylist() == [f"{uri}#column=the%20video&row={i:02d}" for i in range(12)]
        assert [json.loads(text) for text in listing["metadata"].to_pylist()] == [{"n": i} for i in range(12)]
        assert set(listing["caption"].to_pylist()) == {"c"}
        assert len(set(listing["stamp"].to_pylist())) == 1
        assert listing["size_bytes"].null_count == 12

    def test_folder_of_parquet_files(self, store):
        for name in ("b.parquet", "a.parquet"):
            store.put(name, parquet_of(pa.table({"video": [b"1"], "sha256": [SHA]})))
        listing = list_source(BytesSource(kind="bytes", path=store.url))
        assert names_of(listing, store.url) == [
            "a.parquet#column=video&row=0",
            "b.parquet#column=video&row=0",
        ]
        assert listing["digest"].to_pylist() == [SHA, SHA]

    def test_column_of_paths_is_refused(self, tmp_path):
        pq.write_table(pa.table({"video": ["a.mp4"]}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=r"column 'video' is string, whole videos are binary: .*kind: table"):
            list_source(BytesSource(kind="bytes", path=str(tmp_path)))

    def test_absent_column_is_refused(self, tmp_path):
        pq.write_table(pa.table({"videos": [b"1"]}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=r"no column 'video' \(did you mean 'videos'\?\); found videos"):
            list_source(BytesSource(kind="bytes", path=str(tmp_path)))

    def test_other_file_is_refused(self, tmp_path):
        (tmp_path / "x.bin").write_bytes(b"0123456789" * 10)
        with pytest.raises(SourceError, match=r"x\.bin: not a Parquet file, or truncated"):
            list_source(BytesSource(kind="bytes", path=str(tmp_path / "x.bin")))


class TestWebDataset:
    def test_members_of_a_key_make_one_row(self, store):
        members = {
            "./d/0001.mp4": b"video one",
            "./d/0001.json": json.dumps({"caption": "from json", "n": 1, "none": None}).encode(),
            "./d/0002.left.MP4": b"left",
            "./d/0002.json": json.dumps({"caption": "kept", "n": 2}).encode(),
            "./d/0002.txt": "from text é\n".encode(),
            "./d/0002.jpg": b"no video",
            "./d/._0001.mp4": b"resource fork",
            "é #3&x=1.webm": b"three",
        }
        tar = tar_of(members)
        uri = store.put("shard 0.tar", tar)
        rows = list_source(WebDatasetSource(kind="webdataset", path=store.url)).to_pylist()
        assert [row["uri"].rpartition("&offset=")[0] for row in rows] == [
            f"{uri}#member=%C3%A9%20%233%26x%3D1.webm",
            f"{uri}#member=./d/0001.mp4",
            f"{uri}#member=./d/0002.left.MP4",
        ]
        assert [row["caption"] for row in rows] == [None, "from json", "from text é"]
        assert [row["metadata"] for row in rows] == [None, '{"n": 1}', '{"caption": "kept", "n": 2}']
        assert [row["size_bytes"] for row in rows] == [5, 9, 4]
        offset = int(rows[0]["uri"].rpartition("&offset=")[2].partition("&")[0])
        assert tar[offset : offset + 5] == b"three"

    def test_last_of_two_members_with_one_name_counts(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(
            tar_of([("a.mp4", b"old"), ("a.txt", b"old"), ("a.mp4", b"newer"), ("a.txt", b"n")])
        )
        (row,) = list_source(WebDatasetSource(kind="webdataset", path=str(tmp_path))).to_pylist()
        assert (row["size_bytes"], row["caption"]) == (5, "n")

    def test_broken_sidecar_costs_its_metadata_alone(self, tmp_path, caplog):
        tar = tar_of(
            {
                "a.mp4": b"1",
                "a.json": b"{broken",
                "b.mp4": b"2",
                "b.json": b"[1]",
                "c.mp4": b"",
                "c.txt": b"\xff",
            }
        )
        (tmp_path / "x.tar").write_bytes(tar)
        with caplog.at_level(logging.WARNING):
            listing = list_source(WebDatasetSource(kind="webdataset", path=str(tmp_path)))
        assert listing["metadata"].to_pylist() == [None] * 3
        assert [message.partition(" reason")[0] for message in caplog.messages] == [
            f"event=sidecar_ignored tar={tmp_path}/x.tar member={name}" for name in ("a.json", "b.json", "c.txt")
        ]

    @pytest.mark.parametrize(("compression", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
    def test_compressed_tar_is_refused(self, tmp_path, compression, name):
        with tarfile.open(tmp_path / f"x.tar.{compression}", f"w:{compression}") as tar:
            tar.addfile(tarfile.TarInfo("a.mp4"))
        with pytest.raises(SourceError, match=rf"x\.tar\.{compression}: compressed with {name};.* decompress it"):
            list_source(WebDatasetSource(kind="webdataset", path=str(tmp_path)))

    def test_tar_cut_anywhere_is_refused(self, tmp_path):
        tar = tar_of({"a.mp4": b"1" * 1000, "b.mp4": b"2" * 1000})
        for length in (0, 100, 700, 1600, 2100):
            (tmp_path / "x.tar").write_bytes(tar[:length])
            with pytest.raises(SourceError, match=r"x\.tar: truncated, damaged or no tar .*: copy it again"):
                list_source(WebDatasetSource(kind="webdataset", path=str(tmp_path)))

    def test_tar_damaged_in_the_middle_is_refused(self, tmp_path):
        tar = bytearray(tar_of({"a.mp4": b"1" * 512, "b.mp4": b"2" * 512}))
        tar[1024:1034] = b"\xff" * 10
        (tmp_path / "x.tar").write_bytes(tar)
        with pytest.raises(SourceError, match=r"truncated, damaged or no tar \(no header at byte 1024\)"):
            list_source(WebDatasetSource(kind="webdataset", path=str(tmp_path)))

    def test_tars_without_videos_are_refused(self, store):
        store.put("x.tar", tar_of({"a.jpg": b"1"}))
        with pytest.raises(SourceError, match=r"1 tars hold no member ending in \.mp4: name other tars"):
            list_source(WebDatasetSource(kind="webdataset", path=store.url, extensions=("mp4",)))


class TestSeveralSources:
    def test_first_source_wins_for_a_uri_listed_twice(self, store):
        store.put("a.mp4", b"1")
        store.put("b.mp4", b"2")
        table = store.put("list.csv", b"uri,caption\na.mp4,first\na.mp4,second\n")
        files, rows = FilesSource(path=store.url), TableSource(kind="table", path=table)
        assert list_sources([rows, files])["caption"].to_pylist() == ["first", None]
        assert list_sources([files, rows])["caption"].to_pylist() == [None, None]

    def test_listing_twice_gives_the_same_table(self, store):
        for i in range(30):
            store.put(f"{i * 7919 % 31}/{i}.mp4", bytes(i))
        store.put("x.tar", tar_of({f"{i}.mp4": bytes(i) for i in range(30, 0, -1)}))
        sources = [WebDatasetSource(kind="webdataset", path=store.url), FilesSource(path=store.url)]
        listing = list_sources(sources)
        assert listing["uri"].to_pylist() == sorted(listing["uri"].to_pylist())
        assert listing.num_rows == 60
        assert listing.equals(list_sources(sources))
        assert listing.equals(list_sources(sources[::-1]))
