"""Any listed video becomes a local file for as long as it is needed."""

import http.server
import io
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline import fetch
from tokenmill.pipeline.fetch import local_file
from tokenmill.pipeline.sources import list_sources
from tokenmill.schemas.errors import SourceError, StorageError
from tokenmill.schemas.recipe import BytesSource, FilesSource, Source, WebDatasetSource


def listing_of(source: Source) -> pa.Table:
    """The videos of one source."""
    return list_sources([source])


def content(uri: str, scratch: object) -> bytes:
    with local_file(uri, str(scratch)) as path, open(path, "rb") as stream:
        return stream.read()


def test_every_file_of_a_folder_is_fetched(store, tmp_path):
    videos = {f"{store.url}/{name}": os.urandom(1000) for name in ("a#b.mp4", "é ü%20.mp4", "x&row=1.mp4")}
    for uri, data in videos.items():
        store.put(uri.rpartition("/")[2], data)
    listed = listing_of(FilesSource(path=store.url))["uri"].to_pylist()
    assert {uri: content(uri, tmp_path) for uri in listed} == videos


def test_plain_local_file_is_given_as_it_is(tmp_path):
    (tmp_path / "a#b.mp4").write_bytes(b"x")
    for uri in (f"{tmp_path}/a#b.mp4", f"file://{tmp_path}/a#b.mp4"):
        with local_file(uri) as path:
            assert path == f"{tmp_path}/a#b.mp4"
    assert (tmp_path / "a#b.mp4").exists()


def test_local_name_that_looks_like_a_fragment_is_a_name(tmp_path):
    (tmp_path / "x.tar#member=a.mp4&offset=0&size=1").write_bytes(b"whole file")
    assert content(f"{tmp_path}/x.tar#member=a.mp4&offset=0&size=1", tmp_path) == b"whole file"


