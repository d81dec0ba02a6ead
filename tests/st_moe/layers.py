"""Models of routed layers for tests: routers alone, and small Transformers of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecc.ir import F64, I32, PRED, Builder, Graph, tensor
from moecc.rewrite.passes import Context, Pass, PassResult
from moecc.testing import run_reference
from moecc.weights.expr import Source

Data = np.ndarray[Any, Any]
TOKENS = ("batch", "seq")
EMBED, MLP, VOCAB = 4, 6, 11


def router(experts: int, top_k: int = 1, *, mask: bool = False, layers: int = 1, **attrs) -> Graph:
    """Return a graph whose input is the logits of each layer; the experts are identities."""
    placement = {n: attrs.pop(n) for n in list(attrs) if n not in ("gates", "scale")}
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    given = []
    if mask:
        given = [graph.input("mask", tensor(PRED, batch="B", seq="S"))]
    for layer in range(layers):
        with b.at(f"layers.{layer}.ffn"):
            name = "logits" if layers == 1 else f"logits{layer}"
            logits = graph.input(name, tensor(F64, batch="B", seq="S", expert=experts))
            chosen, gates = b.route(logits, top_k=top_k, **attrs)
            using = ("mask",) if mask else ()
            slots = b.assign_slots(
                chosen, *given, tokens=TOKENS, experts=experts, using=using, **placement
            )
            x = b.combine(b.dispatch(x, chosen, slots), chosen, slots, gates)
    graph.set_output("y", x)
    return graph


def transformer(layers: int = 8, *, causal: bool = True) -> Graph:
    """Return a small dense decoder, or encoder: embedding, attention, gated blocks, a head."""
    graph = Graph("dense")
    b = Builder(graph)
    ids = graph.input("ids", tensor(I32, batch="B", seq="S"))

    def param(name, **sizes):
        type = tensor(F64, **sizes)
        return graph.param(name, type, Source(name, type), loc=b.loc)

    with b.at("embed"):
        x = b.embedding(param("table", vocab=VOCAB, embed=EMBED), ids, axis="vocab")
    for layer in range(layers):
        with b.at(f"layers.{layer}.attention"):
            n = b.rms_norm(x, param(f"{layer}.n1", embed=EMBED), axis="embed")
            q, k, v = (
                b.contract(n, param(f"{layer}.{w}", head_dim=EMBED, embed=EMBED), over="embed")
                for w in "qkv"
            )
            k, v = (b.rename(t, axis="seq", to="kv_seq") for t in (k, v))
            here = b.positions(n, axis="seq")
            seen = b.causal(here, b.rename(here, axis="seq", to="kv_seq"))
            scores = b.contract(q, k, over="head_dim")
            scores = b.mask(scores, seen) if causal else scores
            mixed = b.contract(b.softmax(scores, axis="kv_seq"), v, over="kv_seq")
            out = b.contract(
                mixed, param(f"{layer}.o", embed=EMBED, head_dim=EMBED), over="head_dim"
            )
            x = b.add(x, out)
        with b.at(f"layers.{layer}.ffn"):
            n = b.rms_norm(x, param(f"{layer}.n2", embed=EMBED), axis="embed")
            gate, up = (
                b.contract(n, param(f"{layer}.{w}", mlp=MLP, embed=EMBED), over="embed")
                for w in ("gate", "up")
            )
            hidden = b.mul(b.gelu_tanh(gate), up)
            down = param(f"{layer}.down", embed=EMBED, mlp=MLP)
            x = b.add(x, b.contract(hidden, down, over="mlp"))
    with b.at("head"):
        n = b.rms_norm(x, param("n", embed=EMBED), axis="embed")
        graph.set_output(
            "logits", b.contract(n, param("out", vocab=VOCAB, embed=EMBED), over="embed")
        )
    return graph


def applied(item: Pass, graph: Graph, seed: int = 0) -> PassResult:
    """Apply a pass whose options are right, in place."""
    assert item.validate() == []
    return item.apply(graph, Context(seed=seed))


def evaluated(graph: Graph, **inputs: Data) -> dict[str, Data]:
    """Return the outputs for `inputs`; the tokens themselves are zeros if they are not given."""
    logits = next(v for n, v in inputs.items() if n.startswith("logits"))
    given = {"x": np.zeros((*logits.shape[:2], 2)), **inputs}
    return run_reference(graph, inputs=given)


def softmax(x: Data, axis: int = -1) -> Data:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)
