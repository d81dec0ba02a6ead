"""A proxy before an object store that spoils one request of a command, or all from it on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("timeout", "500", "503", "403", "short", "reset", "unanswered", "lag")
"""No answer in time; an error of the server, of its load, of access; half a body; a connection that
is closed before the request is carried out, or after; listings without what was just written."""

TIMEOUT_SECONDS = 1.0
"""The longest wait for an answer that clients of the proxy are to be set to."""

_CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}
_ENTRY = re.compile(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    Attributes:
      kind: one of `KINDS`, or empty for none.
      at: the number of the request, from 1.
      lasts: whether later requests have the fault, too.
      before: is called before that request is carried out.
      methods: of the requests that are counted and spoiled.
    """

    kind: str = ""
    at: int = 0
    lasts: bool = False
    before: Callable[[], None] = lambda: None
    methods: Collection[str] = ("GET", "HEAD", "PUT", "POST", "DELETE")


class FaultProxy(ThreadingHTTPServer):
    """The proxy of the server at a port of this machine.

    Attributes:
      count: of the requests since `expect`.
      is_hit: whether one of them had the fault.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = port
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._lock = threading.Lock()
        self.expect(Fault())
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def expect(self, fault: Fault) -> None:
        """Count requests from 1 again, and let one of them have a fault."""
        with self._lock:
            self.fault, self.count, self.written = fault, 0, set[bytes]()
            self.is_hit = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""

    def next_fault(self, method: str, key: bytes) -> str:
        """Return the kind of fault of a request that has come."""
        with self._lock:
            if method in ("PUT", "POST"):
                self.written.add(key)
            if method not in self.fault.methods:
                return ""
            self.count += 1
            fault, is_first = self.fault, self.count == self.fault.at
            self.is_hit = self.is_hit or is_first
        if is_first:
            fault.before()
        return fault.kind if is_first or (fault.lasts and self.count >= fault.at) else ""


class _Handler(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        kind = self.server.next_fault(self.command, path.encode().split(b"/", 2)[-1])
        if kind in ("timeout", "reset"):
            time.sleep(2 * TIMEOUT_SECONDS if kind == "timeout" else 0)
            self.close_connection = True
            return
        if kind in _CODES:
            text = f"<Error><Code>{_CODES[kind]}</Code><Message>a fault</Message></Error>".encode()
            self._send(int(kind), {"Content-Type": "application/xml"}, text)
            return
        connection = HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        connection.request(self.command, self.path, body, headers)
        answer: HTTPResponse = connection.getresponse()
        data = answer.read()
        connection.close()
        if kind == "unanswered":
            self.close_connection = True
            return
        if kind == "lag" and b"<ListBucketResult" in data:
            data = _ENTRY.sub(lambda m: b"" if m[1] in self.server.written else m[0], data)
        sent = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}
        self._send(answer.status, sent, data, is_short=kind == "short")

    def _send(
        self, status: int, headers: dict[str, str], data: bytes, *, is_short: bool = False
    ) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_short else data)
        self.close_connection = self.close_connection or is_short

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer


_HOP = ("connection", "transfer-encoding", "keep-alive")
