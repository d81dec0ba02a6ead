"""Parts of a conversion: folders of shards that processes write apart, and one process joins.

``OUT`` is made in ``.OUT.moecc-parts`` beside it, with a folder ``00003-of-00008`` for each part.
Such a folder is an output of its own, which appears complete or not at all: its shards, the journal
of their tensors, and ``moecc_part.json``.  The parts stay as they are until ``OUT`` is complete,
whose shards are hard links to theirs.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moecc.errors import InputError, Problem, Problems, UsageError
from moecc.formats.files import disk, os_errors, write_durable
from moecc.formats.manifest import FileName, FileRecord, read_sealed, seal
from moecc.formats.output import WAIT, is_locked, part_folder, partial_of, parts_of
from moecc.formats.safetensors import ConversionPart, Shard
from moecc.formats.writer import JOURNAL_NAME, Done, Facts, read_journal
from moecc.support.record import read_record, to_json
from moecc.support.text import amount

PART_NAME = "moecc_part.json"
SCHEMA = "moecc.part/1"
_MAX_BYTES = 64 << 20
_TEXT = re.compile(r"([0-9]{1,5})/([0-9]{1,5})\Z")
_FOLDER = re.compile(r"\.?([0-9]{5})-of-([0-9]{5})(\.moecc-partial|\.moecc-old)?\Z")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
"""The errors of file systems on which a file has one name; its copy serves as well."""


@dataclass(frozen=True)
class PartRecord:
    """The record of a complete part.

    Attributes:
      source_files: the files of the source that the part hashed, by name.
      schema: the version of this layout.
    """

    source_files: Mapping[FileName, FileRecord]
    schema: str = SCHEMA


def parse_part(text: str) -> ConversionPart:
    """Return the part that ``K/N`` names. Raises UsageError."""
    match = _TEXT.match(text)
    part = ConversionPart(*map(int, match.groups())) if match else ConversionPart(0, 0)
    if not 1 <= part.number <= part.count:
        raise UsageError(
            "not a part of a conversion", where="--part",
            expected="K/N with K from 1 to N, N up to 99,999, for example 3/8", found=text,
        )  # fmt: skip
    return part


def write_record(folder: Path, source_files: Mapping[str, FileRecord]) -> None:
    """Write the record of a part, which completes its folder. Raises MachineError."""
    text = json.dumps(to_json(PartRecord(source_files)), sort_keys=True)
    write_durable(folder / PART_NAME, seal(text.removesuffix("}").encode()))


@dataclass(frozen=True)
class JoinedParts:
    """The parts of an output, all of them complete and of one conversion.

    Attributes:
      folders: the folder of each part, by the names of its shards.
      completed: the tensors that the parts wrote, by the name of the first copy.
      source_files: size and digest of each file of the source.
    """

    folders: Mapping[str, Path]
    completed: Mapping[str, Done]
    source_files: Mapping[str, FileRecord]

    def link_into(self, folder: Path) -> None:
        """Give the shards of all parts a name in `folder`, or copy them where there are no links.

        Raises:
          MachineError: the disk is full.
        """
        for name, part in self.folders.items():
            with os_errors(folder / name, "write"):
                try:
                    disk().link(part / name, folder / name)
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    disk().copy(part / name, folder / name)


def read_parts(out: Path, facts: Facts, shards: Sequence[Shard]) -> JoinedParts:
    """Read and compare the parts of an output.

    Args:
      out: the output.
      facts: the facts of the conversion that joins them.
      shards: the shards of the output.

    Raises:
      InputError: a part is missing, was killed, is being written, was changed, or is of another
        conversion; a problem for each.
      MachineError: a file cannot be read.
    """
    count = _count_of(out)
    problems = Problems()
    folders: dict[str, Path] = {}
    completed: dict[str, Done] = {}
    source_files: dict[str, FileRecord] = {}
    for number in range(1, count + 1):
        part = ConversionPart(number, count)
        folder = part_folder(out, part)
        if absence := _absence(folder, part):
            problems.extend([absence])
            continue
        with problems:
            record, tensors = read_part(folder, part, facts, part.share(shards))
            source_files |= record.source_files
            folders |= {shard.name: folder for shard in part.share(shards)}
            for done in tensors.values():
                completed[done.name] = _merged(completed.get(done.name, done), done, folder)
    problems.raise_if_any()
    return JoinedParts(folders, completed, source_files)


def _count_of(out: Path) -> int:
    """Return the number of parts of an output. Raises InputError."""
    root = parts_of(out)
    counts: dict[int, list[int]] = {}
    for name in sorted(os.listdir(root)) if root.is_dir() else ():
        if match := _FOLDER.match(name):
            counts.setdefault(int(match[2]), []).append(int(match[1]))
    if not counts:
        raise InputError(
            "there are no parts to join", where=root,
            hint="write them first, by the same command with --part 1/N to N/N",
        )  # fmt: skip
    if len(counts) > 1:
        raise InputError(
            "the parts are of several divisions", where=root, expected="parts of one number N",
            found=", ".join(f"{n}/{count}" for count in sorted(counts) for n in counts[count][:3]),
            hint="delete the folders of the division that is not wanted",
        )  # fmt: skip
    return next(iter(counts))


def _absence(folder: Path, part: ConversionPart) -> Problem | None:
    """Return the problem of a part that is being written, was killed or is missing."""
    partial = partial_of(folder)
    again = f"the same command with --part {part}"
    if is_locked(partial):
        return Problem(f"part {part} is being written", str(partial), hint=WAIT)
    if folder.is_dir():
        return None
    if partial.is_dir():
        hint = f"{again} --resume goes on with it"
        return Problem(f"part {part} was killed before it was complete", str(partial), hint=hint)
    return Problem(f"part {part} is missing", str(folder), hint=f"{again} writes it")


def read_part(
    folder: Path, part: ConversionPart, facts: Facts, shards: Sequence[Shard]
) -> tuple[PartRecord, dict[str, Done]]:
    """Return the record of a complete part, and the tensors that it wrote, by name.

    Raises:
      InputError: it was changed, or is of another conversion; all differences.
      MachineError: a file cannot be read.
    """
    hint = f"write it again: the same command with --part {part} --force"
    document = read_sealed(folder / PART_NAME, _MAX_BYTES, InputError, hint)
    record = read_record(PartRecord, document, str(folder / PART_NAME))
    completed = read_journal(
        folder, facts, f"part {part} is of another conversion", f"{hint}; or join as it was written"
    )
    expected = {shard.name: shard.size_bytes for shard in shards}
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    for name in (PART_NAME, JOURNAL_NAME):
        sizes.pop(name, None)
    if sizes != expected or not completed:
        raise InputError(
            f"part {part} was changed after it was written", where=folder,
            expected=_sizes_text(expected), found=_sizes_text(sizes), hint=hint,
        )  # fmt: skip
    return record, completed


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return f"{amount(len(sizes), 'shard')} of {sum(sizes.values()):,} bytes"


def _merged(first: Done, second: Done, folder: Path) -> Done:
    """Return the note on a tensor of which two parts hold copies. Raises InputError."""
    if first.sha256 != second.sha256:
        raise InputError(
            f"parts differ in the tensor {first.name!r}, of which they hold copies", where=folder,
            expected=f"sha256 {first.sha256}", found=second.sha256,
            hint="write both again, with --force",
        )  # fmt: skip
    nonfinite = tuple(dict.fromkeys((*first.nonfinite, *second.nonfinite)))
    zeros = tuple(name for name in first.zeros if name in second.zeros)
    return replace(second, nonfinite=nonfinite, zeros=zeros)
