"""Stores for the tests: a folder, fsspec's memory, and an S3 server on 127.0.0.1."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

BUCKET = "tokenmill-tests"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A fresh folder at `url`, on any filesystem."""

    url: str

    def put(self, name: str, data: bytes) -> str:
        """The URI of the file `name`, written with `data`."""
        filesystem, path = fsspec.core.url_to_fs(f"{self.url}/{name}")
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, data)
        return f"{self.url}/{name}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server with one empty bucket; the environment points every S3 client to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of moto's own imports
        from moto.server import ThreadedMotoServer
    import s3fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield f"http://{host}:{port}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder on each kind of store."""
    if request.param == "local":
        return Store(url=str(tmp_path / "store"))
    if request.param == "memory":
        return Store(url=f"memory:///store-{next(_numbers)}")
    request.getfixturevalue("s3_server")
    return Store(url=f"s3://{BUCKET}/store-{next(_numbers)}")
