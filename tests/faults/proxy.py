"""An HTTP proxy in front of an S3 server that harms some of what passes: the faults of real stores, on demand."""

import contextlib
import http.client
import http.server
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

HOP_HEADERS = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass(slots=True, kw_only=True)
class Fault:
    """One kind of harm, to requests whose method and target (path and query) match, `times` times or always.

    harm: status (the store answers so), refuse (reset before the store gets the request), lose_answer (reset after the
    request took effect), cut_upload (the connection breaks in the middle of the body), halve_upload (the store takes
    half of the body for the whole), cut_download (the answer's body breaks off), delay (by delay_s), stale_listing
    (the answer of the first listing, for ever), drop_conditions (a store that ignores If-None-Match).
    """

    harm: str
    method: str = ""
    target: str = ""
    times: int | None = None
    probability: float = 1
    status: int = 500
    code: str = "InternalError"
    delay_s: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client sent."""

    method: str
    target: str
    headers: Sequence[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the store said."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


class Broken(Exception):
    """The connection to the client ends here."""


@dataclass(slots=True)
class FaultProxy:
    """Passes requests on to `upstream` (http://host:port), harmed by the faults that were injected.

    `harmed` counts by harm, and `seen` holds method and target of every request.
    """

    upstream: str
    seed: int = 0
    url: str = ""
    harmed: Counter[str] = field(default_factory=Counter)
    seen: list[tuple[str, str]] = field(default_factory=list)
    _faults: list[Fault] = field(default_factory=list)
    _listings: dict[str, Answer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def inject(self, harm: str, **fault: Any) -> None:
        """Do `harm` from now on; the further arguments are those of Fault."""
        if harm not in HARMS:
            raise ValueError(f"{harm}: no such harm; there are {', '.join(HARMS)}")
        with self._lock:
            self._faults.append(Fault(harm=harm, **fault))

    def clear(self) -> None:
        """Do no more harm, and forget what was seen."""
        with self._lock:
            self._faults.clear()
            self._listings.clear()
            self.harmed.clear()
            self.seen.clear()

    def answer(self, request: Request) -> Answer:
        """What the client gets, after all faults that are due; raises Broken where it gets nothing."""
        forward: Callable[[Request], Answer] = self._forward
        for fault in self._due(request):
            forward = HARMS[fault.harm](self, fault, forward)
        return forward(request)

    def listing(self, request: Request, forward: Callable[[Request], Answer]) -> Answer:
        """The first answer to this listing."""
        if request.target not in self._listings:
            self._listings[request.target] = forward(request)
        return self._listings[request.target]

    def cut_upload(self, request: Request) -> None:
        """Send the store the head of a request and half of its body, and hang up."""
        address = urlsplit(self.upstream)
        lines = [
            f"{request.method} {request.target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in request.headers),
        ]
        with socket.create_connection((address.hostname, address.port or 80)) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + request.body[: len(request.body) // 2])

    @contextlib.contextmanager
    def running(self) -> Iterator["FaultProxy"]:
        """The proxy, listening at its `url`."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        with _Server(("127.0.0.1", 0), handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            yield self
            server.shutdown()
            thread.join()

    def _due(self, request: Request) -> list[Fault]:
        due = []
        with self._lock:
            self.seen.append((request.method, request.target))
            for fault in self._faults:
                matches = re.search(fault.method, request.method) and re.search(fault.target, request.target)
                if matches and fault.times != 0 and self._random.random() < fault.probability:
                    fault.times = None if fault.times is None else fault.times - 1
                    self.harmed[fault.harm] += 1
                    due.append(fault)
        return due

    def _forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                connection.putheader(name, value)
            connection.endheaders(request.body)
            response = connection.getresponse()
            body = response.read()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_HEADERS]
            return Answer(status=response.status, headers=headers, body=body)


Forward = Callable[[Request], Answer]


def _status(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    xml = f"<Error><Code>{fault.code}</Code><Message>injected {fault.code}</Message></Error>".encode()
    return lambda request: Answer(status=fault.status, headers=[("Content-Type", "application/xml")], body=xml)


def _refuse(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    def harmed(request: Request) -> Answer:
        raise Broken

    return harmed


def _lose_answer(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    def harmed(request: Request) -> Answer:
        forward(request)
        raise Broken

    return harmed


def _cut_upload(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    def harmed(request: Request) -> Answer:
        proxy.cut_upload(request)
        raise Broken

    return harmed


def _halve_upload(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    def harmed(request: Request) -> Answer:
        half = request.body[: len(request.body) // 2]
        kept = [(n, v) for n, v in request.headers if n.lower() not in {"content-length", "content-md5"}]
        kept = [(name, value) for name, value in kept if not name.lower().startswith("x-amz-checksum")]
        headers = [*kept, ("Content-Length", str(len(half)))]
        return forward(Request(method=request.method, target=request.target, headers=headers, body=half))

    return harmed


def _cut_download(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    def harmed(request: Request) -> Answer:
        answer = forward(request)
        length = ("Content-Length", str(len(answer.body)))
        headers = [*(pair for pair in answer.headers if pair[0].lower() != "content-length"), length]
        return Answer(status=answer.status, headers=headers, body=answer.body[: len(answer.body) // 2])

    return harmed


def _delay(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    def harmed(request: Request) -> Answer:
        time.sleep(fault.delay_s)
        return forward(request)

    return harmed


def _stale_listing(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    return lambda request: proxy.listing(request, forward) if "list-type" in request.target else forward(request)


def _drop_conditions(proxy: FaultProxy, fault: Fault, forward: Forward) -> Forward:
    def harmed(request: Request) -> Answer:
        headers = [pair for pair in request.headers if pair[0].lower() not in {"if-none-match", "if-match"}]
        return forward(Request(method=request.method, target=request.target, headers=headers, body=request.body))

    return harmed


HARMS: dict[str, Callable[[FaultProxy, Fault, Forward], Forward]] = {
    "status": _status,
    "refuse": _refuse,
    "lose_answer": _lose_answer,
    "cut_upload": _cut_upload,
    "halve_upload": _halve_upload,
    "cut_download": _cut_download,
    "delay": _delay,
    "stale_listing": _stale_listing,
    "drop_conditions": _drop_conditions,
}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True  # clients keep idle connections open
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients hang up, and so do we."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = [(name, value) for name, value in self.headers.items() if name.lower() not in HOP_HEADERS]
        try:
            answer = self.proxy.answer(Request(method=self.command, target=self.path, headers=headers, body=body))
        except (Broken, OSError):
            self._hang_up()
            return
        self.send_response_only(answer.status)
        lengths = [int(value) for name, value in answer.headers if name.lower() == "content-length"]
        for name, value in answer.headers:
            self.send_header(name, value)
        if not lengths and answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
            self.close_connection |= bool(lengths) and lengths[0] > len(answer.body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
