"""What a token folder says about its tokens: its ``tokens.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from moecc.checkpoint.problems import Problems, describe
from moecc.errors import InputError
from moecc.support.untyped import JsonDict

T = TypeVar("T")

SCHEMA = "moecc.tokens/1"

DOCUMENTS, EXAMPLES, LABELLED = KINDS = ("documents", "examples", "labelled")
"""Texts; prompts with completions; prompts whose completion is one of a few labels."""


@dataclass(frozen=True)
class Special:
    """The ids of special tokens; None where the tokenizer has none.

    Attributes:
      bos, eos, pad, mask: their ids.
      before, after: what the tokenizer puts around a text, ``[CLS]`` and ``[SEP]`` say.
      sentinels: what stands for hidden spans, in order.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    mask: int | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    sentinels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Label:
    """One of the completions of a labelled folder.

    Attributes:
      text: what it says.
      tokens: its ids.
      count: how many examples have it.
    """

    text: str
    tokens: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class SourceFile:
    """A file that was read.

    Attributes:
      name: its name, without the folder.
      digest: ``sha256:…`` of its bytes.
      size_bytes: its size.
    """

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class TokenFacts:
    """The content of ``tokens.json``.

    Attributes:
      kind: one of `KINDS`.
      tokenizer: ``bytes``, or the name of the folder that it came from.
      tokenizer_digest: ``sha256:…`` of its ``tokenizer.json``; ``bytes/1`` for bytes.
      vocab_size: the number of ids of the tokenizer.
      special: its special tokens.
      dtype: of the ids on disk, ``uint16`` or ``uint32``.
      documents: how many there are.
      tokens: how many there are in all documents, special ones left out.
      largest_id: of all ids in the folder.
      duplicates: documents that were left out because an equal one came before.
      held_out: which part of the texts this is, ``train`` or ``heldout`` of a share; empty: all.
      labels: the labels, by number.
      sources: what was read.
      digest: ``sha256:…`` of the other files of the folder.
    """

    kind: str
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    special: Special
    dtype: str
    documents: int
    tokens: int
    largest_id: int
    digest: str
    duplicates: int = 0
    held_out: str = ""
    labels: tuple[Label, ...] = ()
    sources: tuple[SourceFile, ...] = field(default=())

    def to_json(self) -> JsonDict:
        """Return what ``tokens.json`` contains."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def of_json(cls, data: Mapping[str, object], where: str) -> TokenFacts:
        """Return the facts in a ``tokens.json``.

        Raises:
          InputError: it is of another version, or keys are missing or of another type.
        """
        if data.get("schema") != SCHEMA:
            raise InputError(
                "not tokens that this version reads", where=where, expected=SCHEMA,
                found=describe(data.get("schema")), hint="moecc tokens writes them anew",
            )  # fmt: skip
        problems = Problems()
        given = _Keys(data, where, problems)
        found = cls(
            kind=given.one_of("kind", KINDS),
            tokenizer=given.text("tokenizer"),
            tokenizer_digest=given.text("tokenizer_digest"),
            vocab_size=given.count("vocab_size"),
            special=_special(given.inner("special")),
            dtype=given.one_of("dtype", ("uint16", "uint32")),
            documents=given.count("documents"),
            tokens=given.count("tokens"),
            largest_id=given.count("largest_id"),
            digest=given.text("digest"),
            duplicates=given.count("duplicates"),
            held_out=given.text("held_out"),
            labels=tuple(
                Label(each.text("text"), each.ids("tokens"), each.count("count"))
                for each in given.all("labels")
            ),
            sources=tuple(
                SourceFile(each.text("name"), each.text("digest"), each.count("size_bytes"))
                for each in given.all("sources")
            ),
        )
        problems.raise_if_any()
        return found


def _special(given: _Keys) -> Special:
    return Special(
        bos=given.id_or_none("bos"),
        eos=given.id_or_none("eos"),
        pad=given.id_or_none("pad"),
        mask=given.id_or_none("mask"),
        before=given.ids("before"),
        after=given.ids("after"),
        sentinels=given.ids("sentinels"),
    )


class _Keys:
    """Reads the keys of a JSON object and notes what is wrong."""

    def __init__(self, data: Mapping[str, object], where: str, problems: Problems) -> None:
        self._data = data
        self._where = where
        self._problems = problems

    def text(self, key: str) -> str:
        value = self._data.get(key)
        return value if isinstance(value, str) else self._wrong(key, "a text", "")

    def one_of(self, key: str, choices: tuple[str, ...]) -> str:
        value = self._data.get(key)
        known = isinstance(value, str) and value in choices
        return str(value) if known else self._wrong(key, " | ".join(choices), choices[0])

    def count(self, key: str) -> int:
        value = self._data.get(key)
        whole = type(value) is int and value >= 0
        return int(str(value)) if whole else self._wrong(key, "a whole number", 0)

    def id_or_none(self, key: str) -> int | None:
        return None if self._data.get(key) is None else self.count(key)

    def ids(self, key: str) -> tuple[int, ...]:
        value = self._data.get(key)
        if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
            return tuple(value)
        nothing: tuple[int, ...] = ()
        return self._wrong(key, "a list of ids", nothing)

    def inner(self, key: str) -> _Keys:
        value = self._data.get(key)
        found = value if isinstance(value, dict) else self._wrong(key, "an object", {})
        return _Keys(found, f"{self._where}: {key}", self._problems)

    def all(self, key: str) -> list[_Keys]:
        value = self._data.get(key)
        if isinstance(value, list) and all(isinstance(v, dict) for v in value):
            return [_Keys(v, f"{self._where}: {key}", self._problems) for v in value]
        nothing: list[_Keys] = []
        return self._wrong(key, "a list of objects", nothing)

    def _wrong(self, key: str, expected: str, default: T) -> T:
        found = describe(self._data[key]) if key in self._data else "nothing"
        self._problems.add(
            f"not the {key} of tokens", where=self._where, expected=expected, found=found
        )
        return default
