"""Write a token folder, document by document, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moecc.checkpoint.durable import write_durable
from moecc.checkpoint.files import os_problem
from moecc.support.closing import Closing
from moecc.train.tokens.encoders import Encoder, IdArray
from moecc.train.tokens.facts import DOCUMENTS, LABELLED, Label, SourceFile, TokenFacts
from moecc.train.tokens.folder import COMPLETIONS, FACTS, LABELS, STARTS, TOKENS

_BUFFER_BYTES = 1 << 20


class TokenWriter(Closing):
    """Writes the files of a token folder; `finish` writes its facts.

    A folder without facts is none, so one whose writer was killed is rejected.

    Args:
      folder: an existing empty folder.
      encoder: where ids come from.
      kind: one of `moecc.train.tokens.facts.KINDS`.

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
        self._files = {name: self._open(name) for name in self._names()}
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

    def finish(self, *, sources: list[SourceFile], duplicates: int, held_out: str) -> TokenFacts:
        """Complete the folder and return its facts. Raises MachineError."""
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
            digest=self._digest(),
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
        lines = (f'  "{key}": {json.dumps(value)}' for key, value in facts.to_json().items())
        write_durable(self._folder / FACTS, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        return facts

    @property
    def labels(self) -> int:
        """The number of labels so far."""
        return len(self._labels)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _names(self) -> list[str]:
        names = [TOKENS, STARTS]
        if self._kind != DOCUMENTS:
            names.append(COMPLETIONS)
        if self._kind == LABELLED:
            names.append(LABELS)
        return names

    def _open(self, name: str) -> _Appended:
        return self._stack.enter_context(_Appended(self._folder / name))

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._files[name].write(array.tobytes())

    def _digest(self) -> str:
        """Return one digest of the digests of all files."""
        digests = "\n".join(f"{name} {file.digest}" for name, file in self._files.items())
        return f"sha256:{hashlib.sha256(digests.encode()).hexdigest()}"


class _Appended(Closing):
    """A new file that is written from beginning to end, with the digest of its bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        try:
            self._file: BinaryIO = path.open("xb", _BUFFER_BYTES)
        except OSError as error:
            raise os_problem(error, path, "write") from None

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise os_problem(error, self._path, "write") from None

    def synchronise(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise os_problem(error, self._path, "write") from None

    def close(self) -> None:
        """Close the file."""
        # What the buffer still holds cannot be written to a full disk, which was reported.
        with suppress(OSError):
            self._file.close()
