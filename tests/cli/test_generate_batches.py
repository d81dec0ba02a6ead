"""`moecc generate` with several prompts, draws, tokens that stop a text, and wrong input."""

import shutil

import pytest

pytest.importorskip("jax")
pytest.importorskip("tokenizers")

import moecc as api
from moecc.errors import UsageError

from .conftest import GOLDEN, edit_json, read_json, word_tokenizer


@pytest.fixture
def model(tmp_path):
    """Copy a golden model, with a tokenizer beside it and without a token that ends texts."""

    def copy(case):
        folder = shutil.copytree(GOLDEN / case, tmp_path / case)
        # Most golden models have a vocabulary of 37.
        (folder / "tokenizer.json").write_text(word_tokenizer([f"w{n}" for n in range(37)]))
        edit_json(folder / "config.json", eos_token_id=None)
        return folder

    return copy


def tokens_of(report):
    return [text["tokens"] for text in report["texts"]]


def test_a_token_that_stops_a_text(cli, model):
    args = ("generate", model("llama_gqa"), "--prompt", "w5 w6", "--tokens", "6")
    (free,) = tokens_of(cli.json(*args))
    report = cli.json(*args, "--stop", f"w{free[2]}")
    assert tokens_of(report) == [free[: free.index(free[2])]]
    assert report["texts"][0]["stopped"] is True
    assert report["schema"] == "moecc.generate/1"


def test_an_encoder_decoder_makes_texts_of_texts(cli, model):
    """Padding of a shorter text changes nothing, and what is printed is the decoder's text."""
    args = ("generate", model("t5_relu_tied"), "--tokens", "4")
    prompts = [("--prompt", "w5 w6 w7 w8 w9"), ("--prompt", "w3 w4")]
    both = tokens_of(cli.json(*args, *prompts[0], *prompts[1]))
    assert both == [tokens_of(cli.json(*args, *prompt))[0] for prompt in prompts]
    assert cli(*args, *prompts[0]).out.split() == [f"w{token}" for token in both[0]]


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
def test_what_cannot_be(cli, model, more, says, code):
    done = cli("generate", model("llama_gqa"), "--prompt", "w5", *more, code=code, says=says)
    assert done.out == ""


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


def test_the_likeliest_of_one_is_the_likeliest(cli, model):
    args = ("generate", model("llama_gqa"), "--prompt", "w5 w6", "--tokens", "3")
    greedy = tokens_of(cli.json(*args))
    for bound in (("--top-k", "1"), ("--top-p", "1e-9")):
        assert tokens_of(cli.json(*args, "--temperature", "3", *bound)) == greedy


@pytest.mark.parametrize(
    ("case", "key"), [("gpt2_plain", "n_positions"), ("opt_plain", "max_position_embeddings")]
)
def test_a_text_longer_than_the_positions_of_the_model(cli, model, case, key):
    folder = model(case)
    args = ("generate", folder, "--prompt", "w5 w6 w7", "--tokens")
    positions = read_json(folder / "config.json")[key]
    says = ("longer than the model has positions", f"found: {positions + 3}")
    cli(*args, positions, code=1, says=says)
    cli(*args, positions - 2)


def test_a_text_longer_than_the_positions_of_the_encoder(cli, model):
    args = ("generate", model("bart_square"), "--tokens", "2", "--prompt")
    cli(*args, "w5 " * 17, code=1, says="longer than the model has positions")
    cli(*args, "w5 " * 16)
