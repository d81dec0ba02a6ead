"""A model in several GGUF files, as llama-gguf-split writes it.

The files are named ``NAME-00001-of-00003.gguf``; the first has the metadata, and each says how many
there are (``split.count``) and which one it is (``split.no``, from 0).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moecc.checkpoint.gguf.header import GgufHeader, part_count, read_gguf_header
from moecc.checkpoint.problems import Problems, describe, quoted
from moecc.errors import InputError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_LARGEST = 4096


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; of a part, those of all parts, as one.

    Raises:
      InputError: with all problems of the headers, and parts that are missing or do not match.
      MachineError: a file cannot be read.
    """
    header = read_gguf_header(path)
    if part_count(header.metadata) <= 1:
        return header
    problems = Problems()
    parts = list(_parts(header, problems))
    problems.raise_if_any()
    return _joined(parts, problems)


def _parts(given: GgufHeader, problems: Problems) -> Iterator[GgufHeader]:
    """Yield the headers of all parts in order, the given one among them."""
    count = part_count(given.metadata)
    named = _PART.fullmatch(given.path.name)
    if named is None or int(named["count"]) != count or count > _LARGEST:
        raise InputError(
            "the name is not that of a part of a split model, so the others cannot be found",
            where=str(given.path),
            expected=f"NAME-00001-of-{count:05}.gguf, up to {_LARGEST:,} parts",
            found=f"one of {count:,} parts",
            hint="name the parts as llama-gguf-split does, or join them with its --merge",
        )
    for number in range(count):
        path = given.path.with_name(f"{named['stem']}-{number + 1:05}-of-{count:05}.gguf")
        if path == given.path:
            part = given
        elif path.exists():
            part = read_gguf_header(path)
        else:
            hint = "a split model is read with all of its parts beside each other"
            problems.add("a part of the model is missing", where=str(path), hint=hint)
            continue
        _check(part, number, count, problems)
        yield part


def _check(part: GgufHeader, number: int, count: int, problems: Problems) -> None:
    for key, expected in (("split.no", number), ("split.count", count)):
        found = part.metadata.get(key)
        if found != expected:
            problems.add(
                "the part is not the one that its name says",
                where=f"{part.path}, metadata key {key!r}",
                expected=f"{expected}",
                found=describe(found) if isinstance(found, int | str) else "nothing",
            )


def _joined(parts: list[GgufHeader], problems: Problems) -> GgufHeader:
    first = parts[0]
    tensors = dict(first.tensors)
    for part in parts[1:]:
        for name, tensor in part.tensors.items():
            if name in tensors:
                where = f"{part.path}, tensor {quoted(name)}"
                found = f"also in {tensors[name].file.name}"
                problems.add("two parts have this tensor", where=where, found=found)
            tensors[name] = tensor
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        where = f"{first.path}, metadata key 'split.tensors.count'"
        found = f"{len(tensors):,} in all parts"
        problems.add("tensors are missing", where=where, expected=f"{stated}", found=found)
    problems.raise_if_any()
    others = {part.path: part.identity for part in parts[1:]}
    return replace(first, tensors=tensors, parts=others)
