"""Texts that are continued with caches have the tokens that the whole graph gives them."""

import numpy as np
import pytest
from tiers import few, some

from moecc.backend import get_backend
from moecc.decoding import DecodeGraphs, DecodingBatch, Sampling
from moecc.ir import F32
from moecc.jobs.generate import Continuer, Continuing

from .models import open_golden

PROMPTS = ([5, 3, 11], [7], [1, 2, 3, 4, 5, 6])


def expected(model, how):
    """Return how the whole graph continues the prompts: each token from all before it, at once."""
    program, params = get_backend("xla").compile(model.graph), dict(model.params())
    rngs, lines = how.sampling.generators(len(PROMPTS)), [list(prompt) for prompt in PROMPTS]
    width = max(map(len, PROMPTS)) + how.count
    for _ in range(how.count):
        tokens = np.array([line + [0] * (width - len(line)) for line in lines], np.int32)
        logits = program.run(params, {"tokens": tokens})["logits"]
        for line, row, rng in zip(lines, logits, rngs, strict=True):
            line.append(how.sampling.choose(row[len(line) - 1], rng))
    return [line[len(text) :] for line, text in zip(lines, PROMPTS, strict=True)]


def decoding(model):
    graphs = DecodeGraphs.of(model.graph)
    return DecodingBatch(graphs, model.params(), backend=get_backend("xla"), dtype=F32)


def continued(model, prompts, how):
    steps = list(Continuer(model).texts(prompts, how))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


CASES = (
    "llama_gqa", "mixtral_gqa", "gemma2_caps", "gpt2_plain", "qwen3_moe_window",
    "qwen3_5_text_square",
)  # fmt: skip


@pytest.mark.parametrize("case", some(CASES, "mixtral_gqa", "qwen3_5_text_square"))
@pytest.mark.parametrize("sampling", few([Sampling(), Sampling(1.0, seed=3)]))
def test_prompts_of_different_lengths(case, sampling):
    with open_golden(case) as model:
        how = Continuing(4, sampling)
        found = continued(model, PROMPTS, how)
        assert found == expected(model, how)
        assert continued(model, PROMPTS[:1], how) == found[:1]


def test_a_text_ends_before_a_token_that_stops_it():
    with open_golden("llama_gqa") as model:
        free = continued(model, PROMPTS, Continuing(8))
        stop = free[0][2]
        ended = continued(model, PROMPTS, Continuing(8, stop=frozenset([stop])))
    for whole, part in zip(free, ended, strict=True):
        assert part == (whole[: whole.index(stop)] if stop in whole else whole)


def test_caches_grow():
    """Longer than the smallest cache, a text has the logits that it has at once."""
    with open_golden("llama_square_mlp") as model:
        text = [int(t) for t in np.random.default_rng(0).integers(0, 16, 70)]
        batch = decoding(model)
        found = [batch.begin([text[:60]])[0], *(batch.step([t])[0] for t in text[60:])]
        tokens = {"tokens": np.array([text], np.int32)}
        whole = get_backend("xla").compile(model.graph).run(dict(model.params()), tokens)["logits"]
    np.testing.assert_allclose(np.stack(found), whole[0, 59:], rtol=2e-4, atol=2e-5)


def test_steps_that_are_announced_compile_one_shape():
    """A cache that has room for all tokens from the start does not grow."""
    with open_golden("llama_square_mlp") as model:
        continuer = Continuer(model)
        assert len(list(continuer.texts([[5]], Continuing(80)))) == 80
        (batch,) = continuer._readers.values()
    programs = batch._session._compiled.values()
    assert {program._cache_size() for program in programs} == {1}


def test_caches_are_updated_in_place():
    """What goes in is given up: memory does not grow by a cache a layer and a step."""
    with open_golden("llama_gqa") as model:
        batch = decoding(model)
        batch.begin([[1, 2]])
        before = dict(batch._session._values)
        batch.step([3])
    assert before
    assert all(array.is_deleted() for array in before.values())
