"""The tokenizer of bytes as a ``tokenizer.json``, so that models of bytes go where others go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

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
    whole = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **whole},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **whole},
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
