"""A tokenizer in a subprocess: whatever its file holds, the caller gets a result or an error.

The library is Rust: a hostile ``tokenizer.json`` may cause a panic, which is not an Exception
in Python, or end the process when memory runs out.  Either is reported to the caller as an error.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from moecc.errors import InputError, MachineError, describe_error, printable
from moecc.support.extras import install_hint
from moecc.support.process import Closing
from moecc.support.untyped import Json, JsonDict

# The subprocess: answers one request per line, within bounds.

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 120
MOST_TOKENS = 1 << 22
"""The limit on tokens of one response."""


def main() -> None:
    """Serve the requests on standard input until it ends."""
    _bound()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"result": worker.answer(request, requests)}
        except ImportError:
            answer = {"missing": True}
        except BaseException as error:  # a Rust panic is not an Exception
            answer = {"error": describe_error(error)[:2000]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


class Worker:
    """A tokenizer, once it is loaded."""

    def __init__(self) -> None:
        self.tokenizer: Any = None

    def answer(self, request: JsonDict, stream: BinaryIO) -> Any:
        """Return the result of one request."""
        ((method, argument),) = request.items()
        match method:
            case "load":
                return self._load(stream.read(argument))
            case "encode" | "plain":
                return self._encode(argument, special=method == "encode")
            case "decode":
                return self.tokenizer.decode(argument)
            case "ids":
                return [self.tokenizer.token_to_id(token) for token in argument]
            case "size":
                return max(self.tokenizer.get_vocab().values(), default=-1) + 1
        return self.tokenizer.id_to_token(argument)

    def _load(self, data: bytes) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        # Padding and truncation are for batches, not for single texts.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def _encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        rows, count = [], 0
        for text in texts:
            ids = self.tokenizer.encode(text, add_special_tokens=special).ids
            count += len(ids)
            if count > MOST_TOKENS:
                raise ValueError(f"more than {MOST_TOKENS:,} tokens")
            rows.append(ids)
        return rows


def _bound() -> None:
    """Limit this process's memory, so that the system ends it before memory runs out."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


LIMIT_SECONDS = 60.0
"""The time limit of one request."""

_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2", "RUST_BACKTRACE": "0"}
_MOST_ANSWER_BYTES = 256 << 20
_READ_BYTES = 1 << 16


class Tokenizer(Closing):
    """The tokenizer of a checkpoint, in a subprocess that ends with this object.

    Args:
      data: the content of ``tokenizer.json``.
      where: its name in messages.
      limit_seconds: the time limit of a request.

    Raises:
      InputError: it cannot be read, takes too long or too much memory, or panics.
      MachineError: the extra ``tokenizers`` is not installed, or no process can be started.
    """

    def __init__(self, data: bytes, where: str, limit_seconds: float = LIMIT_SECONDS) -> None:
        self.where = where
        self.limit_seconds = limit_seconds
        try:
            self._process = subprocess.Popen(
                # -P: a file in the working folder must not shadow a library.
                [sys.executable, "-P", "-m", "moecc.tokenizer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
            )
        except OSError as error:
            raise MachineError(f"no process for the tokenizer: {error.strerror}") from None
        try:
            self._ask({"load": len(data)}, data, doing="read")
        except BaseException:
            self.close()
            raise

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, special tokens included. Raises InputError as the class."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of each text. Raises InputError as the class.

        Args:
          texts: the texts.
          special: whether the special tokens are included that the tokenizer puts around a text.
        """
        method = "encode" if special else "plain"
        rows: list[list[int]] = self._ask({method: list(texts)}, doing="used")
        return rows

    def ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Return the id of each token as the vocabulary writes it. Raises InputError."""
        ids: list[int | None] = self._ask({"ids": list(tokens)}, doing="used")
        return ids

    def size(self) -> int:
        """Return one more than the largest id, added tokens included. Raises InputError."""
        return int(self._ask({"size": None}, doing="used"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out. Raises InputError as the class."""
        return str(self._ask({"decode": list(ids)}, doing="used"))

    def token(self, id: int) -> str | None:
        """Return a token as the vocabulary writes it. Raises InputError as the class."""
        token: str | None = self._ask({"token": id}, doing="used")
        return token

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _ask(self, request: Json, data: bytes = b"", *, doing: str) -> Any:
        """Return the response to a request, which `data` follows."""
        message = json.dumps(request).encode() + b"\n" + data
        line = self._exchange(message, doing)
        answer = json.loads(line)
        if "missing" in answer:
            raise MachineError("text needs the tokenizers library", hint=install_hint("tokenizers"))
        if "error" in answer:
            raise self._failed(doing, printable(answer["error"], 400))
        return answer["result"]

    def _exchange(self, message: bytes, doing: str) -> bytes:
        """Write a message and return the response line, both within the time limit."""
        source, target = self._process.stdout, self._process.stdin
        assert source is not None, "it is a pipe"
        assert target is not None, "it is a pipe"
        os.set_blocking(target.fileno(), False)
        deadline = time.monotonic() + self.limit_seconds
        left, answer = memoryview(message), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            selector.register(target, selectors.EVENT_WRITE)
            while not answer.endswith(b"\n"):
                ready = {key.fileobj for key, _ in selector.select(deadline - time.monotonic())}
                if not ready or time.monotonic() > deadline:
                    raise self._failed(doing, f"it takes more than {self.limit_seconds:g} s")
                if target in ready:
                    left = self._write(left)
                if target in ready and not left:
                    selector.unregister(target)
                if source in ready:
                    answer += self._read(doing)
                if len(answer) > _MOST_ANSWER_BYTES:
                    raise self._failed(doing, f"it answers more than {_MOST_ANSWER_BYTES:,} bytes")
        return bytes(answer)

    def _read(self, doing: str) -> bytes:
        assert self._process.stdout is not None, "it is a pipe"
        data = os.read(self._process.stdout.fileno(), _READ_BYTES)
        if not data:
            gigabytes = MEMORY_BYTES / (1 << 30)
            reason = f"it ended its process, which may take {gigabytes:g} GiB of memory"
            raise self._failed(doing, reason)
        return data

    def _write(self, left: memoryview) -> memoryview:
        assert self._process.stdin is not None, "it is a pipe"
        try:
            return left[os.write(self._process.stdin.fileno(), left[:_READ_BYTES]) :]
        except BlockingIOError:
            return left
        except BrokenPipeError:
            # The process has ended; the next read reports it.
            return left[:0]

    def _failed(self, doing: str, reason: str) -> InputError:
        return InputError(f"the tokenizer cannot be {doing}: {reason}", where=self.where)


if __name__ == "__main__":
    main()
