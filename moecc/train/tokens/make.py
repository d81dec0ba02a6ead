"""Make token folders of texts: encode, leave out duplicates, hold documents out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from moecc.checkpoint.outdir import output_folder
from moecc.errors import InputError, Problem, UsageError
from moecc.support.text import amount
from moecc.train.tokens.documents import SPLITS, Document, Format, Reader, text_files
from moecc.train.tokens.encoders import Encoder, open_encoder
from moecc.train.tokens.facts import DOCUMENTS, KINDS, TokenFacts
from moecc.train.tokens.writer import TokenWriter

TRAIN, HELD_OUT = "train", "heldout"

MOST_LABELS = 1000

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Making:
    """What is made.

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
    format: Format = field(default_factory=Format)
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
    _check(making)
    files = text_files(making.texts, making.include)
    with ExitStack() as stack:
        encoder = stack.enter_context(open_encoder(making.tokenizer))
        folder = stack.enter_context(output_folder(out, inputs=files, force=force))
        return _Maker(making, encoder, folder, stack).make(files, progress)


def _check(making: Making) -> None:
    problems = []
    if not 0 <= making.hold_out < 1:
        problems.append(Problem("not a share of documents", "--hold-out", "at least 0, below 1",
                                str(making.hold_out)))  # fmt: skip
    if making.format.split not in SPLITS:
        problems.append(Problem("no such split", "--split", " | ".join(SPLITS),
                                making.format.split))  # fmt: skip
    if making.format.kind not in KINDS:
        problems.append(Problem("no such kind", "--kind", " | ".join(KINDS), making.format.kind))
    if problems:
        raise UsageError(problems)


class _Maker:
    """Writes one folder, or two."""

    def __init__(self, making: Making, encoder: Encoder, folder: Path, stack: ExitStack) -> None:
        self._making = making
        self._encoder = encoder
        self._reader = Reader(making.format)
        self._duplicates = {"": 0, TRAIN: 0, HELD_OUT: 0}
        self._seen: set[int] = set()
        self._writers: dict[str, TokenWriter] = {}
        for name in (TRAIN, HELD_OUT) if making.hold_out else ("",):
            place = folder / name
            place.mkdir(exist_ok=True)
            writer = TokenWriter(place, encoder, making.format.kind)
            self._writers[name] = stack.enter_context(writer)

    def make(self, files: Sequence[Path], progress: Progress | None) -> dict[str, TokenFacts]:
        sizes = [file.stat().st_size for file in files]
        for number, file in enumerate(files):
            for batch in self._batches(file):
                # Once a problem was found, files are read to find the others.
                if not self._reader.problems:
                    self._write(batch)
            if progress is not None:
                progress(sum(sizes[: number + 1]), sum(sizes))
        self._reader.problems.raise_if_any()
        self._require_documents(files)
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
            place = self._place(document)
            if place is None:
                continue
            batch.append((place, document))
            size += len(document.text)
            if size > _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
        yield batch

    def _place(self, document: Document) -> str | None:
        """Return the folder of a document, or None where an equal one came before.

        Examples with equal prompts are in one folder: the answer must not be in the other.
        """
        draw = _hash(document.text.strip())
        held_out = draw < self._making.hold_out * 2**64
        name = (HELD_OUT if held_out else TRAIN) if self._making.hold_out else ""
        if not self._making.deduplicate:
            return name
        whole = draw if document.completion is None else _hash(_joined(document))
        if whole in self._seen:
            self._duplicates[name] += 1
            return None
        self._seen.add(whole)
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
                    "too many labels", where="--completion", expected=f"at most {MOST_LABELS}",
                    hint="--kind examples has completions that differ",
                )  # fmt: skip

    def _require_documents(self, files: Sequence[Path]) -> None:
        empty = [name for name, writer in self._writers.items() if not writer.tokens]
        if not empty:
            return
        count = sum(writer.documents for writer in self._writers.values())
        if count:
            raise InputError(
                f"no document is left for {' and '.join(empty)}", where="--hold-out",
                expected="documents in both parts", found=f"{amount(count, 'document')} in all",
                hint="another share, or --split paragraph for more documents",
            )  # fmt: skip
        raise InputError(
            "the corpus is empty", where=", ".join(map(str, files[:4])),
            expected="a text that is not white space",
        )  # fmt: skip


def _hash(text: str) -> int:
    """Return 64 bits that depend on nothing but `text`."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _joined(document: Document) -> str:
    return f"{len(document.text)} {document.text}{document.completion}"
