"""Where pairs come from: random graphs, mixtures, stacks of layers, passes and meshes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from moecc.errors import MoeccError
from moecc.ir import Graph, clone
from moecc.ir.mesh import parse_mesh
from moecc.rewrite import P
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing.generate import random_graph, random_sharding
from moecc.testing.steps import BLOCKS
from moecc.testing.weights import Decisions
from moecc.types import F32

from ..passes.dense_blocks import Dense  # noqa: TID252
from ..passes.stacks import STEPS, WEIGHTS, stack_graph  # noqa: TID252
from .pairs import Pair, draw_pair, edited
from .sound_edits import Rng, pick
from .weights import from_weight

UPCYCLES = (
    "upcycle{experts=2 top-k=1 router-std=1}",
    "upcycle{experts=3 top-k=2 router-std=1}",
    "upcycle{experts=2 top-k=2 router-std=1}",
    "upcycle{experts=3 top-k=2 gates=softmax router-std=1}",
    "upcycle{experts=3 top-k=2 gates=sigmoid-renormalised router-std=1}",
    "upcycle{experts=3 top-k=2 gates=sigmoid-renormalised balance-bias=true}",
    "upcycle{experts=3 top-k=1 gates=switch router-std=1}",
    "upcycle{experts=2 gates=sparsemixer}",
    "upcycle{experts=2 gates=ones top-k=2}",
    "upcycle{experts=4 granularity=2 top-k=2 router-std=1}",
    "upcycle{experts=4 granularity=2 top-k=4 router-std=1}",
    "upcycle{experts=2 granularity=2 top-k=2 router-std=1}",
    "upcycle{experts=4 granularity=4 top-k=4 router-std=1}",
    "upcycle{experts=2 top-k=2 split=index router-std=1}",
    "upcycle{experts=2 top-k=2 split=random router-std=1}",
    "upcycle{experts=2 shared=0.5 router-std=1}",
    "upcycle{experts=2 shared=0.5 shared-gate=none router-std=1}",
    "upcycle{experts=2 pad=3 router-std=1}",
    "upcycle{experts=2 expert-bias=multiplicative extra-ffn=after}",
    "upcycle{experts=2 expert-bias=additive extra-ffn=before}",
    "upcycle{experts=4 routing=prototypes top-k=2 router-std=1}",
    "upcycle{experts=2 routing=soft}",
    "upcycle{experts=2 routing=expert-choice}",
    "upcycle{experts=2 slots=capacity capacity-factor=1}",
    "upcycle{experts=2 slots=capacity capacity-factor=8}",
    "upcycle{experts=2 init=noise noise-std=0.1}",
    "upcycle{experts=2 router-init=zero}",
    "upcycle{experts=2 gate-scale=2.0}",
    "upcycle{experts=2 top-k=2 gates=softmax gate-scale=2.5 scale-placement=up-down}",
)

AFTER = (
    "", "", "cse,dce", "canonicalize", "fuse-gate-up", "grow", "grow{chosen=same}",
    "zero-experts{count=1}", "merge", "prune{keep=2}", "to-dense", "to-dense{how=mean}",
    "to-dense{how=concat}", "weight-rows", "roll-layers", "roll-layers,unroll-layers",
    "canonicalize,cse,dce", "specialize{mode=eval capacity-factor=2}", "specialize{mode=eval}",
    "force-balance", "strip-sharding",
)  # fmt: skip

ANYWHERE = ("canonicalize", "cse", "dce", "cse,dce", "fuse-attention", "fuse-gate-up")
ANYWHERE += (
    "roll-layers",
    "unroll-layers",
    "canonicalize,cse,dce",
    "weight-rows",
    "canonicalize{exact=true}",
)

PLANTED = (
    P.mul(P.any(), P.add(P.any(), P.any())),
    P.add(P.mul(P.any(), P.any()), P.mul(P.any(), P.any())),
    P.add(P.any(), P.add(P.any(), P.any())),
    P.scale(P.add(P.any(), P.any())),
    P.scale(P.contract(P.any(), P.param(where=lambda w: w.weight is not None))),
    P.contract(P.add(P.any(), P.any()), P.any()),
    P.contract(P.contract(P.any(), P.any()), P.any()),
    P.exp(P.add(P.any(), P.any())),
    P.sum(P.mul(P.any(), P.any())),
    P.sum(P.any()),
    P.mean(P.any()),
    P.stop_gradient(P.mul(P.any(), P.any())),
    P.stop_gradient(P.scale(P.any())),
    P.select(P.any(), P.any(), P.any()),
    P.mask(P.any(), P.any()),
    P.softmax(P.any()),
    P.logsumexp(P.any()),
    P.max(P.any()),
    P.rms_norm(P.any(), P.any()),
    P.layer_norm(P.any(), P.any(), P.any()),
    P.embedding(P.any(), P.any()),
    P.slice(P.any()),
    P.merge(P.any()),
    P.split(P.any()),
    P.broadcast(P.any(), P.any()),
    P.sub(P.any(), P.any()),
    P.div(P.any(), P.any()),
)
"""What is planted in random graphs so that rare edits have a place."""

MESHES = ("a:2", "a:2,b:2", "a:3")


def passed(graph: Graph, text: str, seed: int) -> Graph | None:
    """Return a copy of `graph` after a pipeline, or None where a pass rejects it."""
    copy = clone(graph)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_pipeline(copy, Pipeline.parse(text), context=Context(seed, allow_unmatched=True))
    except (MoeccError, ValueError):
        return None
    return copy


def dense_graph(rng: Rng) -> Graph:
    """Return one or two small dense blocks."""
    gated = bool(rng.random() < 0.6)
    return Dense(
        embed=pick(rng, (2, 3, 4)),
        mlp=pick(rng, (2, 4, 4, 6)),
        layers=pick(rng, (1, 1, 2)),
        gated=gated,
        act=pick(rng, ("silu", "gelu", "relu", "gelu_tanh", "relu2")),
        bias_in=bool(rng.random() < 0.25),
        bias_out=bool(rng.random() < 0.25),
        residual=bool(rng.random() < 0.5),
        transposed=bool(rng.random() < 0.25),
        dtype=F32,
    ).graph()


def planted_graph(seed: int, rng: Rng) -> Graph:
    """Return a random graph with a pattern that an edit looks for, or a rare operation."""
    return random_graph(seed, max_steps=int(rng.integers(1, 4)), like=pick(rng, PLANTED))


@lru_cache(maxsize=8)
def shared_graph(seed: int) -> Graph:
    """Return a random graph, at times with something planted; several pairs begin with it."""
    rng = np.random.default_rng([seed, 7])
    if rng.random() < 0.35:
        return planted_graph(seed, rng)
    return random_graph(seed, max_steps=int(rng.integers(1, 5)))


@lru_cache(maxsize=8)
def shared_mixture(seed: int) -> Graph:
    """Return a random graph of one block; several pairs begin with it."""
    return random_graph(seed, steps=BLOCKS, max_steps=1)


SHARED = 4
"""How many seeds begin with the same graph: to grow one takes as long as to prove a pair."""


def from_random(seed: int, rng: Rng) -> Pair | None:
    """Edit a random graph of operations and blocks."""
    return draw_pair(seed, shared_graph(seed // SHARED))


def from_mixture(seed: int, rng: Rng) -> Pair | None:
    """Edit a random graph that has whole blocks alone."""
    return draw_pair(seed, shared_mixture(seed // SHARED))


def from_stack(seed: int, rng: Rng) -> Pair | None:
    """Edit a stack of equal layers, rolled or not, or compare it with its rolled form."""
    steps = tuple(pick(rng, STEPS) for _ in range(int(rng.integers(1, 4))))
    layers = [steps] * int(rng.integers(2, 4))
    plain = stack_graph(pick(rng, WEIGHTS), layers, second=bool(rng.random() < 0.5))
    rolled = passed(plain, "roll-layers", seed)
    way = rng.random()
    if rolled is None or way < 0.2:
        return draw_pair(seed, plain)
    if way < 0.5:
        return draw_pair(seed, rolled)
    return (
        edited(plain, rolled, seed, "roll-layers")
        if way < 0.8
        else edited(rolled, plain, seed, "unroll")
    )


def from_upcycle(seed: int, rng: Rng) -> Pair | None:
    """Compare a dense model with its upcycled and edited form."""
    dense = dense_graph(rng)
    text, further = pick(rng, UPCYCLES), pick(rng, AFTER)
    sparse = passed(dense, text, seed)
    if sparse is None:
        return None
    if not further:
        return edited(dense, sparse, seed, text)
    after = passed(sparse, further, seed)
    if after is None:
        return None
    if rng.random() < 0.5:
        return edited(dense, after, seed, f"{text},{further}")
    return edited(sparse, after, seed, further)


def from_pass(seed: int, rng: Rng) -> Pair | None:
    """Compare a random graph with the edited result of a pass."""
    graph = random_graph(seed, max_steps=int(rng.integers(2, 7)))
    text = pick(rng, ANYWHERE)
    after = passed(graph, text, seed)
    return None if after is None else edited(graph, after, seed, text)


def from_mesh(seed: int, rng: Rng) -> Pair | None:
    """Compare a random graph with itself on a mesh, or edit it there."""
    graph = random_graph(seed, max_steps=int(rng.integers(1, 4)))
    try:
        sharded = random_sharding(graph, Decisions(seed), parse_mesh(pick(rng, MESHES)))
    except MoeccError:
        return None
    if rng.random() < 0.5:
        return draw_pair(seed, sharded)
    return edited(graph, sharded, seed, "shard")


SOURCES: dict[str, tuple[Callable[[int, Rng], Pair | None], int]] = {
    "random": (from_random, 42),
    "weight": (from_weight, 8),
    "mixture": (from_mixture, 14),
    "upcycle": (from_upcycle, 16),
    "stack": (from_stack, 6),
    "pass": (from_pass, 8),
    "mesh": (from_mesh, 6),
}
"""Sources by name, each with its share of a hundred pairs."""


def pair_of(seed: int, only: str = "") -> tuple[str, Pair | None]:
    """Return the source of a seed, and its pair, or None where nothing came of it."""
    rng = np.random.default_rng([seed, 99])
    names = [only] if only else list(SOURCES)
    shares = np.array([SOURCES[n][1] for n in names], float)
    name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    return name, SOURCES[name][0](seed, rng)
