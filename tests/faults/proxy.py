"""A proxy between a client and an S3 server on this machine that makes the faults that networks make, on demand."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

RESET = "reset"  # the connection breaks before the server has seen the request
LOST = "lost"  # the server has done what was asked; the connection breaks before its answer arrives
CUT = "cut"  # half of the answer arrives
SLOW = "slow"  # the answer takes `delay` seconds longer
BUSY = "busy"  # 503 Slow Down
DENIED = "denied"  # 403, with a body that repeats key and signature, as S3's does
UNCONDITIONAL = "unconditional"  # the server does not know If-None-Match

BUSY_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED_BODY = (
    "<Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match.</Message>"
    "<AWSAccessKeyId>{key}</AWSAccessKeyId><StringToSign>{signed}</StringToSign>"
    "<SignatureProvided>{signature}</SignatureProvided></Error>"
)


@dataclass(frozen=True)
class Request:
    """One request that came through, and which fault it met."""

    method: str
    path: str
    conditional: bool
    fault: str | None


Chooser = Callable[[int, str, str], str | None]


class FaultyProxy:
    """Passes requests on to `127.0.0.1:upstream`; `choose(number, method, path)` says which fault each one meets.

    `requests` are those seen so far. Use as a context manager: at its end no thread and no connection is left.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.choose: Chooser = lambda number, method, path: None
        self.delay = 0.0
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        class Server(ThreadingHTTPServer):
            daemon_threads = False  # so that closing it waits for them

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Says nothing: broken connections are what this is for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return int(self._server.server_address[1])

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def note(self, method: str, path: str, conditional: bool) -> str | None:
        """Remembers a request and returns which fault it meets."""
        with self._lock:
            fault = self.choose(len(self.requests), method, path)
            self.requests.append(Request(method, path, conditional, fault))
        return fault

    def opened(self, connection: socket.socket, closed: bool = False) -> None:
        """Remembers a connection of a client, or that it is closed."""
        with self._lock:
            (self._open.discard if closed else self._open.add)(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyProxy

    def setup(self) -> None:
        super().setup()
        self.owner.opened(self.connection)

    def finish(self) -> None:
        self.owner.opened(self.connection, closed=True)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.note(self.command, self.path, "If-None-Match" in self.headers)
        if fault == RESET:
            self._break()
        elif fault == BUSY:
            self._answer(503, {"Content-Type": "application/xml"}, BUSY_BODY)
        elif fault == DENIED:
            self._answer(403, {"Content-Type": "application/xml"}, self._denied())
        else:
            if fault == SLOW:
                time.sleep(self.owner.delay)
            status, headers, answer = self._ask(body, fault)
            if fault == LOST:
                self._break()
            elif fault == CUT:
                self._answer(status, headers, answer, len(answer) // 2)
                self._break()
            else:
                self._answer(status, headers, answer)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on  # noqa: N815  # what the base class calls

    def _ask(self, body: bytes, fault: str | None) -> tuple[int, dict[str, str], bytes]:
        headers = {k: v for k, v in self.headers.items() if fault != UNCONDITIONAL or k.lower() != "if-none-match"}
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            found = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            return answer.status, found, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, part: int | None = None) -> None:
        self.send_response_only(status)
        given = {name.lower() for name in headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in given and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:part])

    def _denied(self) -> bytes:
        signed = self.headers.get("Authorization") or ""
        key = signed.partition("Credential=")[2].partition("/")[0]
        signature = signed.partition("Signature=")[2]
        return DENIED_BODY.format(key=key, signed=signed, signature=signature).encode()

    def _break(self) -> None:
        """Ends the connection with a reset, not a polite end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.owner.opened(self.connection, closed=True)
        self.rfile.close()
        self.connection.close()
