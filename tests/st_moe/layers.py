"""Models of routed layers for tests: routers alone, and small Transformers of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecc.ir import F64, I32, PRED, Builder, Graph, Value, tensor
from moecc.pipeline.passes import Context, Pass, PassResult
from moecc.testing import run_reference

Data = np.ndarray[Any, Any]
TOKENS = ("batch", "seq")


def router(
    experts: int, top_k: int = 1, *, mask: bool = False, layers: int = 1, **attrs: Any
) -> Graph:
    """Return a graph whose input is the logits of each layer; the experts are identities."""
    placement = {n: attrs.pop(n) for n in list(attrs) if n not in ("gates", "scale")}
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=2))
    given: list[Value] = []
    if mask:
        given = [graph.input("mask", tensor(PRED, batch="B", seq="S"))]
    for layer in range(layers):
        with b.at(f"layers.{layer}.ffn"):
            name = "logits" if layers == 1 else f"logits{layer}"
            logits = graph.input(name, tensor(F64, batch="B", seq="S", expert=experts))
            chosen, gates = b.route(logits, top_k=top_k, **attrs)
            using = ("mask",) if mask else ()
            place = b.place(
                chosen, *given, tokens=TOKENS, experts=experts, using=using, **placement
            )
            x = b.combine(b.dispatch(x, chosen, place), chosen, place, gates)
    graph.set_output("y", x)
    return graph


def slots(choices: Data, experts: int, priority: Data | None = None, **attrs: Any) -> Data:
    """Return the slots of `choices`, ``[token, choice]``, under a capacity of 4 at least."""
    graph = Graph()
    e = graph.input("e", tensor(I32, token="T", choice=choices.shape[1]))
    given: dict[str, Data] = {} if priority is None else {"priority": priority}
    operands = [graph.input(n, tensor(F64, token="T")) for n in given]
    bound = {"slots": "capacity", "minimum": 4, "using": tuple(given), **attrs}
    b = Builder(graph)
    graph.set_output("p", b.place(e, *operands, tokens="token", experts=experts, **bound))
    return run_reference(graph, inputs={"e": choices, **given})["p"]


def best(scores: Data, k: int) -> Data:
    """Return the `k` best experts of each token by ``[token, expert]``, the lowest of equals."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


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
    made: Data = e / e.sum(axis, keepdims=True)
    return made
