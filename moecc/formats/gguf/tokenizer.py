"""Translate the vocabulary of a GGUF file to the tokenizer files of Hugging Face.

GGUF stores tokens, merges or scores, and a name for the rule that cuts text into words; the rule
itself is in llama.cpp.  Each name whose rule is known exactly is written as the pre-tokenizer
of a ``tokenizer.json``; for every other name there is no tokenizer rather than an approximate one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from moecc.errors import InputError, quoted
from moecc.formats.files import read_bounded
from moecc.formats.gguf.header import GgufArray, Key, Metadata, shown, token_id
from moecc.formats.source import Checkpoint
from moecc.support.documents import parse_json
from moecc.support.untyped import Json, JsonDict

# The vocabulary in a GGUF file's metadata, read and checked before use.

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of a token, as numbered by llama.cpp."""

_PREFIX = "tokenizer.ggml."
# llama.cpp's defaults for missing keys, by the model of the tokenizer.
_SPECIAL_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {},
}
LLAMA3_CUTS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2")
"""The names of Llama 3's rules, which llama.cpp treats alike."""

WHOLE_WORDS = (*LLAMA3_CUTS, "tekken")
"""A word that is itself a token is used directly, regardless of the merges; a text begins with
the token ``bos`` if nothing is stated."""


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


def read_vocabulary(metadata: Metadata, rows: int) -> Vocabulary:
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
    names: set[str] = set()
    for token in tokens:
        if token in names:
            fault = f"two ids have the token {quoted(token)}"
            raise _unusable("tokens", fault, "one id each", "a second one")
        names.add(token)
    special: dict[str, int] = {}
    for name in (*_NAMED, *_ENDS[1:]):
        is_stated = f"{_PREFIX}{name}_token_id" in metadata
        default = _SPECIAL_DEFAULTS[model].get(name)
        number = token_id(metadata, name, len(tokens)) if is_stated else default
        if number is not None and number < len(tokens):
            special[name] = number
    pre = _text(metadata, "pre") if model == "gpt2" else ""
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=_types(metadata, len(tokens)),
        scores=_numbers(metadata, "scores", len(tokens)) if model == "llama" else [],
        merges=_merges(metadata, names) if model == "gpt2" else [],
        special={name: number for name, number in special.items() if name in _NAMED},
        ends=list(dict.fromkeys(special[name] for name in _ENDS if name in special)),
        adds_bos=_flag(metadata, "add_bos_token", model == "llama" or pre in WHOLE_WORDS),
        adds_eos=_flag(metadata, "add_eos_token", False),
        adds_space=_flag(metadata, "add_space_prefix", model == "llama"),
    )


_NAMED = ("bos", "eos", "unknown", "padding")
_ENDS = ("eos", "eot", "eom")


def _types(metadata: Metadata, count: int) -> list[int]:
    types = _numbers(metadata, "token_type", count)
    for kind in types:
        if kind not in range(NORMAL, BYTE + 1):
            raise _unusable("token_type", "unknown type of a token", "1 to 6", f"{kind}")
    return [int(kind) for kind in types]


def _merges(metadata: Metadata, tokens: set[str]) -> list[tuple[str, str]]:
    merges = []
    for line in _strings(metadata, "merges"):
        left, space, right = line.partition(" ")
        if not space or not {left, right, left + right} <= tokens:
            expected = "two tokens with a space between, which together are a token"
            raise _unusable("merges", "not a valid merge", expected, quoted(line))
        merges.append((left, right))
    return merges


def _text(metadata: Metadata, name: str) -> str:
    value = metadata.get(_PREFIX + name)
    if isinstance(value, str):
        return value
    fault = "the file does not state this" if value is None else "not a string"
    raise _unusable(name, fault, "a string", shown(value))


