"""The tokenizer subprocess: answers one request per line, within bounds.

The library is Rust: a hostile ``tokenizer.json`` may cause a panic, which is not an Exception
in Python, or end the process when memory runs out.  Either is reported to the caller as an error.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any, BinaryIO

from moecc.errors import described
from moecc.support.untyped import JsonDict

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
            answer = {"error": described(error)[:2000]}
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


if __name__ == "__main__":
    main()
