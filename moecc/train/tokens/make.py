"""Make token folders of texts: encode, leave out duplicates, hold documents out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from moecc.errors import InputError, Problem, UsageError, raise_problems
from moecc.formats.files import os_errors, write_durable
from moecc.formats.output import output_folder
from moecc.support.lazy import np
from moecc.support.process import Closing
from moecc.support.record import to_json
from moecc.support.text import amount
from moecc.train.tokens.documents import (
    CHAT,
    SPLITS,
    Document,
    DocumentFormat,
    DocumentReader,
    format_problems,
    has_records,
    text_files,
)
from moecc.train.tokens.encoders import Encoder, IdArray, open_encoder
from moecc.train.tokens.folder import (
    COMPLETIONS,
    DOCUMENTS,
    FACTS,
    KINDS,
    LABELLED,
    LABELS,
    STARTS,
    TOKENS,
    Label,
    SourceFile,
    TokenFacts,
)

# Write a token folder, document by document, in bounded memory.

_BUFFER_BYTES = 1 << 20


class TokenWriter(Closing):
    """Writes the files of a token folder; `finish` writes its facts.

    A folder without facts is none, so one whose writer was killed is rejected.

    Args:
      folder: an existing empty folder.
      encoder: where ids come from.
      kind: one of `moecc.train.tokens.folder.KINDS`.

    Raises:
      MachineError: the disk is full.
    """

    def __init__(self, folder: Path, encoder: Encoder, kind: str) -> None:
        self._folder = folder
        self._encoder = encoder
        self._kind = kind
        self._dtype = np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")
        self._labels: dict[str, tuple[IdArray, int, int]] = {}
        self.documents = 0
        self.tokens = 0
        self._largest = 0
        self._stack = ExitStack()
        names = [TOKENS, STARTS]
        if kind != DOCUMENTS:
            names.append(COMPLETIONS)
        if kind == LABELLED:
            names.append(LABELS)
        self._files = {n: self._stack.enter_context(_Appended(folder / n)) for n in names}
        self._write(STARTS, np.zeros(1, "<i8"))

    def add(self, ids: IdArray) -> None:
        """Add a document."""
        self._write(TOKENS, ids.astype(self._dtype))
        self.documents += 1
        self.tokens += len(ids)
        self._largest = max(self._largest, int(ids.max(initial=0)))
        self._write(STARTS, np.array([self.tokens], "<i8"))

    def add_example(self, prompt: IdArray, completion: IdArray, text: str) -> None:
        """Add a prompt and its completion, whose text is the label of a labelled folder."""
        self.add(np.concatenate([prompt, completion]))
        self._write(COMPLETIONS, np.array([len(prompt)], "<i4"))
        if self._kind != LABELLED:
            return
        ids, number, count = self._labels.get(text, (completion, len(self._labels), 0))
        self._labels[text] = (ids, number, count + 1)
        self._write(LABELS, np.array([number], "<i4"))

    def add_labels(self, other: TokenWriter) -> None:
        """Add the labels of another part of the texts, which an example could have had here."""
        for text, (ids, _, _) in other._labels.items():
            self._labels.setdefault(text, (ids, len(self._labels), 0))

    def finish(self, *, sources: list[SourceFile], duplicates: int, held_out: str) -> TokenFacts:
        """Complete the folder and return its facts. Raises MachineError."""
        digests = "\n".join(f"{name} {file.digest}" for name, file in self._files.items())
        facts = TokenFacts(
            kind=self._kind,
            tokenizer=self._encoder.name,
            tokenizer_digest=self._encoder.digest,
            vocab_size=self._encoder.vocab_size,
            special=self._encoder.special,
            dtype=self._dtype.newbyteorder("=").name,
            documents=self.documents,
            tokens=self.tokens,
            largest_id=self._largest,
            digest=f"sha256:{hashlib.sha256(digests.encode()).hexdigest()}",
            duplicates=duplicates,
            held_out=held_out,
            labels=tuple(
                Label(text, tuple(ids.tolist()), count)
                for text, (ids, _, count) in self._labels.items()
            ),
            sources=tuple(sources),
        )
        for file in self._files.values():
            file.synchronise()
        lines = (f'  "{key}": {json.dumps(value)}' for key, value in to_json(facts).items())
        write_durable(self._folder / FACTS, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        return facts

    @property
    def labels(self) -> int:
        """The number of labels so far."""
        return len(self._labels)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._files[name].write(array.tobytes())


class _Appended(Closing):
    """A new file that is written from beginning to end, with the digest of its bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        with os_errors(path, "write"):
            self._file: BinaryIO = path.open("xb", _BUFFER_BYTES)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        with os_errors(self._path, "write"):
            self._file.write(data)

    def synchronise(self) -> None:
        with os_errors(self._path, "write"):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        # What the buffer still holds cannot be written to a full disk, which was reported.
        with suppress(OSError):
            self._file.close()


