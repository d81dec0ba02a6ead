"""Mutations of inputs: of bytes, of texts by their tokens, and of JSON values by their structure."""

# ruff: noqa: E501

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

MOST_BYTES = 1 << 14
"""The most bytes of a mutant, so that executions stay cheap; bombs may have more."""
MOST_MEMBERS = 20_000
"""The most values of a JSON document that a mutation repeats or copies parts of."""

NUMBERS = (
    "0", "1", "-1", "2", "3", "7", "64", "255", "256", "65535", "65536", "70000", "1000000",
    "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "0.5", "1e-320", "1e308", "1e400", "-0.0",
    "nan", "inf", "-inf", "NaN", "Infinity", "0x0", "0xffffffffffffffffffffffffffffffff",
    "1e5", "1_000", "٣", "²", "1" * 400, "9" * 5000,
)  # fmt: skip
ODD = (
    "", " ", "\n", "\r\n", "\t", "\0", "\x1b[31m", "\u202e", "\u2028", "\ufeff", "\ud800", "é", "🙂",
    "..", "../x", "/etc/passwd", "C:\\x", "\\\\srv\\x", "%s", "{}", "{0}", "{layer}", "\"", "'",
    "\\", "\\u0000", "\\ud800", "#", "null", "true", "false", "none", "a" * 300,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 8, 10**6, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, 0.5,
    -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "8", "\ud800", "\x1b[31m", "../x",
    [], [[]], [0], [1, 2, 3], ["a"], {}, {"a": {}}, [None] * 50, {str(i): i for i in range(50)},
)  # fmt: skip

_TOKEN = re.compile(r"[A-Za-z_]+|[0-9]+|\s+|.", re.DOTALL)

Rng = random.Random
Mutator = Callable[[Rng, bytes, Sequence[bytes]], bytes]


def bombs() -> list[bytes]:
    """Return inputs that are deep, long or repetitive whatever the grammar is."""
    deep = [b"[" * 20_000, b'{"a":' * 20_000, b"(" * 20_000, b"scale(" * 20_000, b"{" * 20_000]
    long = [b"a" * 200_000, b"9" * 200_000, b"," * 100_000, b"\n" * 100_000, b" " * 200_000]
    return [*deep, *long, b"", b"\0" * 4096, b"\xff" * 4096, b"%" * 50_000, b'"' * 50_000]


def mutate_bytes(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """Flip, insert, delete, repeat or copy some bytes."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(made) + 1)
        end = min(len(made), at + rng.choice((1, 1, 4, 8, 64)))
        match rng.randrange(8):
            case 0 if made:
                made[at % len(made)] ^= 1 << rng.randrange(8)
            case 1 if made:
                made[at % len(made)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del made[at:end]
            case 3:
                made[at:at] = made[at:end] * rng.choice((1, 2, 16))
            case 4:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, 1, 2, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(made)))
                made[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
            case 5:
                made[at:at] = rng.choice(others)[:64]
            case 6:
                del made[at:]
            case _:
                made[at:end] = rng.randbytes(end - at)
    return bytes(made[:MOST_BYTES])


def mutate_text(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """Replace, delete, repeat, swap or insert tokens; at times splice two texts."""
    tokens = _TOKEN.findall(data.decode("utf-8", "surrogateescape"))
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(tokens) + 1)
        end = min(len(tokens), at + rng.choice((1, 1, 1, 3, 12)))
        match rng.randrange(9):
            case 0 | 1 if at < len(tokens):
                tokens[at] = _instead(rng, tokens[at], tokens)
            case 2:
                del tokens[at:end]
            case 3:
                tokens[at:at] = tokens[at:end] * rng.choice((1, 1, 2, 20))
            case 4 if len(tokens) > 1:
                other = rng.randrange(len(tokens))
                at %= len(tokens)
                tokens[at], tokens[other] = tokens[other], tokens[at]
            case 5:
                tokens.insert(at, rng.choice(ODD))
            case 6:
                part = _TOKEN.findall(rng.choice(others).decode("utf-8", "surrogateescape"))
                start = rng.randrange(len(part) + 1)
                tokens[at:end] = part[start : start + rng.choice((1, 4, 16, 64))]
            case 7:
                tokens[at:end] = [rng.choice(tokens)] if tokens else []
            case _:
                tokens.insert(at, rng.choice(NUMBERS))
    return "".join(tokens).encode("utf-8", "surrogatepass")[:MOST_BYTES]


def _instead(rng: Rng, token: str, tokens: Sequence[str]) -> str:
    if token.isdigit() and rng.random() < 0.7:
        return rng.choice(NUMBERS)
    if rng.random() < 0.5:
        return rng.choice(tokens)
    return rng.choice(ODD)


def mutate_json(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change some members of a JSON document; one time in eight its text."""
    if rng.random() < 0.125:
        return mutate_text(rng, data, others)
    try:
        return as_json(mutate_value(rng, json.loads(data)))
    except (ValueError, RecursionError):
        return mutate_text(rng, data, others)


def as_json(value: object) -> bytes:
    """Return a JSON text of a value that may have any number in it."""
    limit_free = json.JSONEncoder(ensure_ascii=True)
    try:
        return limit_free.encode(value).encode()[: 4 * MOST_BYTES]
    except ValueError:  # an integer with more digits than Python prints
        return b'{"a": ' + b"9" * 5000 + b"}"


def mutate_value(rng: Rng, value):
    """Return a copy of a JSON value with one to three members changed."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        made = _changed(rng, made)
    return made


def members(value, most: int = MOST_MEMBERS) -> int:
    """Return how many values are in a JSON value, counting up to `most`."""
    count, left = 0, [value]
    while left and count < most:
        here = left.pop()
        count += 1
        if isinstance(here, dict | list):
            left += here.values() if isinstance(here, dict) else here
    return count


def _number_near(rng: Rng, number: float):
    if abs(number) > 1e300:
        return 0
    return rng.choice((number + 1, number - 1, -number, number * 2, float(number), str(number)))


def _changed(rng: Rng, root):
    box, key, depth = None, None, 0
    here = root
    while isinstance(here, dict | list) and here and (box is None or rng.random() < 0.7):
        depth += 1
        keys = list(here) if isinstance(here, dict) else range(len(here))
        box, key = here, rng.choice(keys)
        here = box[key]
        if depth > 30:
            break
    if box is None:
        return rng.choice(VALUES)
    match rng.randrange(8):
        case 0:
            del box[key]
        case 1 if isinstance(box, dict):
            box[rng.choice((*ODD, str(key).upper(), f"{key}s", str(key)[:-1]))] = box[key]
        case 2 if isinstance(box, list) and 8 * members(root) < MOST_MEMBERS:
            # Copies, not the same members again: those would all be repeated by the next change.
            box += copy.deepcopy(box) * rng.choice((1, 7))
        case 3:
            box[key] = [box[key]]
        case 4:
            other = rng.choice(list(box.values()) if isinstance(box, dict) else box)
            if 2 * members(root) >= MOST_MEMBERS:
                return root
            box[key] = copy.deepcopy(other)
        case 5 if isinstance(here, int | float) and not isinstance(here, bool):
            box[key] = _number_near(rng, here)
        case 6 if isinstance(here, str):
            box[key] = rng.choice(
                (here + rng.choice(ODD), here[:-1], here.upper(), rng.choice(ODD))
            )
        case _:
            box[key] = copy.deepcopy(rng.choice(VALUES))
    return root
