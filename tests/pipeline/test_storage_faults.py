"""Folders on S3 servers that fail: the right outcome or one error, never a wrong answer."""

import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.config import conf

from tokenmill.pipeline import retried_s3
from tokenmill.pipeline.retried_s3 import RetriedS3
from tokenmill.pipeline.retries import RetryPolicy, retry_counts
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import StorageError

from ..conftest import BUCKET
from ..faults.proxy import FaultProxy

pytestmark = pytest.mark.s3

DATA, OTHER = b"d" * 3000, b"o" * 2000


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetriedS3, "policy", RetryPolicy(attempts=4, first_wait_s=0.01))


@pytest.fixture
def folder(fault_proxy: FaultProxy, s3_url: str) -> Folder:
    return Folder(s3_url)


def read_as_stream(folder: Folder, name: str) -> bytes:
    with folder.open(name) as stream:
        return stream.read(10) + stream.read()


def published(folder: Folder, path: Path) -> str:
    path.write_bytes(DATA)
    return folder.publish(str(path), "data/shard", 1).name


PUBLISHED = "data/shard-e60391977462.bin"
# In this order: what each operation must return, and the next finds what the earlier ones left.
OPERATIONS: dict[str, tuple[Callable[[Folder, Path], Any], Any]] = {
    "create": (lambda f, _: f.create("m/a.json", DATA), True),
    "create what exists": (lambda f, _: f.create("m/a.json", OTHER), False),
    "create unguarded": (lambda f, _: f.create_unguarded("m/b.json", DATA), True),
    "create unguarded what exists": (lambda f, _: f.create_unguarded("m/b.json", OTHER), False),
    "exists": (lambda f, _: f.exists("m/a.json"), True),
    "not exists": (lambda f, _: f.exists("m/none.json"), False),
    "read": (lambda f, _: f.read("m/a.json"), DATA),
    "read as stream": (lambda f, _: read_as_stream(f, "m/a.json"), DATA),
    "replace": (lambda f, _: f.replace("m/b.json", OTHER), None),
    "read what was replaced": (lambda f, _: f.read("m/b.json"), OTHER),
    "publish": (lambda f, scratch: published(f, scratch / "x.bin"), PUBLISHED),
    "read what was published": (lambda f, _: f.read(PUBLISHED), DATA),
    "can create": (lambda f, _: f.can_create(), True),
    "list": (lambda f, _: f.list(""), [PUBLISHED, "m/a.json", "m/b.json"]),
    "find": (lambda f, _: [file.size_bytes for file in f.find("")], [3000, 3000, 2000]),
    "remove": (lambda f, _: f.remove("m/b.json"), None),
    "remove what is gone": (lambda f, _: f.remove("m/b.json"), None),
    "list what is left": (lambda f, _: f.list("m"), ["m/a.json"]),
}
HARMS: dict[str, dict[str, Any]] = {
    "internal error": {"harm": "status"},
    "refused": {"harm": "refuse"},
    "answer lost": {"harm": "lose_answer"},
    "upload cut": {"harm": "cut_upload", "method": "PUT"},
    "download cut": {"harm": "cut_download", "method": "GET"},
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_operation_outlives_a_fault_that_passes(
    folder: Folder, fault_proxy: FaultProxy, tmp_path: Path, harm: str
) -> None:
    num_harmed = 0
    for name, (operation, outcome) in OPERATIONS.items():
        fault_proxy.clear()
        fault_proxy.inject(**HARMS[harm], times=2)
        assert operation(folder, tmp_path) == outcome, name
        num_harmed += fault_proxy.harmed.total()
    assert num_harmed >= 10


GAVE_UP = re.compile(r"s3://[^:]+: .*; gave up after 2 attempts in \d\.\d s\)?.*")


def outcome_or_error(operation: Callable[[Folder, Path], Any], folder: Folder, scratch: Path) -> Any:
    try:
        return operation(folder, scratch)
    except StorageError as error:
        return str(error)


@pytest.mark.parametrize("harm", ["internal error", "answer lost", "upload cut"])
def test_every_operation_that_a_lasting_fault_stops_is_one_error_and_right_the_next_time(
    folder: Folder, fault_proxy: FaultProxy, tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetriedS3, "policy", RetryPolicy(attempts=2, first_wait_s=0.01))
    num_stopped = 0
    for name, (operation, outcome) in OPERATIONS.items():
        fault_proxy.clear()
        fault_proxy.inject(**HARMS[harm])
        said = outcome_or_error(operation, folder, tmp_path)
        assert said == outcome or (isinstance(said, str) and GAVE_UP.fullmatch(said)), name
        num_stopped += said != outcome
        fault_proxy.clear()
        again = operation(folder, tmp_path)
        # Our own file from before the error is somebody's, to one who looks before he writes.
        assert again == outcome or (name == "create unguarded" and folder.read("m/b.json") == DATA), name
    assert num_stopped >= 5


def test_under_many_random_faults_nothing_is_lost_and_nothing_is_wrong(folder: Folder, fault_proxy: FaultProxy) -> None:
    for harm in HARMS.values():
        fault_proxy.inject(**harm, probability=0.1)
    numbers, expected = random.Random(0), {}
    for _ in range(40):
        name, data = f"m/{numbers.randrange(15)}", numbers.randbytes(500)
        try:
            assert folder.create(name, data) == (name not in expected)
            expected.setdefault(name, data)
        except StorageError:  # it may have taken effect or not; only the store knows
            expected.pop(name, None)
            folder.remove(name)
    assert fault_proxy.harmed.total() > 20
    fault_proxy.clear()
    assert {name: folder.read(name) for name in folder.list("m")} == expected


@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_a_writer_whose_answer_was_lost_knows_its_own_bytes(
    folder: Folder, fault_proxy: FaultProxy, num_lost: int
) -> None:
    fault_proxy.inject("lose_answer", method="PUT", times=num_lost)
    assert folder.create("m.json", DATA)
    assert [method for method, _ in fault_proxy.seen].count("PUT") == num_lost + 1
    assert not folder.create("m.json", OTHER)
    assert folder.read("m.json") == DATA


def race(url: str, num_clients: int) -> None:
    """16 writers, of `num_clients` filesystems, create one name: one wins, and its bytes are there."""
    folders = [Folder(url) for _ in range(num_clients)]
    assert len({id(folder.fs) for folder in folders}) == num_clients
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: folders[i % num_clients].create("m.json", b"%d" % i * 100), range(16)))
    assert won.count(True) == 1
    assert folders[0].read("m.json") == b"%d" % won.index(True) * 100


