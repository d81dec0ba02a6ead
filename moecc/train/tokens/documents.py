"""Documents of text files, JSON lines, Parquet and Arrow, plain or under gzip."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from moecc.chat import ASSISTANT, ChatTemplate, message_problems
from moecc.errors import InputError, MachineError, Problem, Problems, describe
from moecc.formats.files import identify, os_errors
from moecc.support.extras import install_hint
from moecc.support.untyped import Json
from moecc.train.tokens.folder import DOCUMENTS, EXAMPLES, SourceFile

CHAT, MESSAGES = "chat", "messages"
"""The kind of conversations, whose answers become examples, and their key by default."""

SPLITS = ("file", "line", "paragraph", "form-feed")
"""The separators of documents in a text file."""

LARGEST_DOCUMENT_BYTES = 64 << 20

SHOWN_RECORDS = 4
"""The limit on the records that a message names; more are counted."""

_READ_BYTES = 1 << 20
_JSON = (".jsonl", ".ndjson")
_ARROW = ".arrow"
_DATASETS = ("state.json", "dataset_info.json", "dataset_dict.json", "cache-*")
"""What ``datasets`` saves beside the rows of a data set."""
_MAGIC = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"%PDF-",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
)
"""The first bytes of files that are no texts: images, documents and archives."""
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Document:
    """A text, or a prompt with its completion.

    Attributes:
      text: the text, or the prompt.
      completion: what is to follow it; None of a text.
      group: a text whose documents are held out together; the text itself by default.
    """

    text: str
    completion: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class DocumentFormat:
    """The way from the records of files to documents.

    Attributes:
      kind: one of `moecc.train.tokens.folder.KINDS`, or `CHAT`.
      field: the key of a text, or of the messages of a conversation.
      split: one of `SPLITS`, for text files.
      prompt: of examples, a text with ``{key}`` for what a record has there.
      completion: likewise.
      template: of conversations.
    """

    kind: str = DOCUMENTS
    field: str = "text"
    split: str = "file"
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    template: ChatTemplate | None = None

    @property
    def folder_kind(self) -> str:
        """The kind of the token folder."""
        return EXAMPLES if self.kind == CHAT else self.kind

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that a record must have."""
        if self.kind in (DOCUMENTS, CHAT):
            return (self.field,)
        names = _FIELD.findall(self.prompt) + _FIELD.findall(self.completion)
        return tuple(dict.fromkeys(names))

    def documents(self, record: Json) -> Iterator[Document]:
        """Yield the documents of a record that has the keys; of a conversation, one an answer.

        Raises:
          InputError: the chat template fails.
        """
        if self.kind == DOCUMENTS:
            yield Document(str(record[self.field]))
        elif self.template is not None:
            messages = record[self.field]
            roles = [message["role"] for message in messages]
            opening = messages[: roles.index(ASSISTANT)] if ASSISTANT in roles else messages
            # A conversation may begin with an answer.
            group = json.dumps(opening or messages[:1], sort_keys=True)
            for prompt, answer in self.template.turns(messages):
                yield Document(prompt, answer, group)
        else:
            yield Document(_filled(self.prompt, record), _filled(self.completion, record))


def format_problems(format: DocumentFormat) -> Iterator[Problem]:
    """Yield the options that have no effect on records of a kind, and a completion without keys."""
    is_template = format.kind not in (DOCUMENTS, CHAT)
    names, hint = ["prompt", "completion"], "--kind examples and --kind labelled have templates"
    if is_template:
        names, hint = ["field"], "--prompt and --completion name the keys: '{KEY}'"
    for name in names:
        value = getattr(format, name)
        if value != getattr(DocumentFormat, name):
            message = f"it has no effect on records of --kind {format.kind}"
            yield Problem(message, f"--{name}", None, value, hint)
    if is_template and not _FIELD.search(format.completion):
        yield Problem(
            "every completion would be the same",
            "--completion",
            "a template with {KEY} for a value of the record",
            format.completion,
            f"--completion '{{{format.completion.strip()}}}'"
            if format.completion.strip()
            else None,
        )


def format_remarks(format: DocumentFormat) -> Iterator[str]:
    """Yield a remark where every prompt is the same text."""
    if format.kind not in (DOCUMENTS, CHAT) and format.prompt and not _FIELD.search(format.prompt):
        yield f"every prompt is {format.prompt!r}: {{KEY}} stands for a value of the record"


