"""Slices of activations with parameters (xIELU) are the activation, and are not with others."""

from __future__ import annotations

import json
from functools import cache

import moecc_check
import pytest

from moecc.ir.graph import Graph
from moecc.ir.text import parse, print_graph
from moecc.prove import prove
from moecc.prove.log import digest

from ..oracle.matrix import transformed  # noqa: TID252

PIPELINE = "upcycle{experts=4 granularity=2 top-k=4 router-std=1}"
BETA = 'tile(source("model.layers.0.mlp.act_fn.beta" : f32[]), expert=4)'
CHANGES = (
    (BETA, BETA.replace("layers.0", "layers.1")),
    (BETA, f"scale({BETA}, 2.0)"),
    ("mlp=(part=2, mlp=8)", "mlp=(mlp=8, part=2)"),
    ('function="expm1(a)"', 'function="exp(a)"'),
    ("= minimum %up2, ", "= maximum %up2, "),
)
"""What stands in the graph of experts, and what makes it another function."""


@cache
def sliced() -> tuple[Graph, Graph]:
    """Return a model, and a mixture whose experts are slices of its activation."""
    graphs = transformed("apertus_square", PIPELINE)
    assert isinstance(graphs, tuple)
    return graphs[:2]


def test_slices_of_an_activation_with_parameters_are_proved() -> None:
    verdict = prove(*sliced())
    assert verdict.status == "proved", (verdict.node, verdict.terms)
    log = json.loads(json.dumps(verdict.log))
    assert moecc_check.accepted(log, *map(print_graph, sliced()))[0]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_slices_of_another_activation_are_not(old: str, new: str) -> None:
    before, after = sliced()
    text = print_graph(after)
    assert old in text
    changed = parse(text.replace(old, new, 1))
    assert prove(before, changed).status != "proved"
    log = json.loads(json.dumps({**prove(before, after).log, "after": digest(changed)}))
    with pytest.raises(moecc_check.Rejected):
        moecc_check.accepted(log, print_graph(before), print_graph(changed))