def test_copy_keeps_the_suffix_and_goes_when_it_was_used(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    uri = "memory:///fetch/clip.one.MOV"
    fsspec.filesystem("memory").pipe_file("/fetch/clip.one.MOV", b"12345")
    with local_file(uri, str(scratch)) as path:
        assert os.path.dirname(path) == str(scratch)
        assert path.endswith(".MOV")
    assert list(scratch.iterdir()) == []
    with pytest.raises(KeyError, match="of the caller"), local_file(uri, str(scratch)):
        raise KeyError("of the caller")
    assert list(scratch.iterdir()) == []


def test_member_larger_than_one_chunk_is_whole(store, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 1000)
    data = os.urandom(8192)
    uri = store.put("x.tar", data) + "#member=a.mp4&offset=512&size=4096"
    assert content(uri, tmp_path) == data[512 : 512 + 4096]


class _PlainHandler(http.server.BaseHTTPRequestHandler):
    """Serves one video, whole: it knows no ranges."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path.startswith("/a.mp4") else 404)
        self.send_header("Content-Length", "5")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"video")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def http_url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _PlainHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_web_server_without_ranges_is_enough(http_url, tmp_path):
    with local_file(f"{http_url}/a.mp4?key=x.y", str(tmp_path)) as path:
        assert path.endswith(".mp4")
        assert Path(path).read_bytes() == b"video"
    with pytest.raises(SourceError, match=r"gone\.mp4: it does not exist: check the path"):
        content(f"{http_url}/gone.mp4", tmp_path)


def test_full_disk_is_the_storages_fault(tmp_path, monkeypatch):
    fsspec.filesystem("memory").pipe_file("/full/a.mp4", b"x" * 100_000)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **_: open("/dev/full", "wb", buffering=0))
    for uri in ("memory:///full/a.mp4", "memory:///full/a.mp4#member=a.mp4&offset=0&size=9"):
        with pytest.raises(StorageError, match=f"^{tmp_path}: the disk is full: free some space"):
            content(uri, tmp_path)


def test_every_member_of_a_tar_is_fetched_by_its_range(store, tmp_path):
    videos = {f"d/{i} é#.mp4": os.urandom(300 * i + 1) for i in range(5)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in videos.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    store.put("shard #1.tar", buffer.getvalue())
    listed = listing_of(WebDatasetSource(kind="webdataset", path=store.url))["uri"].to_pylist()
    assert [content(uri, tmp_path) for uri in listed] == list(videos.values())


def test_every_cell_of_a_column_is_fetched(store, tmp_path):
    videos = [os.urandom(100 + i) for i in range(25)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"the video": videos, "n": range(25)}), buffer, row_group_size=10)
    store.put("part #1.parquet", buffer.getvalue())
    source = BytesSource(kind="bytes", path=store.url, video_column="the video")
    listed = listing_of(source)["uri"].to_pylist()
    assert [content(uri, tmp_path) for uri in listed] == videos
    assert [content(uri, tmp_path) for uri in listed[::-1]] == videos[::-1]


def test_cell_of_a_row_group_too_large_to_hold_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "HELD_ROW_GROUP_BYTES", 0)
    videos = [os.urandom(100) for _ in range(7)]
    pq.write_table(pa.table({"video": videos}), tmp_path / "x.parquet", row_group_size=4)
    uris = [f"{tmp_path}/x.parquet#column=video&row={i}" for i in range(7)]
    assert [content(uri, tmp_path) for uri in uris] == videos


def test_rows_of_one_group_decode_it_once(tmp_path, monkeypatch):
    decoded = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self, group, **options):
        decoded.append(group)
        return read_row_group(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    pq.write_table(pa.table({"video": [b"%d" % i for i in range(20)]}), tmp_path / "x.parquet", row_group_size=10)
    for row in range(20):
        assert content(f"{tmp_path}/x.parquet#column=video&row={row:02d}", tmp_path) == b"%d" % row
    assert decoded == [0, 1]


def test_rewritten_table_is_read_anew(store, tmp_path):
    def put(video: bytes) -> str:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"video": [video]}), buffer)
        return store.put("x.parquet", buffer.getvalue()) + "#column=video&row=0"

    assert content(put(b"old"), tmp_path) == b"old"
    assert content(put(b"newer"), tmp_path) == b"newer"


def test_absent_file_is_refused(store, tmp_path):
    store.put("a.mp4", b"x")
    for fragment in ("", "#member=a.mp4&offset=0&size=5", "#column=video&row=0"):
        with pytest.raises(SourceError, match=r"gone.*: it does not exist: check the path$"):
            content(f"{store.url}/gone.mp4{fragment}", tmp_path)


def test_folder_is_no_video(tmp_path):
    with pytest.raises(SourceError, match="it is a folder, a file was expected: name a file"):
        content(str(tmp_path), tmp_path)


def test_unknown_protocol_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"^foo://a\.mp4: Protocol not known: foo: accepted are local paths"):
        content("foo://a.mp4", tmp_path)


def test_tar_that_became_shorter_is_refused(store, tmp_path):
    uri = store.put("x.tar", b"0" * 1000) + "#member=a.mp4&offset=900&size=300"
    with pytest.raises(SourceError, match="the tar ends 200 bytes too early: it is truncated, or has changed"):
        content(uri, tmp_path)
    assert list(tmp_path.glob("tokenmill-*")) == []


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        ("column=video&row=2", "the file has 2 rows: it has changed since it was listed"),
        ("column=video&row=1", "the cell is empty: remove the row, or put a video into it"),
        ("column=film&row=0", "no column 'film'; found video"),
    ],
)
def test_cell_without_a_video_is_refused(tmp_path, fragment, message):
    pq.write_table(pa.table({"video": [b"x", None]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=message):
        content(f"{tmp_path}/x.parquet#{fragment}", tmp_path)


def test_damaged_table_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(SourceError, match=r"x\.parquet#column=video&row=0: Parquet magic bytes not found"):
        content(f"{tmp_path}/x.parquet#column=video&row=0", tmp_path)


def test_scratch_folder_that_is_not_there_is_the_storages_fault(store, tmp_path):
    uri = store.put("x.tar", b"0" * 1000) + "#member=a.mp4&offset=0&size=300"
    with pytest.raises(StorageError, match="/no scratch: no such file: check the path"):
        content(uri, tmp_path / "no scratch")
