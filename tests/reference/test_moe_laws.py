"""Laws of a mixture of experts that hold where its function is not the dense one."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import F64, Builder, Graph, tensor
from moecc.testing import run_reference

Data = np.ndarray[Any, Any]
EMBED, MLP = 3, 4


def mixture(experts: int, **routing: Any) -> Graph:
    """Return a graph of a mixture of gated experts, with its choices and places as outputs."""
    assignment = {k: routing.pop(k) for k in list(routing) if k not in ("top_k", "gates", "scale")}
    graph = Graph()
    b = Builder(graph)
    x = graph.input("x", tensor(F64, token="T", embed=EMBED))
    bias = graph.input("bias", tensor(F64, expert=experts))
    shapes = {
        "router": {"embed": EMBED},
        "gate": {"mlp": MLP, "embed": EMBED},
        "up": {"mlp": MLP, "embed": EMBED},
        "down": {"embed": EMBED, "mlp": MLP},
    }
    w = {n: graph.param(n, tensor(F64, expert=experts, **s)) for n, s in shapes.items()}
    logits = b.add(b.contract(x, w["router"], over="embed"), bias)
    chosen, gates = b.route(logits, **routing)
    slots = b.assign_slots(chosen, tokens="token", experts=experts, **assignment)
    rows = b.dispatch(x, chosen, slots)
    hidden = b.mul(
        b.silu(b.contract(rows, w["gate"], over="embed")), b.contract(rows, w["up"], over="embed")
    )
    out = b.contract(hidden, w["down"], over="mlp")
    results = {"y": b.combine(out, chosen, slots, gates), "chosen": chosen, "assign_slots": slots}
    for name, value in {**results, "gates": gates}.items():
        graph.set_output(name, value)
    return graph


def arrays(experts: int, tokens: int, seed: int) -> tuple[dict[str, Data], dict[str, Data]]:
    rng = np.random.default_rng(seed)
    params = {
        "router": rng.normal(size=(experts, EMBED)),
        "gate": rng.normal(size=(experts, MLP, EMBED)),
        "up": rng.normal(size=(experts, MLP, EMBED)),
        "down": rng.normal(size=(experts, EMBED, MLP)),
    }
    return params, {"x": rng.normal(size=(tokens, EMBED)), "bias": np.zeros(experts)}


def expert_outputs(params: dict[str, Data], x: Data) -> Data:
    """Return what each expert makes of each token, ``[expert, token, embed]``."""
    gate, up = (np.einsum("td,emd->etm", x, params[n]) for n in ("gate", "up"))
    return np.einsum("etm,edm->etd", gate / (1 + np.exp(-gate)) * up, params["down"])


def run(graph: Graph, params: dict[str, Data], inputs: dict[str, Data]) -> dict[str, Data]:
    return run_reference(graph, params=params, inputs=inputs)


SEEDS = st.integers(0, 2**32)
EXPERTS = st.integers(1, 5)
TOKENS = st.integers(1, 12)


@given(EXPERTS, TOKENS, SEEDS, st.sampled_from(["renormalised", "sigmoid-renormalised"]))
def test_with_all_experts_chosen_it_is_the_weighted_sum_of_dense_blocks(
    experts: int, tokens: int, seed: int, gates: str
) -> None:
    params, inputs = arrays(experts, tokens, seed)
    found = run(mixture(experts, top_k=experts, gates=gates), params, inputs)
    logits = inputs["x"] @ params["router"].T
    weights = np.exp(logits) if gates == "renormalised" else 1 / (1 + np.exp(-logits))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("te,etd->td", weights, expert_outputs(params, inputs["x"]))
    np.testing.assert_allclose(found["y"], expected, rtol=1e-10, atol=1e-12)


@given(
    EXPERTS, TOKENS, SEEDS, st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from(["choice", "token"])
)
def test_the_error_of_a_capacity_is_what_was_dropped(
    experts: int, tokens: int, seed: int, factor: float, order: str
) -> None:
    params, inputs = arrays(experts, tokens, seed)
    top_k = min(2, experts)
    free = run(mixture(experts, top_k=top_k), params, inputs)
    bounded = run(
        mixture(
            experts,
            top_k=top_k,
            slots="capacity",
            capacity_factor=factor,
            minimum=1,
            order=order,
        ),
        params,
        inputs,
    )
    outputs = expert_outputs(params, inputs["x"])
    lost = np.zeros((tokens, EMBED))
    for token, rank in zip(*np.nonzero(bounded["assign_slots"] < 0), strict=True):
        lost[token] += free["gates"][token, rank] * outputs[free["chosen"][token, rank], token]
    np.testing.assert_allclose(free["y"] - bounded["y"], lost, rtol=1e-9, atol=1e-12)
