"""Tiny models of one routed layer, and batches of them, for tests of the step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from moecc_backends.xla.train.step import make_train_step

from moecc.ir import F32, I32, PRED, Builder, Graph, tensor
from moecc.ir.moe import emit_routing
from moecc.plan.step import StepConfig
from moecc.train.recipe import OptimizerSection
from moecc.train.settings import StepSpec

EMBED, EXPERTS, VOCAB = 8, 4, 12
BATCH, SEQ = 16, 4
SIZES = {"B": BATCH, "S": SEQ}
SGD = OptimizerSection("sgd")


def make_step(graph: Graph, sizes, update=SGD, *, devices=1, config=None, **settings):
    """Return the step of `graph` on the first devices; it computes in float32 by default."""
    spec = StepSpec(sizes, StepConfig(**{"dtype": "f32", **(config or {})}), update, **settings)
    return make_train_step(graph, spec, jax.devices()[:devices])


def bigram(vocab=11, embed=8, dtype=F32) -> Graph:
    """Return a graph that makes logits of the token alone."""
    graph = Graph("bigram")
    tokens = graph.input("tokens", tensor(I32, batch="B", seq="S"))
    table, head = (
        graph.param(n, tensor(dtype, vocab=vocab, embed=embed)) for n in ("table", "head")
    )
    b = Builder(graph)
    hidden = b.embedding(table, tokens, axis="vocab")
    graph.set_output("logits", b.contract(hidden, head, over="embed"))
    return graph


def sparse(routing: str = "top-2", *, padded: bool | str = False, bias: bool = False) -> Graph:
    """Return a decoder of an embedding, one layer of experts and a head.

    Args:
      routing: ``top-1``, ``top-2`` or ``expert-choice``.
      padded: whether there is padding, which an input tells, or ``segments`` above 0 do.
      bias: whether a balance bias is added for the choice.
    """
    graph = Graph("small")
    b = Builder(graph)
    each = {"batch": "B", "seq": "S"}
    tokens = graph.input("tokens", tensor(I32, **each))
    masks = {}
    if padded == "segments":
        segments = graph.input("segments", tensor(I32, **each))
        with b.at("embed"):
            zero = b.constant(value=0.0, dtype="i32")
            masks["mask"] = b.less(zero, segments, name="valid")
    elif padded:
        masks["mask"] = graph.input("mask", tensor(PRED, **each))
    with b.at("embed"):
        table = graph.param("table", tensor(F32, vocab=VOCAB, embed=EMBED), loc="embed")
        hidden = b.embedding(table, tokens, axis="vocab")
    with b.at("layers.0.ffn"):
        router = _param(graph, "router", expert=EXPERTS, embed=EMBED)
        up = _param(graph, "up", expert=EXPERTS, mlp=EMBED, embed=EMBED)
        down = _param(graph, "down", expert=EXPERTS, embed=EMBED, mlp=EMBED)
        if routing == "expert-choice":
            logits = b.contract(hidden, router, over="embed", precision="f32")
            scores = b.softmax(logits, axis="expert")
            chosen, gates, slots = b.expert_choice(
                scores, *masks.values(), tokens=("batch", "seq"), experts=EXPERTS,
                capacity_factor=1.5, using=tuple(masks),
            )  # fmt: skip
            rows = b.dispatch(hidden, chosen, slots)

            def finish(outputs):
                return b.combine(outputs, chosen, slots, gates)
        else:
            top_k = int(routing[-1])
            rows, finish = emit_routing(
                b, hidden, router, experts=EXPERTS, top_k=top_k,
                gates="softmax" if top_k == 1 else "renormalised",
                operands=lambda *_: masks,
                bias=_param(graph, "bias", expert=EXPERTS) if bias else None,
            )  # fmt: skip
        outputs = b.contract(b.silu(b.contract(rows, up, over="embed")), down, over="mlp")
        hidden = b.add(hidden, finish(outputs))
    with b.at("head"):
        head = graph.param("head", tensor(F32, vocab=VOCAB, embed=EMBED), loc="head")
        graph.set_output("logits", b.contract(hidden, head, over="embed"))
    return graph


def _param(graph: Graph, name: str, **axes: int):
    return graph.param(name, tensor(F32, **axes), loc="layers.0.ffn")


def params_of(graph: Graph, seed: int = 0) -> dict[str, Any]:
    """Return random parameters, under which experts differ."""
    rng = np.random.default_rng(seed)
    return {
        n: np.zeros(p.type.shape) if n == "bias" else rng.normal(size=p.type.shape) * 0.6
        for n, p in graph.params.items()
    }


def batch_of(graph: Graph, seed: int, padding: float = 0.4) -> dict[str, Any]:
    """Return a batch whose sequences are padded, one or more of them whole."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32)
    lengths = rng.integers(0, SEQ + 1, BATCH) * (rng.random(BATCH) > padding)
    is_token = np.arange(SEQ) < np.maximum(lengths, rng.random(BATCH) > 0.7)[:, None]
    targets = np.where(is_token & (rng.random((BATCH, SEQ)) > 0.2), np.roll(tokens, -1, 1), -1)
    batch = {"tokens": tokens, "targets": targets.astype(np.int32)}
    if "segments" in graph.inputs:
        return {**batch, "segments": is_token.astype(np.int32)}
    return {**batch, "mask": is_token} if "mask" in graph.inputs else batch
