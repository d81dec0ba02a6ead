"""What losses and metrics do not depend on: the order of experts, tokens, units and layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.add_losses import AddLossesPass

from moecc.ir import Graph

from .layers import Data, applied, evaluated, router

SEEDS = st.integers(0, 2**32 - 1)
UNITS = st.sampled_from(["group", "sequence", "global"])
BATCH, SEQ, EXPERTS = 3, 4, 5
CAPACITY = {"slots": "capacity", "capacity_factor": 1.0, "minimum": 1}


def drawn(seed: int) -> tuple[Data, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(BATCH, SEQ, EXPERTS)), rng


@cache
def graph_of(
    over: Any, balance: Any = "top-1", *, mask: bool = False, layers: int = 1, **options: Any
) -> Graph:
    """Return routers of top-2 with all losses, joined as `how` says, and metrics if one layer."""
    how = options.pop("how", "sum")
    graph = router(EXPERTS, 2, mask=mask, layers=layers, **options)
    item = AddLossesPass(
        over=over, balance=balance, layers=how, metrics=layers == 1, importance_coef=1.0,
        load_coef=1.0,
    )  # fmt: skip
    applied(item, graph)
    return graph


def found(
    logits: Data, over: str, balance: str = "top-1", mask: Data | None = None, **placement: Any
) -> dict[str, Data]:
    """Return all losses and metrics of one layer."""
    graph = graph_of(over, balance, mask=mask is not None, **placement)
    made = evaluated(graph, logits=logits, **({} if mask is None else {"mask": mask}))
    return {n: v for n, v in made.items() if n != "y"}


def same(a: dict[str, Data], b: dict[str, Data], *left_out: str) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if not name.endswith(left_out):
            np.testing.assert_allclose(b[name], value, rtol=1e-11, atol=1e-13, err_msg=name)


@given(SEEDS, UNITS, st.sampled_from(["top-1", "k-hot"]), st.booleans())
def test_experts_have_no_order(seed: int, over: str, balance: str, bounded: bool) -> None:
    logits, rng = drawn(seed)
    order = rng.permutation(EXPERTS)
    placement: dict[str, Any] = CAPACITY if bounded else {}
    before, after = (found(x, over, balance, **placement) for x in (logits, logits[..., order]))
    same(before, after, "loads")
    (loads,) = (n for n in before if n.endswith("loads"))
    np.testing.assert_allclose(after[loads], before[loads][order], rtol=1e-12)


@given(SEEDS, UNITS)
def test_tokens_have_no_order_within_what_a_mean_is_over(seed: int, over: str) -> None:
    """Within a sequence always; across the batch where that is one unit."""
    logits, rng = drawn(seed)
    within = np.stack([row[rng.permutation(SEQ)] for row in logits])
    same(found(logits, over), found(within, over))
    same(found(logits, over), found(logits[rng.permutation(BATCH)], over))
    if over != "sequence":
        across = rng.permutation(logits.reshape(-1, EXPERTS)).reshape(logits.shape)
        same(found(logits, over), found(across, over))


@given(SEEDS, UNITS)
def test_padding_may_stand_anywhere_and_hold_anything(seed: int, over: str) -> None:
    logits, rng = drawn(seed)
    mask = np.stack([rng.permutation(SEQ) < 3 for _ in range(BATCH)])
    other = np.where(mask[..., None], logits, 5 * rng.normal(size=logits.shape))
    same(*(found(x, over, mask=mask) for x in (logits, other)))


@given(SEEDS, UNITS, st.sampled_from(["sum", "mean"]), st.permutations(range(3)))
def test_layers_have_no_order(seed: int, over: str, how: Any, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    layers = rng.normal(size=(3, BATCH, SEQ, EXPERTS))

    def losses(given: Data) -> dict[str, Data]:
        graph = graph_of(over, layers=3, how=how)
        return evaluated(graph, **{f"logits{i}": x for i, x in enumerate(given)})

    same(losses(layers), losses(layers[order]), "y")
