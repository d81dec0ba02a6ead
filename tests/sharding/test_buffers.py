"""Bounded receive buffers: what is dropped, counted by hand."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from sharding_cases import layer

from moecc.errors import InputError
from moecc.ir import F32, I32, Builder, Graph, clone, tensor, verify
from moecc.testing import laws, run_reference

from .meshes import check_on_devices, data_for, largest_difference, run

WAYS = [
    # mesh, rules, way, devices that share the experts, blocks of them
    ("data:8", "st-moe", "via=ragged", 8, 1),
    ("data:8", "st-moe", "via=ring", 8, 1),
    ("data:2,expert:4", "expert-parallel", "via=ring", 4, 2),
    ("data:2,expert:4", "expert-parallel", "via=ragged", 4, 2),
    ("far:2,near:4", "expert-hierarchical", "via=hierarchical", 8, 1),
    ("data:2,expert:4", "expert-replicated", "via=replicated", 4, 2),
    ("data:4,model:2", "st-moe", "via=ragged slice=model", 4, 1),
]


def kept_by_hand(experts, parts, blocks, factor):
    """Return which choices `[group, token, choice]` find room, row by row in order of arrival."""
    keep = np.ones(experts.shape, bool)
    each, count = len(experts) // blocks, 8 // parts
    room = ceil(Fraction(repr(factor)) * (experts.size // blocks) / parts)
    for block in range(blocks):
        for part in range(parts):
            rows = []
            for group in range(block * each, (block + 1) * each):
                for expert in range(part * count, (part + 1) * count):
                    # All first choices have slots before any second (ST-MoE, Appendix D).
                    chosen = np.argwhere(experts[group].transpose() == expert)
                    rows += [(group, token, choice) for choice, token in chosen]
            for row in rows[room:]:
                keep[row] = False
    return keep


@pytest.mark.parametrize("factor", [0.75, 1.3])
@pytest.mark.parametrize(("mesh", "rules", "way", "parts", "blocks"), WAYS)
def test_what_has_no_room_is_dropped_and_counted(mesh, rules, way, parts, blocks, factor):
    whole = layer("ragged")
    graph = clone(whole)
    passes = f"annotate-sharding{{mesh={mesh} rules={rules}}},expert-parallel{{{way}"
    run(graph, f"{passes} buffer-factor={factor}}},trace-routing,lower-collectives")
    laws.check_round_trip(graph)
    params, inputs = data_for(whole, batch=8)
    outputs, expected = check_on_devices(graph, graph, params, inputs)
    experts = expected["trace.layers.0.ffn.experts"].reshape(16, -1, 2)
    keep = kept_by_hand(experts, parts, blocks, factor)
    assert np.array_equal(expected["trace.layers.0.ffn.slots"].reshape(keep.shape) >= 0, keep)
    assert outputs["dropped.layers.0.ffn"] == (~keep).sum()
    unbounded = run_reference(whole, params=params, inputs=inputs)
    assert (~keep).any() == (largest_difference(unbounded, outputs) > 1e-9)
    run(graph, "strip-sharding")
    verify(graph)
    assert largest_difference(expected, run_reference(graph, params=params, inputs=inputs)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": 3}, "parts do not divide the axis 'expert'"),
        ({"blocks": 0}, "blocks do not divide the axis 'group'"),
        ({"factor": 0.0}, "a positive factor"),
        ({"tokens": ("batch",)}, "choices by token"),
    ],
)
def test_numbers_that_do_not_suit(changes, message):
    graph = Graph()
    x = graph.input("x", tensor(I32, batch=4, seq=2, choice=2))
    counts = graph.input("counts", tensor(F32, group=2, expert=4))
    attrs = {"tokens": ("batch", "seq"), "parts": 2, "factor": 1.0}
    with pytest.raises(InputError, match=message):
        Builder(graph).within_buffer(x, x, counts, **attrs | changes)