def _filled(template: str, record: Json) -> str:
    return _FIELD.sub(lambda match: str(record[match.group(1)]), template)


def text_files(paths: Sequence[str], include: Sequence[str]) -> list[Path]:
    """Return the files that are given, those of folders in the order of their names.

    Args:
      paths: files and folders; what is hidden in a folder is left out.
      include: patterns, one of which the name of a file in a folder must match; all by default.

    Raises:
      InputError: one does not exist or is no regular file, there is no file at all, or a folder
        has the splits of a data set.
    """
    files_of_text: list[Path] = []
    problems = Problems()
    for name in paths:
        path = Path(name)
        with problems:
            files = _inside(path, include) if path.is_dir() else [path]
            files_of_text.extend(files)
            for file in files:
                with problems:
                    identify(file)
    problems.raise_if_any()
    if not files_of_text:
        hint = f"none matches --include {' '.join(include)}" if include else None
        raise InputError("no files of text", where=", ".join(paths), hint=hint)
    return files_of_text


def _inside(folder: Path, include: Sequence[str]) -> list[Path]:
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        splits = [f for f in folders if Path(root, f, "state.json").is_file()]
        if "dataset_dict.json" in names and len(splits) > 1:
            raise InputError(
                "the folder has several splits of a data set",
                where=root,
                expected="one of them",
                found=", ".join(splits),
                hint=f"moecc tokens {Path(root, 'train' if 'train' in splits else splits[0])} …",
            )
        if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= {*names}:
            names = [n for n in names if not any(fnmatchcase(n, p) for p in _DATASETS)]
        for name in sorted(names):
            fits = not include or any(fnmatchcase(name, pattern) for pattern in include)
            if fits and not name.startswith("."):
                files.append(Path(root, name))
    return files


def has_records(path: Path) -> bool:
    """Whether a file has records, by its name, and no text."""
    name = path.name.removesuffix(".gz").lower()
    return name.endswith((*_JSON, ".parquet", _ARROW))


_ProblemKind = tuple[str, str | None]
"""The message of a problem, and what was expected."""