def test_of_16_racing_writers_one_wins(any_s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf, "s3", {"endpoint_url": any_s3, "skip_instance_cache": True})
    race(s3_url, num_clients=16)


def test_of_16_racing_writers_one_wins_although_answers_are_lost(
    fault_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetriedS3, "policy", RetryPolicy(attempts=20, first_wait_s=0.01, longest_wait_s=0.1))
    monkeypatch.setitem(conf, "s3", {"endpoint_url": fault_proxy.url, "skip_instance_cache": True})
    fault_proxy.inject("lose_answer", probability=0.5)
    race(s3_url, num_clients=4)
    assert fault_proxy.harmed.total() > 20


def test_a_conflict_with_a_writer_of_this_moment_is_tried_again(folder: Folder, fault_proxy: FaultProxy) -> None:
    before = retry_counts()
    fault_proxy.inject("status", method="PUT", status=409, code="ConditionalRequestConflict", times=2)
    assert folder.create("m.json", DATA)
    assert retry_counts() - before == {"conflict": 2}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", r"permission denied \(injected AccessDenied\): check the credentials, and what they may"),
        (400, "InvalidArgument", "injected InvalidArgument"),
        (404, "NoSuchBucket", "injected NoSuchBucket"),
        (501, "NotImplemented", "injected NotImplemented"),
    ],
)
def test_a_lasting_refusal_is_said_at_once(
    folder: Folder, fault_proxy: FaultProxy, status: int, code: str, message: str
) -> None:
    fault_proxy.inject("status", status=status, code=code)
    with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/store-\d+/m\.json: .*{message}"):
        folder.replace("m.json", DATA)
    assert len(fault_proxy.seen) == 1