TRAIN, HELD_OUT = "train", "heldout"

MOST_LABELS = 1000

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_GROUPS = {DOCUMENTS: "text", CHAT: "messages before the first answer"}
"""What documents that are held out together have in common, by kind; of others the prompt."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Making:
    """The token folders to make.

    Attributes:
      texts: files and folders.
      tokenizer: a folder with a ``tokenizer.json``, or ``bytes``.
      format: how documents are made of files.
      include: patterns of the names of files in folders.
      hold_out: the share of documents that is held out, in a folder of its own; 0 for none.
      deduplicate: whether the second of equal documents is left out.
    """

    texts: tuple[str, ...]
    tokenizer: str
    format: DocumentFormat = field(default_factory=DocumentFormat)
    include: tuple[str, ...] = ()
    hold_out: float = 0.0
    deduplicate: bool = True


def make_tokens(
    making: Making, out: Path, *, force: bool = False, progress: Progress | None = None
) -> dict[str, TokenFacts]:
    """Write token folders and return their facts, by the name of the folder in `out`.

    Without documents that are held out there is one, `out` itself, whose name is empty.

    Args:
      making: what is made.
      out: the folder to write.
      force: whether an existing one is replaced.
      progress: is called with the bytes that are read, and all.

    Raises:
      UsageError: an option has no such value.
      InputError: a file is missing or wrong, nothing is left of the corpus, or the output is not
        empty; all problems of the files at once.
      MachineError: a library is missing, or the disk is full.
    """
    problems = []
    if not 0 <= making.hold_out < 1:
        problems.append(
            Problem(
                "not a share of documents",
                "--hold-out",
                "at least 0, below 1",
                str(making.hold_out),
            )
        )
    if making.format.split not in SPLITS:
        problems.append(
            Problem("no such split", "--split", " | ".join(SPLITS), making.format.split)
        )
    kinds = (*KINDS, CHAT)
    if making.format.kind not in kinds:
        problems.append(Problem("no such kind", "--kind", " | ".join(kinds), making.format.kind))
    problems += format_problems(making.format)
    raise_problems(problems, UsageError)
    files = text_files(making.texts, making.include)
    with ExitStack() as stack:
        encoder = stack.enter_context(open_encoder(making.tokenizer))
        if making.format.kind == CHAT:
            chat = replace(making.format, template=encoder.chat_template())
            making = replace(making, format=chat)
            # The template writes all special tokens itself.
            encoder.special = replace(encoder.special, before=(), after=(), eos=None)
        folder = stack.enter_context(output_folder(out, inputs=files, force=force))
        return _TokenMaker(making, encoder, folder, stack).make(files, progress)


class _TokenMaker:
    """Writes one folder, or two."""

    def __init__(self, making: Making, encoder: Encoder, folder: Path, stack: ExitStack) -> None:
        self._making = making
        self._encoder = encoder
        self._reader = DocumentReader(making.format)
        self._duplicates = {"": 0, TRAIN: 0, HELD_OUT: 0}
        self._hashes: set[int] = set()
        self._draws: set[int] = set()
        self._writers: dict[str, TokenWriter] = {}
        for name in (TRAIN, HELD_OUT) if making.hold_out else ("",):
            part = folder / name
            part.mkdir(exist_ok=True)
            writer = TokenWriter(part, encoder, making.format.folder_kind)
            self._writers[name] = stack.enter_context(writer)

    def make(self, files: Sequence[Path], progress: Progress | None) -> dict[str, TokenFacts]:
        sizes = [file.stat().st_size for file in files]
        for number, file in enumerate(files):
            for batch in self._batches(file):
                # Once a problem was found, files are read to find the others.
                if not self._reader.has_problems:
                    self._write(batch)
            if progress is not None:
                progress(sum(sizes[: number + 1]), sum(sizes))
        self._reader.problems.raise_if_any()
        self._require_documents(files)
        for writer, other in permutations(self._writers.values(), 2):
            writer.add_labels(other)
        return {
            name: writer.finish(
                sources=self._reader.sources,
                duplicates=self._duplicates[name],
                held_out=f"{name} {self._making.hold_out}" if name else "",
            )
            for name, writer in self._writers.items()
        }

    def _batches(self, file: Path) -> Iterator[list[tuple[str, Document]]]:
        """Yield documents with the names of the folders that they belong to."""
        batch: list[tuple[str, Document]] = []
        size = 0
        for document in self._reader.read(file):
            part = self._part_of(document)
            if part is None:
                continue
            batch.append((part, document))
            size += len(document.text)
            if size > _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
        yield batch

    def _part_of(self, document: Document) -> str | None:
        """Return the folder of a document, or None where an equal one came before.

        Examples with equal prompts are in one folder, and so are the answers of a conversation:
        what is predicted in one must not be read in the other.
        """
        draw = _hash((document.group or document.text).strip())
        if len(self._draws) < 2:
            self._draws.add(draw)
        held_out = draw < self._making.hold_out * 2**64
        name = (HELD_OUT if held_out else TRAIN) if self._making.hold_out else ""
        if not self._making.deduplicate:
            return name
        identity = draw
        if document.completion is not None:
            identity = _hash(f"{len(document.text)} {document.text}{document.completion}")
        if identity in self._hashes:
            self._duplicates[name] += 1
            return None
        self._hashes.add(identity)
        return name

    def _write(self, batch: Sequence[tuple[str, Document]]) -> None:
        texts = [document.text for _, document in batch]
        is_text = self._making.format.kind == DOCUMENTS
        endings = [] if is_text else [document.completion or "" for _, document in batch]
        ids = self._encoder.encode([*texts, *endings])
        for number, (name, document) in enumerate(batch):
            writer = self._writers[name]
            if document.completion is None:
                writer.add(ids[number])
                continue
            writer.add_example(ids[number], ids[len(batch) + number], document.completion)
            if writer.labels > MOST_LABELS:
                raise InputError(
                    "too many labels",
                    where="--completion",
                    expected=f"at most {MOST_LABELS}",
                    hint="--kind examples has completions that differ",
                )

    def _require_documents(self, files: Sequence[Path]) -> None:
        empty = [name for name, writer in self._writers.items() if not writer.tokens]
        if not empty:
            return
        count = sum(writer.documents for writer in self._writers.values())
        if count:
            counted = f"{amount(count, 'document')} in all"
            hint = "another share, or --split paragraph for more documents"
            if all(map(has_records, files)):
                hint = "another share, or more records"
            if count > 1 and len(self._draws) == 1:
                counted += f", with the same {_GROUPS.get(self._making.format.kind, 'prompt')}"
                hint = "such documents are held out together: add records with others"
            raise InputError(
                f"no document is left for {' and '.join(empty)}",
                where="--hold-out",
                expected="documents in both parts",
                found=counted,
                hint=hint,
            )
        raise InputError(
            "the corpus is empty",
            where=", ".join(map(str, files[:4])),
            expected="a text that is not white space",
        )


def _hash(text: str) -> int:
    """Return 64 bits that depend on nothing but `text`."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
