"""Where tokens went: the counts, the shares, and what an untrained router explains."""

import math
import random

import numpy as np
import pytest

from moecc.train.scoring import RoutedTokens, information
from moecc.train.tokens.documents import DocumentFormat

from .tiny import draw_weights, make_model, tokens_of


def routed(tokens, experts):
    return RoutedTokens("layers.0.ffn", 4, np.array(tokens), np.array(experts))


def test_a_choice_that_follows_from_the_token_is_explained():
    layer = routed([0, 1, 2, 3] * 50, [3, 2, 1, 0] * 50)
    assert layer.explained == pytest.approx(1)
    assert layer.by_chance < 0.1
    assert layer.typical(3) == [(0, 1.0)]
    np.testing.assert_allclose(layer.shares, 0.25)


def test_information_by_hand():
    """Half of the first token's go elsewhere: H(expert) - H(expert | token), in nats."""
    layer = routed([0, 0, 1, 1], [0, 1, 1, 1])
    expected = -(math.log(0.25) * 0.25 + math.log(0.75) * 0.75) - 0.5 * math.log(2)
    assert information(layer.counts) == pytest.approx(expected)
    assert layer.typical(0) == [(0, 0.5)]
    assert layer.typical(1) == [(1, 1.0)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    words = ["a", "token", "goes", "to", "the", "expert", "of", "its", "row"]
    chance = random.Random(0)
    paragraphs = [" ".join(chance.choices(words, k=20)) for _ in range(40)]
    out, form = tmp_path_factory.mktemp("data") / "tokens", DocumentFormat(split="paragraph")
    return tokens_of("\n\n".join(paragraphs), out, format=form)


@pytest.fixture
def specialise(data, tmp_path, moecc):
    """Return the command's layers of a model whose weights are drawn."""

    def layers_of(golden, passes):
        model = draw_weights(make_model(tmp_path / "model", golden))
        small = ("--sequence", 24, "--batch", 4, "--batches", 2, "--format", "json")
        done = moecc("specialise", model, "--data", data, *small, "-p", passes)
        assert done.code == 0, done.err
        assert done.json()["schema"] == "moecc.specialise/1"
        return done.json()["layers"]

    return layers_of


def test_a_decoder_whose_router_is_a_hash_is_explained_by_the_token(specialise):
    passes = "upcycle{experts=4 top-k=1 routing=hash layers=every:2}"
    (layer,) = specialise("llama_gqa", passes)
    assert layer["layer"] == "layers.1.ffn"
    assert layer["explained"] == pytest.approx(1)
    assert layer["sentinel_entropy"] is None
    assert layer["even_entropy"] == pytest.approx(math.log(4))
    assert {t["part"] for e in layer["experts"] for t in e["tokens"]} == {1.0}


def test_an_encoder_decoder_has_sentinels_in_both_stacks(specialise):
    layers = specialise("t5_relu_tied", "upcycle{experts=4 top-k=2}")
    assert {layer["layer"].split(".")[0] for layer in layers} == {"encoder", "decoder"}
    for layer in layers:
        assert 0 <= layer["sentinel_entropy"] <= layer["even_entropy"] + 1e-9
        assert sum(e["share"] for e in layer["experts"]) == pytest.approx(1)
        # Routers that are drawn with another scale choose as untrained ones do.
        assert layer["explained"] > layer["by_chance"]