def test_attempts_are_ours_alone(folder: Folder, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject("status", status=503, code="SlowDown")
    for operation in (lambda: folder.read("m.json"), lambda: folder.replace("m.json", DATA), lambda: folder.list("m")):
        fault_proxy.seen.clear()
        with pytest.raises(StorageError, match=r"(injected SlowDown|Service Unavailable); gave up after 4 attempts"):
            operation()
        assert len(fault_proxy.seen) == 4


def test_a_slow_answer_is_asked_for_again(
    fault_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"endpoint_url": fault_proxy.url, "config_kwargs": {"read_timeout": 0.5}}
    monkeypatch.setitem(conf, "s3", options)
    before, folder = retry_counts(), Folder(s3_url)
    fault_proxy.inject("delay", delay_s=2, times=1)
    assert folder.create("m.json", DATA)
    assert retry_counts() - before == {"timeout": 1}


def test_a_stale_listing_hides_what_is_new_and_a_commit_still_fails_to_repeat(
    folder: Folder, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject("stale_listing")
    assert folder.list("m") == []
    assert folder.create("m/a.json", DATA)
    assert folder.list("m") == []
    assert not folder.create("m/a.json", OTHER)
    assert folder.exists("m/a.json")


@pytest.fixture
def plain_folder(s3_server: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder on a server that believes what it is told, and the proxy before it."""
    with FaultProxy(s3_server).running() as proxy:
        monkeypatch.setitem(conf, "s3", {"endpoint_url": proxy.url})
        yield Folder(s3_url), proxy


def test_a_store_that_ignores_conditions_is_found_out(plain_folder: tuple[Folder, FaultProxy]) -> None:
    folder, proxy = plain_folder
    proxy.inject("drop_conditions")
    assert not folder.can_create()
    assert folder.list("") == []
    assert folder.create_unguarded("m.json", DATA)
    assert not folder.create_unguarded("m.json", OTHER)
    assert folder.read("m.json") == DATA


def test_an_upload_of_which_the_store_keeps_half_is_repeated(
    plain_folder: tuple[Folder, FaultProxy], tmp_path: Path
) -> None:
    folder, proxy = plain_folder
    for operation in ("create", "create unguarded", "replace", "publish"):
        proxy.inject("halve_upload", method="PUT", times=2)
        call, outcome = OPERATIONS[operation]
        assert call(folder, tmp_path) == outcome
    assert proxy.harmed["halve_upload"] == 8
    assert folder.read("m/a.json") == folder.read(PUBLISHED) == DATA
    assert folder.read("m/b.json") == OTHER


def test_an_upload_that_is_never_whole_is_an_error_and_leaves_nothing(
    plain_folder: tuple[Folder, FaultProxy], tmp_path: Path
) -> None:
    folder, proxy = plain_folder
    proxy.inject("halve_upload", method="PUT")
    for operation in ("create", "create unguarded", "replace", "publish"):
        with pytest.raises(StorageError, match=r"the store holds (1500 of 3|1000 of 2)000 bytes sent; gave up after 3"):
            OPERATIONS[operation][0](folder, tmp_path)
    assert folder.list("") == []


@pytest.fixture
def large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three parts of a multipart upload."""
    monkeypatch.setattr(retried_s3, "PART_BYTES", 5 << 20)
    path = tmp_path / "large.bin"
    path.write_bytes(random.Random(0).randbytes(12 << 20))
    return path


def uploads_left(folder: Folder) -> list[str]:
    uploads = folder.fs.list_multipart_uploads(BUCKET)
    return [upload["Key"] for upload in uploads if upload["Key"].startswith(folder.root.partition("/")[2])]


@pytest.mark.parametrize(
    ("harm", "method", "target"),
    [
        ("lose_answer", "PUT", "partNumber=1"),
        ("cut_upload", "PUT", "partNumber=3"),
        ("status", "POST", "uploadId"),
        ("lose_answer", "POST", "uploadId"),
    ],
)
def test_a_large_file_is_published_whole_in_spite_of_faults(
    folder: Folder, fault_proxy: FaultProxy, large_file: Path, harm: str, method: str, target: str
) -> None:
    fault_proxy.inject(harm, method=method, target=target, times=1)
    entry = folder.publish(str(large_file), "data/large", 1)
    assert fault_proxy.harmed.total() == 1
    assert sum("partNumber" in target for _, target in fault_proxy.seen) >= 3
    assert folder.read(entry.name) == large_file.read_bytes()
    assert uploads_left(folder) == []


@pytest.mark.parametrize("target", ["partNumber=2", "uploadId=[^&]*$"])
def test_a_large_file_that_cannot_be_published_is_absent_and_leaves_no_upload(
    folder: Folder, fault_proxy: FaultProxy, large_file: Path, target: str
) -> None:
    fault_proxy.inject("status", method="PUT|POST", target=target)
    with pytest.raises(StorageError, match="injected InternalError"):
        folder.publish(str(large_file), "data/large", 1)
    fault_proxy.clear()
    assert folder.list("") == []
    assert uploads_left(folder) == []
