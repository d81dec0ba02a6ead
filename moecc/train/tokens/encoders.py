"""Encoders: texts to ids, by the tokenizer of a checkpoint or by their bytes."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

from numpy.typing import NDArray

from moecc.chat import CHAT_FILES, ChatTemplate, read_template
from moecc.errors import InputError
from moecc.formats.files import read_bounded, read_json_object, read_whole
from moecc.formats.open import missing_place
from moecc.formats.run import SOURCE, split_reference
from moecc.support.lazy import np
from moecc.support.process import Closing
from moecc.support.untyped import JsonDict
from moecc.tokenizer import Tokenizer
from moecc.train.tokens.folder import Special

# The tokenizer of bytes as a ``tokenizer.json``, so that models of bytes go where others go.

SPECIAL = ("<eos>", "<pad>", "<mask>", "<bos>")
"""The tokens after the 256 bytes, in the order of their ids."""

SENTINELS = 124


@cache
def byte_tokenizer() -> bytes:
    """Return a ``tokenizer.json`` whose ids are the bytes of a text, special tokens after them."""
    extra = [*SPECIAL, *(f"<extra_id_{n}>" for n in range(SENTINELS))]
    added = [
        {
            "id": 256 + n, "content": name, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for n, name in enumerate(extra)
    ]  # fmt: skip
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document: JsonDict = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **byte_level},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letter: byte for byte, letter in enumerate(_letters())},
            "merges": [],
        },
    }
    return (json.dumps(document, ensure_ascii=False) + "\n").encode()


@cache
def byte_tokenizer_config() -> bytes:
    """Return the ``tokenizer_config.json`` that names the special tokens for transformers."""
    eos, pad, mask, bos = SPECIAL
    names = {"eos_token": eos, "pad_token": pad, "mask_token": mask, "bos_token": bos}
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers 4 adds token types otherwise, which decoders reject.
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def _letters() -> Iterator[str]:
    """Yield the letter of each byte: itself where it prints, else one beyond Latin-1.

    It is the alphabet of GPT-2's byte-level tokenizer (Radford et al. 2019).
    """
    beyond = iter(range(256, 512))
    for byte in range(256):
        prints = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        yield chr(byte if prints else next(beyond))


BYTES = "bytes"
BYTES_DIGEST = "bytes/1"
BYTES_VOCAB = 384
"""256 bytes, the end of a document, padding, the mask, the beginning, and 124 sentinels."""

PIECE_CHARACTERS = 1 << 20
"""Longer texts are encoded in pieces that end with a line."""

_RESTART_CHARACTERS = 16 << 20
_MOST_SENTINELS = 256
_LARGEST_TOKENIZER_BYTES = 256 << 20
_LARGEST_JSON_BYTES = 16 << 20
_LAST_BREAK = re.compile(r"\n(?=[^\n]*\Z)")

IdArray = NDArray[np.int32]


class Encoder(Closing):
    """Turns texts to ids.

    Attributes:
      name: of its folder, or ``bytes``.
      digest: of what decides the ids.
      vocab_size: one more than its largest id.
      special: its special tokens.
    """

    name: str
    digest: str
    vocab_size: int
    special: Special

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[IdArray]:
        """Return the ids of each text, without special tokens. Raises InputError."""

    def chat_template(self) -> ChatTemplate:
        """Return the chat template beside it. Raises InputError where there is none."""
        return read_template({}, self.name)

    def close(self) -> None:
        """Close what it is encoded with."""
        return


class ByteEncoder(Encoder):
    """The UTF-8 bytes of a text are its ids; special tokens come after them."""

    name = BYTES
    digest = BYTES_DIGEST
    vocab_size = BYTES_VOCAB
    special = Special(eos=256, pad=257, mask=258, bos=259, sentinels=tuple(range(260, BYTES_VOCAB)))

    def encode(self, texts: Sequence[str]) -> list[IdArray]:
        """Return the bytes of each text."""
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]


class TokenizerEncoder(Encoder):
    """The ``tokenizer.json`` of a folder, in a process of its own.

    The process may use a bounded time, so it is replaced after so much text.

    Raises:
      InputError: there is no ``tokenizer.json``, or it cannot be used.
      MachineError: the extra ``tokenizers`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        folder = path.parent if path.is_file() else path
        file = path if path.is_file() else folder / "tokenizer.json"
        if not file.is_file():
            hint = "--tokenizer takes a checkpoint, a GGUF file, a run, or the word bytes"
            if not path.exists():
                (problem,) = missing_place(path).problems
                raise InputError([replace(problem, hint=problem.hint or hint)])
            raise InputError("no tokenizer.json", where=path, hint=hint)
        self._data = read_bounded(file, _LARGEST_TOKENIZER_BYTES)
        self._where = str(file)
        self._used = 0
        self.name = folder.resolve().name
        self.digest = tokenizer_digest(self._data)
        self._chat = {n: read_whole(folder / n) for n in CHAT_FILES if (folder / n).is_file()}
        self._tokenizer = Tokenizer(self._data, self._where)
        try:
            self.vocab_size = self._tokenizer.size()
            self.special = self._special(folder)
        except BaseException:
            self._tokenizer.close()
            raise

    def encode(self, texts: Sequence[str]) -> list[IdArray]:
        """Return the ids of each text. Raises InputError."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for each in pieces for piece in each]
        ids = iter([encoded for batch in _batches(flat) for encoded in self._ask(batch)])
        return [np.concatenate([_EMPTY, *(next(ids) for _ in each)]) for each in pieces]

    def chat_template(self) -> ChatTemplate:
        """Return the chat template in the folder. Raises InputError where there is none."""
        return read_template(self._chat, str(Path(self._where).parent))

    def _ask(self, texts: Sequence[str]) -> list[IdArray]:
        if self._used > _RESTART_CHARACTERS:
            self._tokenizer.close()
            self._tokenizer, self._used = Tokenizer(self._data, self._where), 0
        self._used += sum(map(len, texts))
        encoded = self._tokenizer.encode_all(texts, special=False)
        return [np.asarray(ids, np.int32) for ids in encoded]

    def _special(self, folder: Path) -> Special:
        """Return the special tokens that the files beside the tokenizer name."""
        tokens_by_name: dict[str, str] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if not (folder / file).is_file():
                continue
            data = read_json_object(folder / file, limit_bytes=_LARGEST_JSON_BYTES)
            for name in ("bos", "eos", "pad", "mask"):
                value = data.get(f"{name}_token")
                if isinstance(value, dict):
                    value = value.get("content")
                if isinstance(value, str):
                    tokens_by_name[name] = value
        extra = [f"<extra_id_{n}>" for n in range(_MOST_SENTINELS)]
        ids = self._tokenizer.ids([*tokens_by_name.values(), *extra])
        named = dict(zip(tokens_by_name, ids, strict=False))
        sentinels = takewhile(lambda id: id is not None, ids[len(named) :])
        before, after = self._template()
        return Special(
            **named,
            before=before,
            after=after,
            sentinels=tuple(id for id in sentinels if id is not None),
        )

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that the tokenizer puts before and after a text."""
        (plain,) = self._tokenizer.encode_all(["a"], special=False)
        (around,) = self._tokenizer.encode_all(["a"])
        for start in range(len(around) - len(plain) + 1):
            if around[start : start + len(plain)] == plain:
                return tuple(around[:start]), tuple(around[start + len(plain) :])
        return (), ()

    def close(self) -> None:
        """Close the tokenizer."""
        self._tokenizer.close()


def open_encoder(name: str) -> Encoder:
    """Return the encoder ``bytes``, or that of a folder with a ``tokenizer.json`` or a GGUF file.

    Or that of a run, as ``RUN`` or ``RUN@STEP``: of a run over bytes it is ``bytes``.

    Raises:
      InputError: there is no tokenizer, or it cannot be used.
      MachineError: the extra ``tokenizers`` is not installed.
    """
    if name == BYTES:
        return ByteEncoder()
    path, run = Path(name), split_reference(name)
    if run is not None:
        return _of_run(Path(run[0]))
    return _of_model(path) if path.suffix == ".gguf" else TokenizerEncoder(path)


def _of_run(run: Path) -> Encoder:
    """Return the encoder of a run, which keeps the tokenizer of its source."""
    file = run / SOURCE / "tokenizer.json"
    if file.is_file() and tokenizer_digest(read_bounded(file, _LARGEST_TOKENIZER_BYTES)) == (
        BYTES_DIGEST
    ):
        return ByteEncoder()
    encoder = TokenizerEncoder(run / SOURCE)
    encoder.name = run.resolve().name
    return encoder


def _of_model(file: Path) -> TokenizerEncoder:
    """Return the encoder of a model that is one file, with its tokenizer inside."""
    from moecc.formats.open import open_checkpoint

    with TemporaryDirectory() as folder, open_checkpoint(file) as checkpoint:
        for part, content in checkpoint.companions().items():
            data = (
                content
                if isinstance(content, bytes)
                else read_bounded(content, _LARGEST_TOKENIZER_BYTES)
            )
            Path(folder, part).write_bytes(data)
        if not Path(folder, "tokenizer.json").is_file():
            raise InputError(
                "the file has no tokenizer", where=file, found="; ".join(checkpoint.remarks())
            )
        encoder = TokenizerEncoder(Path(folder))
    encoder.name = file.stem
    return encoder


def tokenizer_digest(data: bytes) -> str:
    """Return the digest of the content of a ``tokenizer.json``; that of bytes has its own."""
    if data == byte_tokenizer():
        return BYTES_DIGEST
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


_EMPTY: IdArray = np.zeros(0, np.int32)


def _pieces(text: str) -> Iterator[str]:
    """Yield `text` in pieces that end with a line, where there is one."""
    while len(text) > PIECE_CHARACTERS:
        match = _LAST_BREAK.search(text, 0, PIECE_CHARACTERS)
        end = match.end() if match else PIECE_CHARACTERS
        yield text[:end]
        text = text[end:]
    yield text


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield `texts` in parts of so many characters."""
    start, size = 0, 0
    for number, text in enumerate(texts):
        if number > start and size + len(text) > PIECE_CHARACTERS:
            yield texts[start:number]
            start, size = number, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]
