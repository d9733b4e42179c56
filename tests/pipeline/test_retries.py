"""Faults that may pass are asked about again, within bounds; others never. Options reach every filesystem."""

import http.server
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError, SSLError
from fsspec.config import conf
from s3fs.errors import translate_boto_error

from tokenmill.pipeline.fetch import local_file
from tokenmill.pipeline.places import filesystem_of
from tokenmill.pipeline.retries import (
    RetryPolicy,
    apply_storage_options,
    retry_counts,
    transient_kind,
    with_retries,
)
from tokenmill.schemas.errors import SourceError, StorageError

QUICK = RetryPolicy(attempts=4, first_wait_s=0.01)


def answered(status: int, code: str) -> Exception:
    """The error that s3fs makes of such an answer."""
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "PutObject"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered(503, "SlowDown"), "throttled"),
        (answered(503, "503"), "throttled"),
        (answered(429, "TooManyRequests"), "throttled"),
        (answered(500, "InternalError"), "server_error"),
        (answered(502, "502"), "server_error"),
        (answered(504, "504"), "server_error"),
        (answered(400, "RequestTimeout"), "timeout"),
        (answered(400, "IncompleteBody"), "truncated"),
        (answered(409, "ConditionalRequestConflict"), "conflict"),
        (ConnectionResetError(104, "reset"), "connection"),
        (EndpointConnectionError(endpoint_url="http://x"), "connection"),
        (ReadTimeoutError(endpoint_url="http://x"), "timeout"),
        (TimeoutError(), "timeout"),
        (answered(404, "NoSuchKey"), None),
        (answered(404, "NoSuchBucket"), None),
        (answered(404, "404"), None),
        (answered(403, "AccessDenied"), None),
        (answered(403, "SignatureDoesNotMatch"), None),
        (answered(400, "InvalidArgument"), None),
        (answered(409, "BucketNotEmpty"), None),
        (answered(412, "PreconditionFailed"), None),
        (answered(501, "NotImplemented"), None),
        (NoCredentialsError(), None),
        (SSLError(endpoint_url="https://x", error="certificate verify failed"), None),
        (FileNotFoundError("x"), None),
        (PermissionError("x"), None),
        (OSError(28, "No space left on device"), None),
    ],
    ids=str,
)
def test_only_faults_that_may_pass_are_transient(error: Exception, kind: str | None) -> None:
    assert transient_kind(error) == kind


def test_a_call_is_made_again_until_it_succeeds_and_each_time_is_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = iter([answered(503, "SlowDown"), ConnectionResetError(104, "reset by peer")])

    def call() -> str:
        for fault in faults:
            raise fault
        return "done"

    before = retry_counts()
    assert with_retries(call, "put s3://b/k", QUICK) == "done"
    assert retry_counts() - before == Counter(throttled=1, connection=1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert caplog.messages[0].startswith("event=retry kind=throttled attempt=1 wait_s=0.0")
    assert caplog.messages[1].endswith("request='put s3://b/k' reason='[Errno 104] reset by peer'")


def test_a_lasting_fault_is_raised_at_once() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise FileNotFoundError("gone")

    before = retry_counts()
    with pytest.raises(FileNotFoundError, match="gone"):
        with_retries(call, "get", QUICK)
    assert len(calls) == 1
    assert retry_counts() == before


@pytest.mark.parametrize(
    ("policy", "num_calls"),
    [(QUICK, 4), (RetryPolicy(attempts=1), 1), (RetryPolicy(attempts=50, first_wait_s=1, total_s=0.4), 1)],
)
def test_attempts_and_seconds_are_bounded(policy: RetryPolicy, num_calls: int) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError, match="no answer") as raised:
        with_retries(call, "get", policy)
    assert len(calls) == num_calls
    assert raised.value.__notes__[0].startswith(f"gave up after {num_calls} attempts in 0.")


