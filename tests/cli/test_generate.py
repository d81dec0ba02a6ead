"""A hostile ``tokenizer.json`` is a message and exit code 1; so is a draw that cannot be made."""

import copy
import json
import time

import pytest

pytest.importorskip("jax")
tokenizers = pytest.importorskip("tokenizers")

from moecc.errors import InputError  # noqa: E402
from moecc.tokenizer import Tokenizer, Worker  # noqa: E402

WORDS = ["the", "cat", "sat", "on", "a", "mat"]


def plain():
    """Return a tokenizer of six words, as JSON values."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return json.loads(made.to_str())


def changed(**parts):
    return json.dumps({**copy.deepcopy(plain()), **parts}).encode()


def template(special):
    single = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special,
    }  # fmt: skip


def replaced_by_more(times):
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}
    return {"type": "Sequence", "normalizers": [one] * times}


REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}

HOSTILE = {
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "too much memory when it is read": changed(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    ),
    "a panic when it is used": changed(post_processor=template({})),
    "too many steps": changed(pre_tokenizer=REGEX),
}
PROMPT = "the cat " + "a" * 40 + "b"


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_tokenizers_are_refused(moecc, dense, data):
    (dense / "tokenizer.json").write_bytes(data)
    start = time.monotonic()
    done = moecc("generate", dense, "--prompt", PROMPT, "--tokens", "1")
    assert done.code == 1, done.err
    assert "error: " in done.err
    assert "the tokenizer cannot be" in done.err
    assert time.monotonic() - start < 60


def test_padding_and_truncation_of_batches_are_no_part_of_a_prompt(moecc, dense):
    """A tokenizer that pads to 1,000,000,000 tokens ended the process that ran it."""
    padding = {
        "strategy": {"Fixed": 1_000_000_000}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    texts = []
    for data in (changed(), changed(padding=padding, truncation=cut)):
        (dense / "tokenizer.json").write_bytes(data)
        done = moecc("generate", dense, "--prompt", "the cat", "--tokens", "3")
        assert done.code == 0, done.err
        texts.append(done.out)
    assert texts[0] == texts[1]


def test_a_tokenizer_too_large_to_be_one_is_refused(moecc, dense, monkeypatch):
    monkeypatch.setattr("moecc.jobs.generate.MAX_TOKENIZER_BYTES", 100)
    (dense / "tokenizer.json").write_bytes(changed())
    done = moecc("generate", dense, "--prompt", "the cat", "--tokens", "1")
    assert done.code == 1
    assert "too large" in done.err


def test_a_tokenizer_that_takes_too_long_is_ended():
    def slow():
        data = changed(normalizer=replaced_by_more(2))
        with Tokenizer(data, "here", limit_seconds=0.5) as made:
            made.encode("a" * 4000)

    start = time.monotonic()
    with pytest.raises(InputError, match=r"it takes more than 0\.5 s"):
        slow()
    assert time.monotonic() - start < 30


# --- drawing


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--temperature", "nan"], "nan is not a finite number"),
        (["--temperature", "inf"], "inf is not a finite number"),
        (["--temperature", "1", "--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_draws_that_cannot_be_are_refused(moecc, dense, more, says):
    (dense / "tokenizer.json").write_bytes(changed())
    done = moecc("generate", dense, "--prompt", "the cat", "--tokens", "1", *more)
    assert done.code == 2
    assert says in done.err


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_nan_are_refused(moecc, dense, temperature):
    (dense / "tokenizer.json").write_bytes(changed())
    path = dense / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + b"\xff" * 4096)
    done = moecc(
        "generate", dense, "--prompt", "the", "--tokens", "1", "--temperature", temperature
    )
    assert done.code == 1, done.err
    assert "NaN or infinity" in done.err


def test_what_the_library_says_is_what_comes_back():
    data = changed()
    whole = tokenizers.Tokenizer.from_str(data.decode())
    texts = ["the cat", "", "a mat on the cat \u00e9 \U0001f600", "cat " * 50_000]
    with Tokenizer(data, "here") as made:
        assert made.encode_all(texts) == [whole.encode(text).ids for text in texts]
        assert made.decode([0, 1, 5]) == whole.decode([0, 1, 5])
        assert [made.token(i) for i in (1, 99)] == ["cat", None]
        with pytest.raises(InputError, match="cannot be used"):
            made.encode("\udcff")
        assert made.encode("the") == [0]
        process = made._process
    assert process.returncode is not None


def test_answers_have_a_length(monkeypatch):
    monkeypatch.setattr("moecc.tokenizer.MOST_TOKENS", 5)
    made = Worker()
    made.tokenizer = tokenizers.Tokenizer.from_str(changed().decode())
    with pytest.raises(ValueError, match="more than 5 tokens"):
        made._encode(["the cat sat", "on a mat"], special=False)
