"""Models of routed layers for tests: routers alone, and small Transformers of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from moecc_passes.add_losses import AddLossesPass

from moecc.ir import F64, I32, PRED, Builder, Graph, Node, Value, tensor
from moecc.rewrite.passes import Context, Pass, PassResult
from moecc.testing import run_reference
from moecc.weights.expr import Source

Data = np.ndarray[Any, Any]
TOKENS = ("batch", "seq")
EMBED, MLP, VOCAB = 4, 6, 11
SIZES = {"embed": EMBED, "head_dim": EMBED, "mlp": MLP, "vocab": VOCAB}


def router(
    experts: int, top_k: int = 1, *, mask: bool = False, layers: int = 1, **placement: Any
) -> Graph:
    """Return a graph whose input is the logits of each layer; the experts are identities."""
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    masks = {"mask": graph.input("mask", tensor(PRED, batch="B", seq="S"))} if mask else {}
    for layer in range(layers):
        with b.at(f"layers.{layer}.ffn"):
            name = "logits" if layers == 1 else f"logits{layer}"
            logits = graph.input(name, tensor(F64, batch="B", seq="S", expert=experts))
            chosen, gates = b.route(logits, top_k=top_k)
            slots = b.assign_slots(
                chosen, *masks.values(), tokens=TOKENS, experts=experts, using=tuple(masks),
                **placement,
            )  # fmt: skip
            x = b.combine(b.dispatch(x, chosen, slots), chosen, slots, gates)
    graph.set_output("y", x)
    return graph


def attend(b: Builder, q: Value, k: Value, v: Value, *, over: str, causal: bool = True) -> Value:
    """Return what every token gets from all, or from itself and those before it."""
    k, v = (b.rename(value, axis="seq", to="kv_seq") for value in (k, v))
    scores = b.contract(q, k, over=over)
    if causal:
        here = b.positions(q, axis="seq")
        scores = b.mask(scores, b.causal(here, b.rename(here, axis="seq", to="kv_seq")))
    return b.contract(b.softmax(scores, axis="kv_seq"), v, over="kv_seq")


def transformer(layers: int = 8, *, causal: bool = True) -> Graph:
    """Return a small dense decoder, or encoder: embedding, attention, gated blocks, a head."""
    graph = Graph("dense")
    b = Builder(graph)
    ids = graph.input("ids", tensor(I32, batch="B", seq="S"))

    def param(name: str, *axes: str) -> Value:
        type = tensor(F64, **{axis: SIZES[axis] for axis in axes})
        return graph.param(name, type, Source(name, type), loc=b.loc)

    def norm(x: Value, name: str) -> Value:
        return b.rms_norm(x, param(name, "embed"), axis="embed")

    def linear(x: Value, name: str, to: str, over: str = "embed") -> Value:
        return b.contract(x, param(name, to, over), over=over)

    with b.at("embed"):
        x = b.embedding(param("table", "vocab", "embed"), ids, axis="vocab")
    for layer in range(layers):
        with b.at(f"layers.{layer}.attention"):
            n = norm(x, f"{layer}.n1")
            q, k, v = (linear(n, f"{layer}.{w}", "head_dim") for w in "qkv")
            mixed = attend(b, q, k, v, over="head_dim", causal=causal)
            x = b.add(x, linear(mixed, f"{layer}.o", "embed", "head_dim"))
        with b.at(f"layers.{layer}.ffn"):
            n = norm(x, f"{layer}.n2")
            gate, up = (linear(n, f"{layer}.{w}", "mlp") for w in ("gate", "up"))
            hidden = b.mul(b.gelu_tanh(gate), up)
            x = b.add(x, linear(hidden, f"{layer}.down", "embed", "mlp"))
    with b.at("head"):
        graph.set_output("logits", linear(norm(x, "n"), "out", "vocab"))
    return graph


def nodes(graph: Graph, operation: str) -> list[Node]:
    """Return the nodes of an operation, in order."""
    return [node for node in graph if node.op.name == operation]


def applied(item: Pass, graph: Graph) -> PassResult:
    """Apply a pass whose options are right, in place."""
    assert item.validate() == []
    return item.apply(graph, Context())


def evaluated(graph: Graph, **inputs: Data) -> dict[str, Data]:
    """Return the outputs for `inputs`; the tokens themselves are zeros if they are not given."""
    logits = next(v for n, v in inputs.items() if n.startswith("logits"))
    return run_reference(graph, inputs={"x": np.zeros((*logits.shape[:2], 2)), **inputs})


def losses(
    logits: Data, top_k: int = 1, mask: Data | None = None, *, placement: Any = None, **options: Any
) -> dict[str, Data]:
    """Return losses and metrics of one layer with these logits, ``[batch, seq, expert]``."""
    graph = router(logits.shape[-1], top_k, mask=mask is not None, **placement or {})
    applied(AddLossesPass(**options), graph)
    outputs = evaluated(graph, logits=logits, **({} if mask is None else {"mask": mask}))
    return {n.removeprefix("metric.layers.0.ffn."): v for n, v in outputs.items()}


def normal(seed: int, *shape: int) -> Data:
    """Return normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def logsumexp(x: Data) -> Data:
    return np.log(np.exp(x).sum(-1))


def softmax(x: Data, axis: int = -1) -> Data:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)
