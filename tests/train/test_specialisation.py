"""Where tokens went: the counts, the shares, and what an untrained router explains."""

import json
import math
import random

import numpy as np
import pytest

from moecc.cli.main import main
from moecc.train.scoring import RoutedTokens, information
from moecc.train.tokens.documents import DocumentFormat
from moecc.train.tokens.make import Making, make_tokens

from .tiny import draw_weights, make_model


def routed(tokens, experts, size=4):
    return RoutedTokens("layers.0.ffn", size, np.array(tokens), np.array(experts))


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


def specialise(model, data, *more, capsys):
    small = ["--sequence", "24", "--batch", "4", "--batches", "2", "--format", "json"]
    assert main(["specialise", str(model), "--data", str(data), *small, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "moecc.specialise/1"
    return list(found["layers"])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    words, chance = (
        ["a", "token", "goes", "to", "the", "expert", "of", "its", "row"],
        random.Random(0),
    )
    paragraphs = [" ".join(chance.choices(words, k=20)) for _ in range(40)]
    (out.parent / "text.txt").write_text("\n\n".join(paragraphs))
    texts = (str(out.parent / "text.txt"),)
    make_tokens(Making(texts, "bytes", DocumentFormat("documents", "text", "paragraph")), out)
    return out


def test_a_decoder_whose_router_is_a_hash_is_explained_by_the_token(tokens, tmp_path, capsys):
    model = draw_weights(make_model(tmp_path / "model"))
    passes = "upcycle{experts=4 top-k=1 routing=hash layers=every:2}"
    (layer,) = specialise(model, tokens, "-p", passes, capsys=capsys)
    assert layer["layer"] == "layers.1.ffn"
    assert layer["explained"] == pytest.approx(1)
    assert layer["sentinel_entropy"] is None
    assert layer["even_entropy"] == pytest.approx(math.log(4))
    assert {t["part"] for e in layer["experts"] for t in e["tokens"]} == {1.0}


def test_an_encoder_decoder_has_sentinels_in_both_stacks(tokens, tmp_path, capsys):
    model = draw_weights(make_model(tmp_path / "model", "t5_relu_tied"))
    layers = specialise(model, tokens, "-p", "upcycle{experts=4 top-k=2}", capsys=capsys)
    assert {layer["layer"].split(".")[0] for layer in layers} == {"encoder", "decoder"}
    for layer in layers:
        assert 0 <= layer["sentinel_entropy"] <= layer["even_entropy"] + 1e-9
        assert sum(e["share"] for e in layer["experts"]) == pytest.approx(1)
        # Routers that are drawn with another scale choose as untrained ones do.
        assert layer["explained"] > layer["by_chance"]