def test_waits_double_up_to_a_limit_and_differ() -> None:
    policy = RetryPolicy(first_wait_s=1, longest_wait_s=8)
    for attempt, longest in enumerate([1, 2, 4, 8, 8, 8], 1):
        waits = {policy.wait_s(attempt) for _ in range(20)}
        assert longest / 2 <= min(waits) < max(waits) <= longest


@pytest.fixture
def configured() -> Iterator[None]:
    """Leaves fsspec's own configuration as it was."""
    yield
    apply_storage_options({})


@pytest.mark.usefixtures("configured")
def test_options_reach_filesystems_opened_from_now_on_until_others_take_their_place() -> None:
    before = {protocol: options for protocol, options in conf.items() if options}
    apply_storage_options({"s3": {"endpoint_url": "http://127.0.0.1:1", "key": "a"}, "memory": {}})
    first, _ = filesystem_of("s3://bucket/x")
    assert (first.endpoint_url, first.key) == ("http://127.0.0.1:1", "a")
    assert fsspec.filesystem("s3").endpoint_url == "http://127.0.0.1:1"
    apply_storage_options({"s3": {"endpoint_url": "http://127.0.0.1:2"}})
    second, path = filesystem_of("s3a://bucket/x")
    assert (second.endpoint_url, second.key, path) == ("http://127.0.0.1:2", None, "bucket/x")
    apply_storage_options({})
    assert filesystem_of("s3://bucket/x")[0].endpoint_url is None
    assert {protocol: options for protocol, options in conf.items() if options} == before


@pytest.mark.usefixtures("configured")
def test_what_the_user_configured_for_fsspec_stays_where_the_recipe_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf, "http", {"block_size": 5, "encoded": True})
    apply_storage_options({"http": {"block_size": 7}})
    assert fsspec.filesystem("http").storage_options == {"block_size": 7, "encoded": True}
    apply_storage_options({})
    assert conf["http"] == {"block_size": 5, "encoded": True}


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s33": {}}, r"^storage\.s33: unknown protocol \(did you mean 's3'\?\); accepted are .*, s3, s3a, "),
        (
            {"s3": {"endpoint": "http://x"}},
            r"^storage\.s3\.endpoint: unknown option \(did you mean 'endpoint_url'\?\); accepted are anon, .*profile",
        ),
        ({"file": {"secret": "hush"}}, r"^storage\.file\.secret: unknown option; accepted are "),
        ({"gs": {}}, r"^storage\.gs: Please install gcsfs"),
    ],
)
def test_an_unknown_protocol_or_option_is_refused_and_nothing_is_applied(options: dict, message: str) -> None:
    before = {protocol: options for protocol, options in conf.items() if options}
    with pytest.raises(StorageError, match=message) as raised:
        apply_storage_options({"memory": {}, **options})
    assert "hush" not in str(raised.value)
    assert conf == before


class _FlakyHandler(http.server.BaseHTTPRequestHandler):
    """Serves one video, after as many faults as the path says."""

    seen: Counter[str]

    def do_GET(self) -> None:
        self.seen[self.path] += 1
        num_faults, _, name = self.path.strip("/").partition("-")
        if self.seen[self.path] > int(num_faults):
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"video")
        elif name == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"vi")
        else:
            self.send_error(503)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def flaky_url() -> Iterator[str]:
    handler = type("Handler", (_FlakyHandler,), {"seen": Counter()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["cut", "unavailable"])
def test_a_web_server_is_asked_three_times_for_a_video(flaky_url: str, tmp_path: Path, name: str) -> None:
    with local_file(f"{flaky_url}/2-{name}", str(tmp_path)) as path:
        assert Path(path).read_bytes() == b"video"
    with (
        pytest.raises(SourceError, match=r"gave up after 3 attempts in \d"),
        local_file(f"{flaky_url}/3-{name}", str(tmp_path)),
    ):
        pass


def test_a_web_server_that_is_down_costs_little(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.mp4"
        with pytest.raises(SourceError, match="gave up after 3 attempts in 0"), local_file(url, str(tmp_path)):
            pass
