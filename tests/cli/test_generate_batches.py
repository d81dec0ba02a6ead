"""`moecc generate` with several prompts, draws, tokens that stop a text, and wrong input."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("jax")
tokenizers = pytest.importorskip("tokenizers")

import moecc as api  # noqa: E402
from moecc.errors import UsageError  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = 37
"""The vocabulary of most golden models."""


def words(size=SIZE):
    """Return a tokenizer.json of `size` words, w0, w1 …"""
    vocabulary = {f"w{n}": n for n in range(size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made.to_str()


@pytest.fixture
def model(tmp_path):
    """Copy a golden model, with a tokenizer beside it and without a token that ends texts."""

    def copy(case, size=SIZE):
        folder = tmp_path / case
        shutil.copytree(GOLDEN / case, folder)
        (folder / "tokenizer.json").write_text(words(size))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
        return folder

    return copy


def made(done):
    assert done.code == 0, done.err
    return [text["tokens"] for text in done.json()["texts"]]


def test_a_token_that_stops_a_text(moecc, model):
    folder = model("llama_gqa")
    args = ("generate", folder, "--prompt", "w5 w6", "--tokens", "6", "--format", "json")
    (free,) = made(moecc(*args))
    done = moecc(*args, "--stop", f"w{free[2]}")
    assert made(done) == [free[: free.index(free[2])]]
    assert done.json()["texts"][0]["stopped"] is True
    assert done.json()["schema"] == "moecc.generate/1"


def test_an_encoder_decoder_makes_texts_of_texts(moecc, model):
    """Padding of a shorter text changes nothing, and what is printed is the decoder's text."""
    folder = model("t5_relu_tied")
    how = ("--tokens", "4", "--format", "json")
    one, other = ("--prompt", "w5 w6 w7 w8 w9"), ("--prompt", "w3 w4")
    both = made(moecc("generate", folder, *one, *other, *how))
    alone = [made(moecc("generate", folder, *prompt, *how))[0] for prompt in (one, other)]
    assert both == alone
    text = moecc("generate", folder, *one, "--tokens", "4").out
    assert text.split() == [f"w{token}" for token in both[0]]


@pytest.mark.parametrize(
    ("more", "says", "code"),
    [
        (["--tokens", "0"], "0 is not in the range", 2),
        (["--top-p", "0"], "not a probability", 2),
        (["--stop", "end"], "no such token", 2),
        (["--prompt", ""], "prompt 2: the prompt has no tokens", 1),
        (["--dtype", "f16x"], "f16x", 2),
    ],
)
def test_what_cannot_be(moecc, model, more, says, code):
    done = moecc("generate", model("llama_gqa"), "--prompt", "w5", *more)
    assert (done.code, done.out) == (code, "")
    assert says in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": 5},
        {"prompt": "w5", "tokens": 0},
        {"prompt": "w5", "temperature": -1},
        {"prompt": "w5", "stop": 7},
        {"prompt": "w5", "stop": "nowhere"},
    ],
)
def test_arguments_that_cannot_be(model, arguments):
    with pytest.raises(UsageError):
        api.open(model("llama_gqa")).generate(**arguments)


def test_the_likeliest_of_one_is_the_likeliest(moecc, model):
    folder = model("llama_gqa")
    args = ("generate", folder, "--prompt", "w5 w6", "--tokens", "3", "--format", "json")
    greedy = made(moecc(*args))
    assert made(moecc(*args, "--temperature", "3", "--top-k", "1")) == greedy
    assert made(moecc(*args, "--temperature", "3", "--top-p", "1e-9")) == greedy


@pytest.mark.parametrize(
    ("case", "key"), [("gpt2_plain", "n_positions"), ("opt_plain", "max_position_embeddings")]
)
def test_a_text_longer_than_the_positions_of_the_model(moecc, model, case, key):
    folder = model(case)
    args = ("generate", folder, "--prompt", "w5 w6 w7", "--tokens")
    positions = json.loads((folder / "config.json").read_text())[key]
    done = moecc(*args, str(positions))
    assert done.code == 1
    assert "longer than the model has positions" in done.err
    assert f"found: {positions + 3}" in done.err
    assert moecc(*args, str(positions - 2)).code == 0


def test_a_text_longer_than_the_positions_of_the_encoder(moecc, model):
    args = ("generate", model("bart_square"), "--tokens", "2", "--prompt")
    done = moecc(*args, "w5 " * 17)
    assert done.code == 1
    assert "longer than the model has positions" in done.err
    assert moecc(*args, "w5 " * 16).code == 0