def _flag(metadata: Metadata, name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if isinstance(value, bool):
        return value
    raise _unusable(name, "neither true nor false", "true or false", shown(value))


def _strings(metadata: Metadata, name: str) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if isinstance(value, GgufArray):
        return value.strings()
    raise _unusable(name, "not an array", "an array of strings", shown(value))


def _numbers(metadata: Metadata, name: str, count: int) -> list[float]:
    value = metadata.get(_PREFIX + name)
    if isinstance(value, GgufArray) and value.count == count:
        numbers: list[float] = value.numbers().tolist()
        return numbers
    raise _unusable(name, "not one number a token", f"an array of {count:,} numbers", shown(value))


def _unusable(name: str, fault: str, expected: str, actual: str) -> InputError:
    return InputError(fault, where=_PREFIX + name, expected=expected, found=actual)


_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")
_QWEN35_WORDS = _QWEN2_WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_DEEPSEEK_WORDS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_STEPS = ({"type": "ByteLevel", "use_regex": True},)
_DIGIT_STEPS = ({"type": "Digits", "individual_digits": True}, *_GPT2_STEPS)


def _split(*words: str) -> tuple[JsonDict, ...]:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    cuts = ({**split, "pattern": {"Regex": pattern}} for pattern in words)
    return *cuts, {"type": "ByteLevel", "use_regex": False}


PRE_TOKENIZERS: Mapping[str, tuple[JsonDict, ...]] = {
    "gpt-2": _GPT2_STEPS,
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGIT_STEPS),
    **dict.fromkeys(LLAMA3_CUTS, _split(_LLAMA3_WORDS)),
    "qwen2": _split(_QWEN2_WORDS),
    "qwen35": _split(_QWEN35_WORDS),
    "deepseek-v3": _split(*_DEEPSEEK_WORDS),
    "tekken": _split(_TEKKEN_WORDS),
}
NORMALISED = ("qwen2", "qwen35")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPACE = "\u2581"
_LONGEST_PIECE = 256


def tokenizer_files(metadata: Metadata, rows: int, context_length: int) -> dict[str, bytes]:
    """Return tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises:
      InputError: the reason if there can be none.
      MachineError: the file cannot be read.
    """
    vocabulary = read_vocabulary(metadata, rows)
    turn = {"gpt2": _byte_level, "llama": _sentence_piece}[vocabulary.model]
    config = _tokenizer_config(vocabulary, metadata, context_length)
    ends = vocabulary.ends
    ids = {
        "bos_token_id": vocabulary.special.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.special.get("padding"),
    }
    return {
        "tokenizer.json": _json(turn(vocabulary)),
        "tokenizer_config.json": _json(config, indent=2),
        "generation_config.json": _json(
            {name: value for name, value in ids.items() if value is not None}, indent=2
        ),
    }


def _byte_level(vocabulary: Vocabulary) -> JsonDict:
    steps = PRE_TOKENIZERS.get(vocabulary.pre)
    if steps is None:
        raise InputError(
            "moecc does not know how this tokenizer cuts text into words",
            where="tokenizer.ggml.pre",
            expected=f"one of {', '.join(PRE_TOKENIZERS)}",
            found=shown(vocabulary.pre),
        )
    return {
        **_frame(vocabulary),
        "normalizer": {"type": "NFC"} if vocabulary.pre in NORMALISED else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {**_BYTE_LEVEL, **step} if step["type"] == "ByteLevel" else step for step in steps
            ],
        },
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            **_MODEL,
            "ignore_merges": vocabulary.pre in WHOLE_WORDS,
            "vocab": vocabulary.index(),
            "merges": vocabulary.merges,
        },
    }


def _sentence_piece(vocabulary: Vocabulary) -> JsonDict:
    to_marks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if vocabulary.adds_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders = [to_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
    unknown = vocabulary.special.get("unknown")
    return {
        **_frame(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, to_marks]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": decoders + (strip if vocabulary.adds_space else []),
        },
        "model": {
            **_MODEL,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": vocabulary.types.count(BYTE) == 256,
            "vocab": vocabulary.index(),
            "merges": pairs_of_scores(vocabulary.tokens, vocabulary.scores, vocabulary.types),
        },
    }


