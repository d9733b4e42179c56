"""Sources list what they hold, the same way wherever it is kept, and refuse in one line."""

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from tokenmill.pipeline.sources import list_sources
from tokenmill.schemas.errors import SourceError
from tokenmill.schemas.recipe import FilesSource, Source, TableSource, WebDatasetSource
from tokenmill.schemas.tables import SOURCE_SCHEMA

SHA = hashlib.sha256(b"video").hexdigest()
NOBODY = 65534
ODD_NAMES = ("a#b.mp4", "sub/naïve café.MOV", "sub/x%20y&z=1.webm")


def listing_of(source: Source) -> pa.Table:
    """The videos of one source."""
    return list_sources([source])


def names_of(listing: pa.Table, base: str) -> list[str]:
    return [uri.removeprefix(base + "/") for uri in listing["uri"].to_pylist()]


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
        listing = listing_of(FilesSource(path=store.url))
        assert listing.schema == SOURCE_SCHEMA
        assert names_of(listing, store.url) == sorted(ODD_NAMES)
        assert listing["size_bytes"].to_pylist() == [len(name.encode()) for name in sorted(ODD_NAMES)]
        assert listing["digest"].null_count == 3

    def test_stamp_stays_while_a_file_stays_and_changes_with_it(self, store):
        store.put("a.mp4", b"one")
        source = FilesSource(path=store.url)
        first = listing_of(source)["stamp"].to_pylist()
        assert first == listing_of(source)["stamp"].to_pylist()
        store.put("a.mp4", b"two")
        assert first != listing_of(source)["stamp"].to_pylist()

    def test_glob_alone_decides_what_is_a_video(self, store):
        for name in ("a.mp4", "b.bin", "sub/c.mp4", ".d.bin"):
            store.put(name, b"x")
        assert names_of(listing_of(FilesSource(path=f"{store.url}/*")), store.url) == ["a.mp4", "b.bin"]
        assert names_of(listing_of(FilesSource(path=f"{store.url}/**/*.mp4")), store.url) == [
            "a.mp4",
            "sub/c.mp4",
        ]
        assert names_of(listing_of(FilesSource(path=f"{store.url}/.*.bin")), store.url) == [".d.bin"]

    def test_one_file_needs_no_extension(self, store):
        uri = store.put("#1 clip", b"x")
        assert listing_of(FilesSource(path=uri))["uri"].to_pylist() == [uri]

    def test_folder_whose_name_looks_like_a_glob_is_that_folder(self, tmp_path):
        (tmp_path / "[1] *").mkdir()
        (tmp_path / "[1] *" / "a.mp4").write_bytes(b"x")
        listing = listing_of(FilesSource(path=str(tmp_path / "[1] *")))
        assert listing["uri"].to_pylist() == [str(tmp_path / "[1] *" / "a.mp4")]

    def test_extensions_are_the_recipes(self, store):
        store.put("a.mp4", b"x")
        store.put("b.Y4M", b"x")
        assert names_of(listing_of(FilesSource(path=store.url, extensions=(".y4m",))), store.url) == ["b.Y4M"]

    def test_local_paths_become_absolute(self, tmp_path, monkeypatch):
        (tmp_path / "a.mp4").write_bytes(b"x")
        monkeypatch.chdir(tmp_path)
        expected = [str(tmp_path / "a.mp4")]
        for path in (".", "a.mp4", "*.mp4", f"file://{tmp_path}"):
            assert listing_of(FilesSource(path=path))["uri"].to_pylist() == expected

    def test_link_to_nothing_is_listed_as_missing(self, tmp_path):
        (tmp_path / "a.mp4").symlink_to(tmp_path / "gone.mp4")
        assert listing_of(FilesSource(path=str(tmp_path)))["stamp"].to_pylist() == ["missing"]

    def test_absent_folder_is_refused(self, store):
        store.put("a.mp4", b"x")
        with pytest.raises(SourceError, match=r"/nowhere: it does not exist: check the path$"):
            listing_of(FilesSource(path=f"{store.url}/nowhere"))

    def test_folder_without_videos_is_refused_with_what_it_has(self, store):
        store.put("a.txt", b"x")
        store.put("b.txt", b"x")
        with pytest.raises(SourceError, match=r"found 2 files, none of them ending in \.mp4, \.avi: name another"):
            listing_of(FilesSource(path=store.url, extensions=("mp4", "avi")))

    def test_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(SourceError, match="found an empty folder: name another folder"):
            listing_of(FilesSource(path=str(tmp_path)))

    def test_glob_without_a_file_is_refused(self, store):
        store.put("sub/a.mp4", b"x")
        with pytest.raises(SourceError, match="the glob matches nothing: check it"):
            listing_of(FilesSource(path=f"{store.url}/*.mp4"))
        with pytest.raises(SourceError, match="the glob matches 1 folders but no file"):
            listing_of(FilesSource(path=f"{store.url}/s*"))

    @pytest.mark.parametrize(("name", "kind"), [("list.csv", "table"), ("x.parquet", "table"), ("x.tar", "webdataset")])
    def test_table_or_tar_is_no_video(self, tmp_path, name, kind):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(SourceError, match=f"{name}: not a video: .* write kind: {kind}"):
            listing_of(FilesSource(path=str(tmp_path / name)))

    def test_unknown_protocol_is_refused(self):
        with pytest.raises(SourceError, match=r"^foo://x: Protocol not known: foo: accepted are local paths and URLs"):
            listing_of(FilesSource(path="foo://x"))

    def test_chained_url_is_refused(self):
        with pytest.raises(SourceError, match="chained URLs cannot be listed: unpack the files"):
            listing_of(FilesSource(path="zip://*.mp4::memory://a.zip"))

    def test_unreadable_folder_is_refused_though_others_have_videos(self, plain_user_folder):
        (plain_user_folder / "a.mp4").write_bytes(b"x")
        (plain_user_folder / "locked").mkdir(mode=0)
        with as_plain_user(), pytest.raises(SourceError, match="permission denied: change its owner or mode"):
            listing_of(FilesSource(path=str(plain_user_folder)))

    def test_name_that_is_not_utf8_is_refused(self, tmp_path):
        with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb") as file:
            file.write(b"x")
        with pytest.raises(SourceError, match="the name is not UTF-8: rename the file"):
            listing_of(FilesSource(path=str(tmp_path)))

    @pytest.mark.s3
    def test_absent_bucket_is_refused(self, s3_server):
        with pytest.raises(SourceError, match="s3://no-such-bucket/x: it does not exist"):
            listing_of(FilesSource(path="s3://no-such-bucket/x"))

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
                listing_of(FilesSource(path="s3://tokenmill-tests/x"))
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


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
        rows = listing_of(WebDatasetSource(kind="webdataset", path=store.url)).to_pylist()
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
        (row,) = listing_of(WebDatasetSource(kind="webdataset", path=str(tmp_path))).to_pylist()
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
            listing = listing_of(WebDatasetSource(kind="webdataset", path=str(tmp_path)))
        assert listing["metadata"].to_pylist() == [None] * 3
        assert [message.partition(" reason")[0] for message in caplog.messages] == [
            f"event=sidecar_ignored tar={tmp_path}/x.tar member={name}" for name in ("a.json", "b.json", "c.txt")
        ]

    @pytest.mark.parametrize(("compression", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
    def test_compressed_tar_is_refused(self, tmp_path, compression, name):
        with tarfile.open(tmp_path / f"x.tar.{compression}", f"w:{compression}") as tar:
            tar.addfile(tarfile.TarInfo("a.mp4"))
        with pytest.raises(SourceError, match=rf"x\.tar\.{compression}: compressed with {name};.* decompress it"):
            listing_of(WebDatasetSource(kind="webdataset", path=str(tmp_path)))

    def test_tar_cut_anywhere_is_refused(self, tmp_path):
        tar = tar_of({"a.mp4": b"1" * 1000, "b.mp4": b"2" * 1000})
        for length in (0, 100, 700, 1600, 2100):
            (tmp_path / "x.tar").write_bytes(tar[:length])
            with pytest.raises(SourceError, match=r"x\.tar: truncated, damaged or no tar .*: copy it again"):
                listing_of(WebDatasetSource(kind="webdataset", path=str(tmp_path)))

    def test_tar_damaged_in_the_middle_is_refused(self, tmp_path):
        tar = bytearray(tar_of({"a.mp4": b"1" * 512, "b.mp4": b"2" * 512}))
        tar[1024:1034] = b"\xff" * 10
        (tmp_path / "x.tar").write_bytes(tar)
        with pytest.raises(SourceError, match=r"truncated, damaged or no tar \(no header at byte 1024\)"):
            listing_of(WebDatasetSource(kind="webdataset", path=str(tmp_path)))

    def test_tars_without_videos_are_refused(self, store):
        store.put("x.tar", tar_of({"a.jpg": b"1"}))
        with pytest.raises(SourceError, match=r"1 tars hold no member ending in \.mp4: name other tars"):
            listing_of(WebDatasetSource(kind="webdataset", path=store.url, extensions=("mp4",)))


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
