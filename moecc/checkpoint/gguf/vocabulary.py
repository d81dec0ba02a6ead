"""The vocabulary in a GGUF file's metadata, read and checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.checkpoint.gguf.keys import shown, token_id
from moecc.checkpoint.gguf.metadata import GgufArray, Value
from moecc.checkpoint.problems import quoted
from moecc.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of a token, as numbered by llama.cpp."""

_PREFIX = "tokenizer.ggml."
# llama.cpp's defaults for missing keys, by the model of the tokenizer.
_SPECIAL_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {},
}
BOS_PRE_TOKENIZERS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary.

    Attributes:
      model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE).
      pre: how text is cut before the merges, ``smollm``; empty for ``llama``.
      tokens: the text of each id.
      types: the type of each id, `NORMAL` to `BYTE`.
      scores: the score of each id, for ``llama``.
      merges: pairs that merge, most urgent first, for ``gpt2``.
      special: ids by ``bos``, ``eos``, ``unknown`` and ``padding``, as far as the file has them.
      ends: every id that ends a text or a turn, the end of the text first.
      adds_bos: whether a text begins with the id of ``bos``.
      adds_eos: whether a text ends with the id of ``eos``.
      adds_space: whether a space is put before a text, for ``llama``.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    special: dict[str, int]
    ends: list[int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool

    def index(self) -> dict[str, int]:
        """Return the id of each token, without the padding rows of the embedding."""
        return {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if not (kind == UNUSED and token == f"[PAD{number}]")
        }


def read_vocabulary(metadata: Mapping[str, Value], rows: int) -> Vocabulary:
    """Read the vocabulary of a model whose embedding has `rows` rows.

    Raises:
      InputError: the first error that makes it unusable.
      MachineError: the file cannot be read.
    """
    model = _text(metadata, "model")
    if model not in _SPECIAL_DEFAULTS:
        expected = f"one of {', '.join(_SPECIAL_DEFAULTS)}"
        raise _unusable("model", "moecc does not know this kind of tokenizer", expected, model)
    tokens = _strings(metadata, "tokens")
    if len(tokens) > rows:
        raise _unusable("tokens", "more tokens than the embedding", f"{rows:,}", f"{len(tokens):,}")
    _refuse_duplicates(tokens)
    special = _special(metadata, _SPECIAL_DEFAULTS[model], len(tokens))
    pre = _text(metadata, "pre") if model == "gpt2" else ""
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=_types(metadata, len(tokens)),
        scores=_numbers(metadata, "scores", len(tokens)) if model == "llama" else [],
        merges=_merges(metadata, set(tokens)) if model == "gpt2" else [],
        special={name: number for name, number in special.items() if name in _NAMED},
        ends=_ends(special),
        adds_bos=_flag(metadata, "add_bos_token", model == "llama" or pre in BOS_PRE_TOKENIZERS),
        adds_eos=_flag(metadata, "add_eos_token", False),
        adds_space=_flag(metadata, "add_space_prefix", model == "llama"),
    )


_NAMED = ("bos", "eos", "unknown", "padding")


def _refuse_duplicates(tokens: list[str]) -> None:
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            what = f"two ids have the token {quoted(token)}"
            raise _unusable("tokens", what, "one id each", "a second one")
        seen.add(token)


def _types(metadata: Mapping[str, Value], count: int) -> list[int]:
    types = _numbers(metadata, "token_type", count)
    odd = next((kind for kind in types if kind not in range(NORMAL, BYTE + 1)), None)
    if odd is not None:
        raise _unusable("token_type", "unknown type of a token", "1 to 6", f"{odd}")
    return [int(kind) for kind in types]


def _special(
    metadata: Mapping[str, Value], defaults: Mapping[str, int], count: int
) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in (*_NAMED, "eot", "eom"):
        stated = f"{_PREFIX}{name}_token_id" in metadata
        number = token_id(metadata, name, count) if stated else defaults.get(name)
        if number is not None and number < count:
            found[name] = number
    return found


def _ends(special: Mapping[str, int]) -> list[int]:
    return list(dict.fromkeys(special[name] for name in ("eos", "eot", "eom") if name in special))


def _merges(metadata: Mapping[str, Value], tokens: set[str]) -> list[tuple[str, str]]:
    merges = []
    for line in _strings(metadata, "merges"):
        left, space, right = line.partition(" ")
        if not space or not {left, right, left + right} <= tokens:
            expected = "two tokens with a space between, which together are a token"
            raise _unusable("merges", "not a valid merge", expected, quoted(line))
        merges.append((left, right))
    return merges


def _text(metadata: Mapping[str, Value], name: str) -> str:
    value = metadata.get(_PREFIX + name)
    if isinstance(value, str):
        return value
    what = "the file does not state this" if value is None else "not a string"
    raise _unusable(name, what, "a string", shown(value))


def _flag(metadata: Mapping[str, Value], name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if isinstance(value, bool):
        return value
    raise _unusable(name, "neither true nor false", "true or false", shown(value))


def _strings(metadata: Mapping[str, Value], name: str) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if isinstance(value, GgufArray):
        return value.strings()
    raise _unusable(name, "not an array", "an array of strings", shown(value))


def _numbers(metadata: Mapping[str, Value], name: str, count: int) -> list[float]:
    value = metadata.get(_PREFIX + name)
    if isinstance(value, GgufArray) and value.count == count:
        numbers: list[float] = value.numbers().tolist()
        return numbers
    raise _unusable(name, "not one number a token", f"an array of {count:,} numbers", shown(value))


def _unusable(name: str, what: str, expected: str, found: str) -> InputError:
    return InputError(what, where=_PREFIX + name, expected=expected, found=found)
