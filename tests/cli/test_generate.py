"""A hostile ``tokenizer.json`` is a message and exit code 1; so is a draw that cannot be made."""

import json
import time

import pytest

pytest.importorskip("jax")
tokenizers = pytest.importorskip("tokenizers")

from moecc.errors import InputError  # noqa: E402
from moecc.tokenizer import Tokenizer, Worker  # noqa: E402

from .conftest import word_tokenizer  # noqa: E402

PLAIN = word_tokenizer(["the", "cat", "sat", "on", "a", "mat", "[UNK]"])


def changed(**parts):
    """Return a tokenizer of six words with other parts."""
    return json.dumps(json.loads(PLAIN) | parts)


@pytest.fixture
def generate(cli, dense):
    """Generate a text by the small model with a tokenizer."""

    def run(*options, tokenizer=PLAIN, prompt="the cat", **expected):
        data = tokenizer if isinstance(tokenizer, bytes) else tokenizer.encode()
        (dense / "tokenizer.json").write_bytes(data)
        return cli("generate", dense, "--prompt", prompt, "--tokens", "3", *options, **expected)

    return run


REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
TEMPLATE = {
    "type": "TemplateProcessing", "pair": [], "special_tokens": {}, "single": [
        {"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    ],
}  # fmt: skip

HOSTILE = {
    "not UTF-8": b'{"\xff": 1}',
    "deep": "[" * 100_000,
    "too much memory when it is read": changed(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    ),
    "a panic when it is used": changed(post_processor=TEMPLATE),
    "too many steps": changed(pre_tokenizer=REGEX),
}
PROMPT = "the cat " + "a" * 40 + "b"


@pytest.mark.parametrize("tokenizer", HOSTILE.values(), ids=HOSTILE)
def test_hostile_tokenizers_are_refused(generate, tokenizer):
    start = time.monotonic()
    says = ("error: ", "the tokenizer cannot be")
    generate(tokenizer=tokenizer, prompt=PROMPT, code=1, says=says)
    assert time.monotonic() - start < 60


def test_padding_and_truncation_of_batches_are_no_part_of_a_prompt(generate):
    """A tokenizer that pads to 1,000,000,000 tokens ended the process that ran it."""
    padding = {
        "strategy": {"Fixed": 1_000_000_000}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    padded = generate(tokenizer=changed(padding=padding, truncation=cut))
    assert padded.out == generate().out


def test_a_text_beyond_the_stated_context_is_remarked(generate, dense):
    stated = json.loads((dense / "config.json").read_text())["max_position_embeddings"]
    assert "remark" not in generate().err
    err = generate("--tokens", str(stated)).err
    assert f"sequences of up to {stated + 1} tokens are longer than the context" in err


def test_a_tokenizer_too_large_to_be_one_is_refused(generate, monkeypatch):
    monkeypatch.setattr("moecc.jobs.generate.MAX_TOKENIZER_BYTES", 100)
    generate(code=1, says="too large")


def test_a_tokenizer_that_takes_too_long_is_ended():
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}
    data = changed(normalizer={"type": "Sequence", "normalizers": [replace] * 2}).encode()
    start = time.monotonic()
    with (
        pytest.raises(InputError, match=r"it takes more than 0\.5 s"),
        Tokenizer(data, "here", limit_seconds=0.5) as tokenizer,
    ):
        tokenizer.encode("a" * 4000)
    assert time.monotonic() - start < 30


# --- drawing


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--temperature", "nan"], "nan is not a finite number"),
        (["--temperature", "inf"], "inf is not a finite number"),
        (["--temperature", "1", "--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_draws_that_cannot_be_are_refused(generate, options, says):
    generate(*options, code=2, says=says)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_nan_are_refused(generate, dense, temperature):
    path = dense / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096] + b"\xff" * 4096)
    generate("--temperature", temperature, code=1, says="NaN or infinity")


def test_what_the_library_says_is_what_comes_back():
    whole = tokenizers.Tokenizer.from_str(PLAIN)
    texts = ["the cat", "", "a mat on the cat \u00e9 \U0001f600", "cat " * 50_000]
    with Tokenizer(PLAIN.encode(), "here") as tokenizer:
        assert tokenizer.encode_all(texts) == [whole.encode(text).ids for text in texts]
        assert tokenizer.decode([0, 1, 5]) == whole.decode([0, 1, 5])
        assert [tokenizer.token(i) for i in (1, 99)] == ["cat", None]
        with pytest.raises(InputError, match="cannot be used"):
            tokenizer.encode("\udcff")
        assert tokenizer.encode("the") == [0]
        process = tokenizer._process
    assert process.returncode is not None


def test_answers_have_a_length(monkeypatch):
    monkeypatch.setattr("moecc.tokenizer.MOST_TOKENS", 5)
    worker = Worker()
    worker.tokenizer = tokenizers.Tokenizer.from_str(PLAIN)
    with pytest.raises(ValueError, match="more than 5 tokens"):
        worker._encode(["the cat sat", "on a mat"], special=False)
