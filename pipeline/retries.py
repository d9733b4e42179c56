"""Asking remote stores: with the recipe's options, and again after a fault that may pass."""

import inspect
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
from fsspec.config import conf

from ..schemas.errors import StorageError, did_you_mean

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

THROTTLED, SERVER, TIMEOUT, CONNECTION = "throttled", "server_error", "timeout", "connection"
TRUNCATED, CONFLICT = "truncated", "conflict"

# What S3 says in a fault that may pass; codes come first, for some of them share a status with lasting refusals.
KIND_OF_CODE = {
    "SlowDown": THROTTLED,
    "RequestTimeout": TIMEOUT,
    "IncompleteBody": TRUNCATED,
    "BadDigest": TRUNCATED,
    "XAmzContentSHA256Mismatch": TRUNCATED,
    "ConditionalRequestConflict": CONFLICT,
    "OperationAborted": CONFLICT,
}
KIND_OF_STATUS = {408: TIMEOUT, 429: THROTTLED, 500: SERVER, 502: SERVER, 503: THROTTLED, 504: SERVER}
# Faults without an answer, by the name of their class or of one that it derives from: the libraries that define
# them take long to import. None: a lasting one among those.
KIND_OF_CLASS: dict[str, str | None] = {
    "SSLError": None,
    "ClientSSLError": None,
    "TimeoutError": TIMEOUT,
    "ReadTimeoutError": TIMEOUT,
    "ConnectTimeoutError": TIMEOUT,
    "ClientPayloadError": TRUNCATED,
    "ResponseStreamingError": TRUNCATED,
    "IncompleteRead": TRUNCATED,
    "IncompleteReadError": TRUNCATED,
    "FlexibleChecksumError": TRUNCATED,
    "HalfWritten": TRUNCATED,
    "ResponseParserError": SERVER,
    "ConnectionError": CONNECTION,
    "HTTPClientError": CONNECTION,
    "ClientConnectionError": CONNECTION,
}

_counts: Counter[str] = Counter()
_counts_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often one request is made, for how long in all, and how the waits between grow."""

    attempts: int = 10
    total_s: float = 120
    first_wait_s: float = 0.2
    longest_wait_s: float = 20

    def wait_s(self, attempt: int) -> float:
        """The wait after `attempt` (from 1): doubling, and jittered so that many workers do not return at once."""
        return min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1)


POLICY = RetryPolicy()


class HalfWritten(OSError):
    """A store took an upload, and holds another number of bytes than were sent."""


class Attempts:
    """The attempts at one request so far; `what` names it in the log."""

    def __init__(self, what: str, policy: RetryPolicy = POLICY) -> None:
        self.what, self.policy = what, policy
        self.number, self.began_s = 1, time.monotonic()

    def wait_after(self, error: Exception) -> float:
        """Seconds to wait before the next attempt; raises `error` where it is a lasting one, or attempts are spent."""
        kind = transient_kind(error)
        if kind is None:
            raise error
        wait_s, spent_s = self.policy.wait_s(self.number), time.monotonic() - self.began_s
        if self.number >= self.policy.attempts or spent_s + wait_s > self.policy.total_s:
            error.add_note(f"gave up after {self.number} attempts in {spent_s:.1f} s")
            raise error
        with _counts_lock:
            _counts[kind] += 1
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning(
            "event=retry kind=%s attempt=%d wait_s=%.2f request=%r reason=%r",
            kind, self.number, wait_s, self.what, reason,
        )  # fmt: skip
        self.number += 1
        return wait_s


def with_retries(call: Callable[[], Answer], what: str, policy: RetryPolicy = POLICY) -> Answer:
    """What `call` returns, called again after faults that may pass; `what` names it in the log."""
    attempts = Attempts(what, policy)
    while True:
        try:
            return call()
        except Exception as error:
            time.sleep(attempts.wait_after(error))


def retry_counts() -> Counter[str]:
    """How many requests this process has made again so far, by kind of fault."""
    with _counts_lock:
        return _counts.copy()


def add_retries(counts: Mapping[str, int]) -> None:
    """Count here what another process has asked for again on behalf of this one."""
    with _counts_lock:
        _counts.update(counts)


def transient_kind(error: BaseException) -> str | None:
    """The kind of fault that `error` is where asking again may help, else None."""
    status, code = answer_of(error)
    if status is not None:
        return KIND_OF_CODE.get(code) or KIND_OF_STATUS.get(status)
    return next((KIND_OF_CLASS[c.__name__] for c in type(error).__mro__ if c.__name__ in KIND_OF_CLASS), None)


def answer_of(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and code of the store's answer that `error` tells of; (None, "") where there was no answer."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)  # botocore's; s3fs keeps it as the cause of its own error
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        status = getattr(link, "status", None)  # aiohttp's
        if isinstance(status, int):
            return status, ""
    return None, ""


_replaced: dict[str, dict[str, Any]] = {}  # what fsspec's own files and environment say, where a recipe says more


def apply_storage_options(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `options`, by protocol, the defaults of every fsspec filesystem that this process opens from now on.

    They take the place of those applied before. StorageError names a protocol or option that does not exist;
    values stay out of messages, for some are secrets.
    """
    for protocol, wanted in options.items():
        accepted = _options_of(protocol)
        for option in wanted:
            if option not in accepted:
                raise StorageError(
                    f"storage.{protocol}.{option}: unknown option{did_you_mean(option, accepted)};"
                    f" accepted are {', '.join(accepted)}"
                )
    for protocol, before in _replaced.items():
        if before:
            conf[protocol] = before
        else:
            conf.pop(protocol, None)
    _replaced.clear()
    for protocol, wanted in options.items():
        _replaced[protocol] = conf.get(protocol, {})
        conf[protocol] = {**_replaced[protocol], **wanted}


def _options_of(protocol: str) -> list[str]:
    """The names of all options that the filesystem of `protocol` takes."""
    known = sorted(fsspec.available_protocols())
    if protocol not in known:
        raise StorageError(
            f"storage.{protocol}: unknown protocol{did_you_mean(protocol, known)}; accepted are {', '.join(known)}"
        )
    try:
        cls = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise StorageError(f"storage.{protocol}: {error}") from None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {"use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache"}
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
        found |= {parameter.name for parameter in parameters if parameter.kind in named}
    if "session" in found:
        found.add("profile")  # s3fs hands it to the session that it makes
    return sorted(found - {"self"})
