"""The tokenizer's keys of a GGUF file: copied from another GGUF file, or made of tokenizer.json.

The reverse of `moecc.formats.gguf.tokenizer`.  llama.cpp knows the rules that cut text into
words by name; a tokenizer.json whose rules have none is not written, rather than nearly right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moecc.errors import InputError
from moecc.formats.files import read_bounded
from moecc.formats.gguf.header import Key
from moecc.formats.gguf.reader import GgufFile
from moecc.formats.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    pairs_of_scores,
)
from moecc.formats.source import Checkpoint
from moecc.support.documents import parse_json
from moecc.support.problems import quoted
from moecc.support.untyped import Json, JsonDict

MAX_FILE_BYTES = 64 << 20
_MAX_VALUES = 1 << 23
_PREFIX = "tokenizer.ggml."
_NONE = [Key(f"{_PREFIX}model", "none")]
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

Vocab = tuple[list[str], list[int]]
"""The text and the type of each id."""


def tokenizer_keys(checkpoint: Checkpoint, rows: int) -> tuple[list[Key], str | None]:
    """Return the keys, and why there is no tokenizer among them if there is none.

    Args:
      checkpoint: the source, a GGUF file or a folder.
      rows: those of the embedding; ids beyond the vocabulary become unused tokens.

    Raises:
      MachineError: a file cannot be read.
    """
    if isinstance(checkpoint, GgufFile):
        keys = checkpoint.stored_keys("tokenizer.")
        return (keys, None) if keys else (_NONE, "the source has none")
    files = checkpoint.companions()
    if "tokenizer.json" not in files:
        return _NONE, "there is no tokenizer.json"
    try:
        settings = _Settings(files, checkpoint.config)
        return _translated(_json_of(files, "tokenizer.json"), settings, rows), None
    except InputError as error:
        problem = error.problems[0]
        return _NONE, f"{problem.message}" + (f" ({problem.found})" if problem.found else "")


class _Settings:
    """The settings beside tokenizer.json: special tokens and the chat template."""

    def __init__(self, files: Json, config: Json) -> None:
        self._files = files
        self.model = config
        self.tokenizer: Json = _json_of(files, "tokenizer_config.json")
        self.generation: Json = _json_of(files, "generation_config.json")

    def special(self, short: str, ids: Mapping[str, int]) -> int | None:
        """Return the id of a special token, ``bos`` and so on."""
        named = self.tokenizer.get(f"{short}_token")
        text = named.get("content") if isinstance(named, Mapping) else named
        if isinstance(text, str) and text in ids:
            return ids[text]
        for stated in (self.generation, self.model):
            stated_id = stated.get(f"{short}_token_id")
            first = stated_id[0] if isinstance(stated_id, list) and stated_id else stated_id
            if type(first) is int:
                return first
        return None

    def chat_template(self) -> str | None:
        """Return the default chat template."""
        if "chat_template.jinja" in self._files:
            return _bytes_of(self._files["chat_template.jinja"]).decode("utf-8", "replace")
        stated = self.tokenizer.get("chat_template")
        named = stated if isinstance(stated, list) else []
        texts = {str(t.get("name")): t.get("template") for t in named if isinstance(t, Mapping)}
        template = texts.get("default", stated)
        return template if isinstance(template, str) else None


def _json_of(files: Json, name: str) -> JsonDict:
    if name not in files:
        return {}
    document = parse_json(_bytes_of(files[name]), name, max_values=_MAX_VALUES)
    return document if isinstance(document, dict) else {}


def _bytes_of(content: Any) -> bytes:
    return content if isinstance(content, bytes) else read_bounded(content, MAX_FILE_BYTES)


def _translated(file: Json, settings: _Settings, rows: int) -> list[Key]:
    model = file.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise _unusable("only byte-level and SentencePiece BPE have a form in GGUF", str(kind))
    is_pieces = bool(model.get("byte_fallback"))
    tokens, types = _vocabulary(file, model, rows)
    make = _pieces if is_pieces else _byte_level
    named = {text: number for number, text in enumerate(tokens)}
    first, last = _ends(file)
    keys: JsonDict = {
        **make(file, model, (tokens, types)),
        "tokens": tokens,
        "token_type": types,
        "add_bos_token": first,
        "add_eos_token": last,
    }
    for short, word in _SPECIAL.items():
        number = settings.special(short, named)
        if number is not None and 0 <= number < rows:
            keys[f"{word}_token_id"] = number
    entries = [Key(_PREFIX + name, value) for name, value in keys.items()]
    template = settings.chat_template()
    _require_text(template or "")
    return entries if template is None else [*entries, Key("tokenizer.chat_template", template)]


def _vocabulary(file: Json, model: Json, rows: int) -> Vocab:
    """Return text and type of each id; ids without a token are unused, up to `rows`."""
    vocab = model.get("vocab")
    if not isinstance(vocab, Mapping) or not all(type(n) is int for n in vocab.values()):
        raise _unusable("the vocabulary does not number its tokens", "")
    pieces = {number: (text, NORMAL) for text, number in vocab.items()}
    for token in _objects(file, "added_tokens"):
        kind = CONTROL if token.get("special") else USER_DEFINED
        number, text = token.get("id"), token.get("content")
        if type(number) is not int or not isinstance(text, str):
            raise _misshapen("added_tokens")
        pieces[number] = (text, kind)
    for number in (min(pieces, default=0), max(pieces, default=0)):
        if not 0 <= number < rows:
            fault = "more tokens than the embedding has rows" if number > 0 else "a negative id"
            raise _unusable(fault, f"id {quoted(str(number))}")
    _require_text("".join(text for text, _ in pieces.values()))
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for number, (text, kind) in pieces.items():
        tokens[number], types[number] = text, kind
    return tokens, types


def _byte_level(file: Json, model: Json, vocab: Vocab) -> JsonDict:
    steps = list(_steps(_object(file, "pre_tokenizer")))
    normalizer = _object(file, "normalizer").get("type")
    for name, expected in PRE_TOKENIZERS.items():
        same = steps == [_plain(step) for step in expected]
        keeps_words = bool(model.get("ignore_merges")) == (name in WHOLE_WORDS)
        if same and keeps_words and normalizer == ("NFC" if name == "qwen2" else None):
            return {"model": "gpt2", "pre": name, "merges": [*_merges(model)]}
    raise _unusable("llama.cpp has no name for the way in which this tokenizer cuts words", "")


def _steps(step: Json) -> Iterator[JsonDict]:
    """Yield the steps of a pre-tokenizer, without what does not change the words."""
    if step.get("type") == "Sequence":
        for inner in _objects(step, "pretokenizers"):
            yield from _steps(inner)
    elif step:
        yield _plain(step)


def _plain(step: Json) -> JsonDict:
    idle = {"trim_offsets", *(["add_prefix_space"] if not step.get("add_prefix_space") else [])}
    settings = {key: value for key, value in step.items() if key not in idle}
    return {"use_regex": True, **settings} if settings.get("type") == "ByteLevel" else settings


def _merges(model: Json) -> Iterator[str]:
    merges = model.get("merges") or ()
    if not isinstance(merges, list):
        raise _misshapen("merges")
    for merge in merges:
        parts = [merge] if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise _misshapen("merges")
        _require_text(text := " ".join(parts))
        yield text


def _pieces(file: Json, model: Json, vocab: Vocab) -> JsonDict:
    """Return the keys of SentencePiece BPE, with scores that rank pieces as the merges do."""
    tokens, types = vocab
    unknown = model.get("unk_token")
    for number, text in enumerate(tokens):
        if text == unknown:
            types[number] = UNKNOWN
        elif types[number] == NORMAL and len(text) == 6 and text.startswith("<0x"):
            types[number] = BYTE
    pairs = [tuple(merge.split(" ")) for merge in _merges(model)]
    ranks: dict[str, int] = {}
    for pair in pairs:
        ranks.setdefault("".join(pair), len(ranks))
    scores = [-float(ranks.get(text, len(ranks))) for text in tokens]
    if set(pairs_of_scores(tokens, scores, types)) != set(pairs):
        raise _unusable("its merges are not those of SentencePiece", "")
    return {"model": "llama", "scores": scores, "add_space_prefix": _adds_space(file)}


def _adds_space(file: Json) -> bool:
    """Return whether a space precedes a text; raise if text is changed in any other way."""
    normalizer, cutter = _object(file, "normalizer"), _object(file, "pre_tokenizer")
    parts = _objects(normalizer, "normalizers") or ([normalizer] if normalizer else [])
    kinds = [part.get("type") for part in parts]
    if kinds in (["Prepend", "Replace"], ["Replace"]) and not cutter:
        return kinds == ["Prepend", "Replace"]
    scheme = cutter.get("prepend_scheme", "always")
    if not parts and cutter.get("type") == "Metaspace" and cutter.get("replacement") == SPACE:
        return bool(scheme != "never")
    raise _unusable("llama.cpp does not prepare text as this tokenizer does", str(kinds))


def _ends(file: Json) -> tuple[bool, bool]:
    """Return whether a text begins with a special token, and whether it ends with one."""
    template = _template(_object(file, "post_processor"))
    order = [next(iter(part), "") for part in template]
    at = order.index("Sequence") if "Sequence" in order else 0
    return "SpecialToken" in order[:at], "SpecialToken" in order[at:]


def _template(step: Json) -> Sequence[Json]:
    if step.get("type") == "TemplateProcessing":
        return _objects(step, "single")
    inner = (_template(part) for part in _objects(step, "processors"))
    return next((parts for parts in inner if parts), ())


def _object(of: Json, key: str) -> Json:
    """Return a member that is an object, or an empty one where it is null or absent."""
    value = of.get(key) or {}
    if not isinstance(value, Mapping):
        raise _misshapen(key)
    return value


def _objects(of: Json, key: str) -> list[Json]:
    """Return a member that is a list of objects, or an empty one where it is null or absent."""
    values = of.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise _misshapen(key)
    return values


def _require_text(text: str) -> None:
    """Raise InputError for half surrogates, which JSON can escape and UTF-8 cannot say."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise _unusable("a token is not text", "half a surrogate")


def _misshapen(key: str) -> InputError:
    return _unusable("tokenizer.json is not as the library writes it", f"its {key}")


def _unusable(fault: str, actual: str) -> InputError:
    return InputError(fault, found=actual or None)