_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def pairs_of_scores(
    tokens: Sequence[str], scores_of: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every pair of pieces whose concatenation is a piece, the best score first.

    SentencePiece merges the two neighbours that yield the piece with the best score (Kudo and
    Richardson 1808.06226, §3.1), which is equivalent to merges ranked by that score.
    """
    columns = zip(tokens, scores_of, types, strict=True)
    scores = {token: score for token, score, kind in columns if kind == NORMAL}
    longest = max(map(len, scores), default=0)
    if longest > _LONGEST_PIECE:
        raise InputError(
            "a piece of the vocabulary is too long",
            where="tokenizer.ggml.tokens",
            expected=f"at most {_LONGEST_PIECE} characters",
            found=f"{longest:,}",
        )
    ranked = [
        (-score, -cut, token)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    ranked.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, token in ranked]


def _frame(vocabulary: Vocabulary) -> JsonDict:
    """Return the parts that do not depend on the kind of tokenizer."""
    added = [
        {
            "id": number,
            "content": vocabulary.tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for number, kind in enumerate(vocabulary.types)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and vocabulary.tokens[number]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _template(vocabulary),
    }


def _template(vocabulary: Vocabulary) -> JsonDict | None:
    """Return the post-processor that adds the first and last token to a text."""
    special = vocabulary.special
    first = [special["bos"]] if vocabulary.adds_bos and "bos" in special else []
    last = [special["eos"]] if vocabulary.adds_eos and "eos" in special else []
    if not first and not last:
        return None

    def text(name: str, kind: int) -> list[JsonDict]:
        def special_tokens(ids: list[int]) -> Iterator[JsonDict]:
            for number in ids:
                yield {"SpecialToken": {"id": vocabulary.tokens[number], "type_id": kind}}

        sequence: JsonDict = {"Sequence": {"id": name, "type_id": kind}}
        return [*special_tokens(first), sequence, *special_tokens(last)]

    tokens = {vocabulary.tokens[number]: number for number in chain(first, last)}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in tokens.items()
        },
    }


def _tokenizer_config(vocabulary: Vocabulary, metadata: Metadata, context_length: int) -> JsonDict:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config: JsonDict = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **{
            f"{short}_token": vocabulary.tokens[vocabulary.special[name]]
            for name, short in names.items()
            if name in vocabulary.special
        },
    }
    if metadata.get("general.architecture") != "bert":
        # transformers 4 adds token types otherwise, which decoders reject.
        config["model_input_names"] = ["input_ids", "attention_mask"]
    if (template := _chat_template(metadata)) is not None:
        config["chat_template"] = template
    return config


def _chat_template(metadata: Metadata) -> str | list[dict[str, str]] | None:
    """Return the template, or the list of named ones if there are several."""
    start = "tokenizer.chat_template"
    named = [
        {"name": key[len(start) + 1 :], "template": value}
        for key, value in metadata.items()
        if key.startswith(f"{start}.") and isinstance(value, str)
    ]
    default = metadata.get(start)
    if not isinstance(default, str):
        return named or None
    return [{"name": "default", "template": default}, *named] if named else default


def _json(value: object, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()


# The tokenizer's keys of a GGUF file, made of tokenizer.json.
#
# The reverse of `tokenizer_files`.  llama.cpp knows the rules that cut text into words by name; a
# tokenizer.json whose rules have none is not written, rather than nearly right.

MAX_FILE_BYTES = 64 << 20
_MAX_VALUES = 1 << 23
NO_TOKENIZER = [Key(f"{_PREFIX}model", "none")]
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

Vocab = tuple[list[str], list[int]]
"""The text and the type of each id."""


def tokenizer_keys(checkpoint: Checkpoint, rows: int) -> tuple[list[Key], str | None]:
    """Return the keys, and why there is no tokenizer among them if there is none.

    Args:
      checkpoint: the source, a folder.
      rows: those of the embedding; ids beyond the vocabulary become unused tokens.

    Raises:
      MachineError: a file cannot be read.
    """
    files = checkpoint.companions()
    if "tokenizer.json" not in files:
        return NO_TOKENIZER, "the source has no tokenizer.json"
    try:
        settings = _Settings(files, checkpoint.config)
        return _translated(_json_of(files, "tokenizer.json"), settings, rows), None
    except InputError as error:
        problem = error.problems[0]
        return NO_TOKENIZER, f"{problem.message}" + (f" ({problem.found})" if problem.found else "")


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
        raise _unwritable("only byte-level and SentencePiece BPE have a form in GGUF", str(kind))
    is_pieces = bool(model.get("byte_fallback"))
    tokens, types = _vocabulary(file, model, rows)
    make = _pieces if is_pieces else _byte_level_keys
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
        raise _unwritable("the vocabulary does not number its tokens", "")
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
            raise _unwritable(fault, f"id {quoted(str(number))}")
    _require_text("".join(text for text, _ in pieces.values()))
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for number, (text, kind) in pieces.items():
        tokens[number], types[number] = text, kind
    return tokens, types


def _byte_level_keys(file: Json, model: Json, vocab: Vocab) -> JsonDict:
    steps = list(_steps(_object(file, "pre_tokenizer")))
    normalised = _object(file, "normalizer")
    # A sequence of none changes nothing.
    normalizer = normalised.get("type") if normalised.get("normalizers") != [] else None
    for name, expected in PRE_TOKENIZERS.items():
        same = steps == [_plain(step) for step in expected]
        keeps_words = bool(model.get("ignore_merges")) == (name in WHOLE_WORDS)
        if same and keeps_words and normalizer == ("NFC" if name in NORMALISED else None):
            return {"model": "gpt2", "pre": name, "merges": [*_stored_merges(model)]}
    raise _unwritable("llama.cpp has no name for the way in which this tokenizer cuts words", "")


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
    words = step.get("pattern")
    if isinstance(words, Mapping) and isinstance(pattern := words.get("Regex"), str):
        # The ends of lines stand for themselves, or are escaped.
        escaped = pattern.replace("\r", r"\r").replace("\n", r"\n")
        settings["pattern"] = {**words, "Regex": escaped}
    return {"use_regex": True, **settings} if settings.get("type") == "ByteLevel" else settings


def _stored_merges(model: Json) -> Iterator[str]:
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
    pairs = [tuple(merge.split(" ")) for merge in _stored_merges(model)]
    ranks: dict[str, int] = {}
    for pair in pairs:
        ranks.setdefault("".join(pair), len(ranks))
    scores = [-float(ranks.get(text, len(ranks))) for text in tokens]
    if set(pairs_of_scores(tokens, scores, types)) != set(pairs):
        raise _unwritable("its merges are not those of SentencePiece", "")
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
    raise _unwritable("llama.cpp does not prepare text as this tokenizer does", str(kinds))


def _ends(file: Json) -> tuple[bool, bool]:
    """Return whether a text begins with a special token, and whether it ends with one."""
    template = _added_ends(_object(file, "post_processor"))
    order = [next(iter(part), "") for part in template]
    at = order.index("Sequence") if "Sequence" in order else 0
    return "SpecialToken" in order[:at], "SpecialToken" in order[at:]


def _added_ends(step: Json) -> Sequence[Json]:
    if step.get("type") == "TemplateProcessing":
        return _objects(step, "single")
    inner = (_added_ends(part) for part in _objects(step, "processors"))
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
        raise _unwritable("a token is not text", "half a surrogate")


def _misshapen(key: str) -> InputError:
    return _unwritable("tokenizer.json is not as the library writes it", f"its {key}")


def _unwritable(fault: str, actual: str) -> InputError:
    return InputError(fault, found=actual or None)