@dataclass
class DocumentReader:
    """Reads documents, file by file.

    Attributes:
      format: how documents are made.
      problems: what is wrong with the files; reading goes on, to find all of it.
      sources: the files that were read to their end.
    """

    format: DocumentFormat
    problems: Problems = field(default_factory=Problems)
    sources: list[SourceFile] = field(default_factory=list)
    _empty: int = field(init=False, default=0)
    _alike: dict[_ProblemKind, list[Problem]] = field(init=False, default_factory=dict)
    _counts: Counter[_ProblemKind] = field(init=False, default_factory=Counter)

    @property
    def has_problems(self) -> bool:
        """Whether something is wrong with what was read."""
        return bool(self.problems or self._alike)

    def read(self, path: Path) -> Iterator[Document]:
        """Yield the documents of a file.

        Raises:
          MachineError: the file cannot be read, or is Parquet and pyarrow is not installed.
        """
        self._empty = 0
        with os_errors(path), self.problems:
            try:
                yield from self._documents(path)
            finally:
                self.problems.extend(
                    _merged(alike, self._counts[kind], path) for kind, alike in self._alike.items()
                )
                self._alike.clear()
                self._counts.clear()

    def _note(self, problems: Iterable[Problem]) -> None:
        """Record problems of a record; those of a file that are alike become one."""
        for problem in problems:
            kind = problem.message, problem.expected
            self._counts[kind] += 1
            if self._counts[kind] <= SHOWN_RECORDS:
                self._alike.setdefault(kind, []).append(problem)

    def _documents(self, path: Path) -> Iterator[Document]:
        name = path.name.removesuffix(".gz").lower()
        if name.endswith((".parquet", _ARROW)):
            yield from self._table(path)
            return
        with _opened(path) as (stream, digest):
            if name.endswith(_JSON):
                yield from self._json(stream, path)
            elif self.format.kind != DOCUMENTS:
                raise InputError(
                    "examples are read from JSON lines, Parquet and Arrow",
                    where=path,
                    expected=".jsonl, .ndjson, .parquet or .arrow, and .gz of the first two",
                )
            else:
                is_empty = True
                for text in _texts(stream, self.format.split, path):
                    is_empty = False
                    yield Document(text)
                self._empty += is_empty
            digest.rest()
        self.sources.append(digest.source(path, self._empty))

    def _json(self, stream: IO[bytes], path: Path) -> Iterator[Document]:
        for number, line in enumerate(_lines(stream, path), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = (
                    error.msg if isinstance(error, json.JSONDecodeError) else "too deep or long"
                )
                lines = "a record is a line; jq -c '.[]' makes lines of the list of a file"
                hint = lines if number == 1 and line.lstrip().startswith(b"[") else None
                self._note([Problem(f"not JSON: {reason}", where, hint=hint)])
                continue
            if not isinstance(record, dict):
                self._note([Problem("not an object", where, found=describe(record))])
            else:
                yield from self._record(record, where)

    def _record(self, record: Json, where: str) -> Iterator[Document]:
        """Yield the document of a record; what it lacks goes to the problems.

        A text of white space alone is left out.
        """
        faults = [
            p for key in self.format.keys for p in _key_fault(record, key, self.format, where)
        ]
        self._note(faults)
        if faults:
            return
        try:
            for document in self.format.documents(record):
                if document.completion is not None or document.text.strip():
                    yield document
                else:
                    self._empty += 1
        except InputError as error:
            self._note(error.problems)

    def _table(self, path: Path) -> Iterator[Document]:
        """Yield the documents of a table of Parquet, or of Arrow as ``datasets`` saves it."""
        try:
            from pyarrow import ArrowException
            from pyarrow.ipc import open_stream
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise MachineError(
                "Parquet and Arrow need pyarrow", where=path, hint=install_hint("parquet")
            ) from None
        keys = list(self.format.keys)
        digest = _Digest(path)
        digest.rest()
        try:
            with path.open("rb") as stream:
                if path.suffix == _ARROW:
                    table = open_stream(stream)
                    names, batches = table.schema.names, iter(table)
                else:
                    file = ParquetFile(stream)
                    names = file.schema_arrow.names
                    columns = [key for key in keys if key in names]
                    batches = file.iter_batches(batch_size=256, columns=columns)
                missing = [key for key in keys if key not in names]
                if missing:
                    raise InputError(
                        "the table lacks columns",
                        where=path,
                        expected=", ".join(keys),
                        found=", ".join(names),
                        hint=_other_key(missing[0], names, self.format),
                    )
                rows = (row for batch in batches for row in batch.select(keys).to_pylist())
                for number, record in enumerate(rows, 1):
                    yield from self._record(record, f"{path}: row {number}")
        except ArrowException as error:
            kind = "Arrow" if path.suffix == _ARROW else "Parquet"
            raise InputError(f"not {kind}: {str(error)[:300]}", where=path) from None
        self.sources.append(digest.source(path, self._empty))


def _merged(alike: Sequence[Problem], count: int, path: Path) -> Problem:
    """Return one problem of `count` records of a file, of the first of which it is `alike`."""
    first, *others = alike
    places = [str(problem.where).removeprefix(f"{path}:").strip() for problem in others]
    more = f" and {count - len(alike):,} more" if count > len(alike) else ""
    return replace(first, where=", ".join([str(first.where), *places]) + more)


def _key_fault(record: Json, key: str, format: DocumentFormat, where: str) -> Iterator[Problem]:
    if key not in record:
        keys = ", ".join(map(str, list(record)[:8])) or "no keys"
        hint = _other_key(key, record, format)
        yield Problem(f"the record has no {key!r}", where, None, keys, hint=hint)
    elif format.kind == CHAT:
        yield from message_problems(record[key], where)
    elif type(record[key]) not in ((str,) if format.kind == DOCUMENTS else (str, int, float)):
        hint = _other_key(key, record, format)
        yield Problem(f"{key!r} is not a text", where, "a text", describe(record[key]), hint=hint)
    elif any("\ud800" <= c <= "\udfff" for c in str(record[key])):
        yield Problem(f"{key!r} has half a surrogate pair", where, "characters of Unicode")


def _other_key(key: str, names: Collection[str], format: DocumentFormat) -> str:
    """Return the kind of records with keys of these `names`, or how another key is named."""
    if MESSAGES in names and format.kind != CHAT:
        return "--kind chat reads conversations"
    if format.kind == DOCUMENTS and {"prompt", "completion"} <= {*names}:
        return "--kind examples reads prompts and completions"
    if format.kind in (DOCUMENTS, CHAT):
        return "--field names another key"
    if key in _FIELD.findall(format.prompt):
        return "--prompt '{KEY}' names another key"
    return "--completion '{KEY}' names another key"


class _Digest(io.RawIOBase):
    """A file that is read from its beginning to its end, and the digest of its bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._hash = hashlib.sha256()
        self._size_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._hash.update(memoryview(buffer)[:count])
        self._size_bytes += count
        return count

    def rest(self) -> None:
        """Read what is left."""
        buffer = bytearray(_READ_BYTES)
        while self.readinto(buffer):
            pass

    def source(self, path: Path, empty: int) -> SourceFile:
        return SourceFile(path.name, f"sha256:{self._hash.hexdigest()}", self._size_bytes, empty)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], _Digest]]:
    """Open a file, under gzip where its name says so, as a stream and with its digest.

    Raises:
      InputError: it is not under gzip, or is cut short.
    """
    digest = _Digest(path)
    raw = io.BufferedReader(digest, _READ_BYTES)
    try:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, digest  # type: ignore[misc]
        else:
            yield raw, digest
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"not a whole gzip file: {error}", where=path) from None
    finally:
        raw.close()


def _texts(stream: IO[bytes], split: str, path: Path) -> Iterator[str]:
    """Yield the documents of a text; those of white space alone are left out.

    Raises:
      InputError: it is not UTF-8, or a document is too long.
    """
    for part in _parts(stream, split, path):
        try:
            text = part.decode()
        except UnicodeDecodeError as error:
            before = part[max(0, error.start - 20) : error.start]
            found = f"the byte 0x{part[error.start]:02x} after {before!r}"
            include = "of a folder, --include '*.txt' reads the files of a name alone"
            hint = f"if it is text, iconv -f latin1 -t utf-8 converts it; {include}"
            # A text in another encoding has no zeros, but in UTF-16, whose mark it begins with.
            if part.startswith((b"\xff\xfe", b"\xfe\xff")):
                hint = f"iconv -f utf-16 -t utf-8 converts it; {include}"
            elif b"\0" in part or part.startswith(_MAGIC):
                raise InputError("not a text", where=path, hint=include) from None
            raise InputError("the text is not UTF-8", where=path, found=found, hint=hint) from None
        if text.strip():
            yield text


def _parts(stream: IO[bytes], split: str, path: Path) -> Iterator[bytes]:
    if split == "file":
        part = stream.read(LARGEST_DOCUMENT_BYTES + 1)
        if len(part) > LARGEST_DOCUMENT_BYTES:
            raise _too_long(path)
        yield part
    elif split == "line":
        yield from _lines(stream, path)
    else:
        yield from _joined(_lines(stream, path), path, split)


def _lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield lines. Raises InputError for one that is too long."""
    while line := stream.readline(LARGEST_DOCUMENT_BYTES + 1):
        if len(line) > LARGEST_DOCUMENT_BYTES:
            raise _too_long(path)
        yield line


def _too_long(path: Path) -> InputError:
    return InputError(
        "the document is too long",
        where=path,
        expected=f"at most {LARGEST_DOCUMENT_BYTES:,} bytes",
        hint="--split paragraph, line or form-feed makes documents of the parts of a file",
    )


def _joined(lines: Iterable[bytes], path: Path, split: str) -> Iterator[bytes]:
    """Yield what is between blank lines, or form feeds. Raises InputError where it is too long."""
    part: list[bytes] = []
    size_bytes = 0
    for line in lines:
        blank = [b"", b""] if split == "paragraph" and not line.strip() else [line]
        for number, piece in enumerate(line.split(b"\f") if split == "form-feed" else blank):
            if number:
                yield b"".join(part)
                part, size_bytes = [], 0
            size_bytes += len(piece)
            if size_bytes > LARGEST_DOCUMENT_BYTES:
                raise _too_long(path)
            part.append(piece)
    yield b"".join(part)
