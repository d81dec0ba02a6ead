"""The three methods that lm-eval calls, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moecc.errors import InputError
from moecc.jobs.generate import load_tokenizer
from moecc.jobs.lm_eval_model import HarnessModel
from moecc.model.open import open_model
from moecc.train.tokens.encoders import byte_tokenizer

from .tiny import draw_weights, make_model

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402


def instance(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=64)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    draw_weights(folder)
    arrays = load_file(folder / "model.safetensors")
    # Greedy decoding is to find letters, so that its text has the tokens that it found.
    arrays["lm_head.weight"][[n for n in range(384) if not chr(n).isascii() or n < 32]] = 0
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def harness(folder):
    with open_model(str(folder)) as model, load_tokenizer(model) as tokenizer:
        yield HarnessModel(model, tokenizer, batch=4)


def log_p(harness, ids):
    """Return the log probability of each token of `ids` but the first."""
    model, width = harness.model, harness.longest
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids) - 1] = ids[:-1]
    run = jax.jit(function(model.graph))
    logits = run(dict(model.params()), {"tokens": tokens})["logits"][0]
    shares = np.asarray(jax.nn.log_softmax(logits))
    return np.take_along_axis(shares[: len(ids) - 1], np.asarray(ids[1:])[:, None], 1)[:, 0]


def test_continuations_are_scored_after_their_contexts(harness):
    pairs = [("ab", "cd"), ("", "xyz"), ("a longer context of words ", "and its end"), ("q", "r")]
    scores = harness.loglikelihood([instance(*pair) for pair in pairs] * 2)
    for (context, continuation), (score, _) in zip(pairs * 2, scores, strict=True):
        before = list(context.encode()) or [harness.model.graph.attrs["config"]["bos_token_id"]]
        each = log_p(harness, [*before, *continuation.encode()])
        assert score == pytest.approx(float(each[len(before) - 1 :].sum()), rel=1e-4)


def test_greedy_is_what_generation_finds(harness):
    def generated(*until):
        options = {"until": list(until), "max_gen_toks": 3}
        return harness.generate_until([instance("ab", options)])[0]

    text = generated()
    assert harness.loglikelihood([instance("ab", text)])[0][1]
    assert not harness.loglikelihood([instance("ab", "?" + text)])[0][1]
    assert generated(text[1]) == text[: text.index(text[1])]


def test_a_model_has_no_more_tokens_than_positions(tmp_path):
    """Of a learned table: what is padded to more has no numbers for scores."""
    folder = make_model(tmp_path / "model", "opt_plain", max_position_embeddings=40)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    with open_model(str(draw_weights(folder))) as model, load_tokenizer(model) as tokenizer:
        harness = HarnessModel(model, tokenizer, batch=2)
        scores = harness.loglikelihood([instance("ab", "cd"), instance("ab" * 60, "cd")])
        assert np.isfinite([score for score, _ in scores]).all()
        with pytest.raises(InputError, match="no room for a context"):
            harness.generate_until([instance("ab", {"max_gen_toks": 40})])
