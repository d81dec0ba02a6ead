"""A rendezvous of all processes before any of them starts JAX's client.

JAX's client is C++ that ends its process with SIGABRT if another one never comes: no error to
catch.  So all meet over plain TCP first, at the address that JAX will use; it is free again
when they part.  A process that dies in between is left to JAX, or a supervisor, to detect.
"""

from __future__ import annotations

import errno
import re
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from moecc.errors import MachineError, printable
from moecc.launch.processes import COORDINATOR, JOIN, ProcessInfo

RETRY_SECONDS = 0.2
PART_SECONDS = 5
"""How long the first process waits for the others to close their connections."""

VERDICT_SECONDS = 2
"""How much longer than the first process a connected one waits, to hear from it who is missing:
with equal limits, whichever clock started earlier decides whether it hears of it."""

_HELLO = re.compile(rb"moecc (\d{1,6}) of (\d{1,6})\n\Z")
_GO, _NO = b"go\n", b"no: "
_MOST_BYTES = 1024


def meet(process: ProcessInfo, seconds: float) -> None:
    """Wait until all processes are connected; a single process does not wait.

    Args:
      process: this process; its coordinator is an address.
      seconds: the longest wait.

    Raises:
      MachineError: they did not connect in time, or the address cannot be used.
    """
    if process.processes == 1:
        return
    if process.process == 0:
        _Host(process, seconds).wait()
    else:
        _visit(process, seconds)


@dataclass
class _Visitor:
    """A connection to the first process: the bytes received, and the sender's number once known."""

    connection: socket.socket
    received: bytes = b""
    number: int = -1


class _Host:
    """The first process, which waits for the others and notifies them when all are connected."""

    def __init__(self, process: ProcessInfo, seconds: float) -> None:
        self.process = process
        self.seconds = seconds
        self.come: dict[int, _Visitor] = {}
        self.turned_away = ""
        self.selector = selectors.DefaultSelector()

    def wait(self) -> None:
        """Wait for all, and release them.

        Raises:
          MachineError: some did not connect; those that did are notified.
        """
        deadline = time.monotonic() + self.seconds
        with self.selector, _listening(self.process) as server:
            self.selector.register(server, selectors.EVENT_READ)
            try:
                while len(self.come) < self.process.processes - 1:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        self._give_up()
                    for key, _ in self.selector.select(left):
                        if key.data is None:
                            self._accept(server)
                        else:
                            self._hear(key.data)
                self._part(_GO)
            finally:
                for key in [k for k in self.selector.get_map().values() if k.data is not None]:
                    key.data.connection.close()

    def _accept(self, server: socket.socket) -> None:
        with suppress(BlockingIOError, ConnectionError):
            connection, _ = server.accept()
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, _Visitor(connection))

    def _hear(self, visitor: _Visitor) -> None:
        try:
            data = visitor.connection.recv(_MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        visitor.received += data
        if not data or visitor.number >= 0 or len(visitor.received) > _MOST_BYTES:
            self._drop(visitor)
        elif visitor.received.endswith(b"\n"):
            self._welcome(visitor)

    def _welcome(self, visitor: _Visitor) -> None:
        hello = _HELLO.match(visitor.received)
        if hello is None:
            self._drop(visitor)
            return
        number, count = int(hello[1]), int(hello[2])
        if count != self.process.processes:
            self._refuse(visitor, f"process {number} was told of {count} processes, "
                         f"process 0 of {self.process.processes}")  # fmt: skip
        elif number in self.come or not 0 < number < count:
            self._refuse(visitor, f"there are two processes with the number {number}")
        else:
            visitor.number = number
            self.come[number] = visitor

    def _refuse(self, visitor: _Visitor, reason: str) -> None:
        self.turned_away = reason
        _send(visitor, _NO + reason.encode() + b"\n")
        self._drop(visitor)

    def _drop(self, visitor: _Visitor) -> None:
        self.selector.unregister(visitor.connection)
        visitor.connection.close()
        self.come.pop(visitor.number, None)

    def _give_up(self) -> None:
        missing = [n for n in range(1, self.process.processes) if n not in self.come]
        named = ", ".join(map(str, missing[:5])) + (", …" if missing[5:] else "")
        which = f"process {named}" if len(missing) == 1 else f"processes {named}"
        reason = f"{which} of {self.process.processes} did not come within {self.seconds:g} s"
        self._part(_NO + reason.encode() + b"\n")
        raise _apart(self.process, reason, self.turned_away)

    def _part(self, word: bytes) -> None:
        """Send the final message to all, and let them close first, which leaves the port free."""
        for visitor in self.come.values():
            _send(visitor, word)
        limit = time.monotonic() + PART_SECONDS
        for visitor in self.come.values():
            visitor.connection.settimeout(max(0.01, limit - time.monotonic()))
            with suppress(OSError):
                visitor.connection.recv(1)


def _send(visitor: _Visitor, word: bytes) -> None:
    # A few bytes into an empty buffer never block; a closed connection is detected later.
    with suppress(OSError):
        visitor.connection.send(word)


@contextmanager
def _listening(process: ProcessInfo) -> Iterator[socket.socket]:
    _, port = _address(process)
    try:
        server = _server(port)
    except OSError as error:
        raise MachineError(
            f"the first process cannot listen: {error.strerror or error}",
            where=process.coordinator,
            hint=f"give another port in {COORDINATOR}, to all processes",
        ) from None
    with server:
        server.setblocking(False)
        yield server


def _server(port: int) -> socket.socket:
    # All interfaces, as JAX does: the name of the coordinator may be that of a gateway.
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port), backlog=1024)


def _visit(process: ProcessInfo, seconds: float) -> None:
    """Connect to the first process, with retries, until it reports that all are connected."""
    deadline = time.monotonic() + seconds
    reason = "it does not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            answer = _answer(process, left)
        except OSError as error:
            reason = str(error.strerror or error)
        else:
            if answer == _GO:
                return
            if answer.startswith(_NO):
                text = answer.removeprefix(_NO).decode(errors="replace").strip()
                raise _apart(process, printable(text))
            reason = (
                "a server that is not moecc answers there"
                if answer
                else "the connection was closed"
            )
        time.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
    raise _apart(process, f"process 0 was not met within {seconds:g} s", reason)


def _answer(process: ProcessInfo, seconds: float) -> bytes:
    deadline = time.monotonic() + seconds + VERDICT_SECONDS
    with socket.create_connection(_address(process), timeout=seconds) as connection:
        connection.sendall(b"moecc %d of %d\n" % (process.process, process.processes))
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < _MOST_BYTES:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            data = connection.recv(_MOST_BYTES)
            if not data:
                break
            answer += data
        return answer


def _address(process: ProcessInfo) -> tuple[str, int]:
    host, _, port = process.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _apart(process: ProcessInfo, reason: str, actual: str = "") -> MachineError:
    return MachineError(
        f"the processes did not meet: {reason}",
        where=process.coordinator,
        found=actual or None,
        hint=f"start all of them with the same {COORDINATOR}; {JOIN} waits longer",
    )
