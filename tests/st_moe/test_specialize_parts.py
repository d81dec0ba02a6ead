"""What a mode does beside capacity and policy: dropout, padding, and routing of other kinds."""

import re

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.ir import clone, equal
from moecc.ir.ops.slots import capacity
from moecc.testing import laws, run_reference
from tests.passes.model_graphs import apply_passes, imported

from .layers import MLP, logsumexp, nodes, transformer


def made(text, *, causal=False):
    """Return a small model after the passes of `text`."""
    return then(transformer(2, causal=causal), text)


def then(graph, text):
    after = clone(graph)
    apply_passes(after, text)
    laws.check_graph(after)
    return after


def outputs(graph, key=0, **more):
    rng = np.random.default_rng(0)
    given = {"ids": rng.integers(0, 11, (2, 8)).astype(np.int32), "key": np.uint64(key), **more}
    return run_reference(graph, inputs={n: given[n] for n in graph.inputs})


def drawn(graph):
    """Return where dropout is, by the axes of its numbers."""
    return ["/".join((n.loc, *n.result.type.names)) for n in nodes(graph, "random_uniform")]


# --- dropout


@pytest.fixture
def st_moe():
    return made("st-moe{experts=4 layers=every:2 losses=false}", causal=True)


def test_dropout_is_on_what_sublayers_add_and_on_dense_hidden_values(st_moe):
    graph = then(st_moe, "specialize{dropout=0.1 policy=all}")
    stream = "batch/seq/embed"
    assert sorted(drawn(graph)) == sorted([
        *(f"layers.{i}.{part}/{stream}" for i in range(2) for part in ("attention", "ffn")),
        f"layers.1.extra_ffn/{stream}",
        *(f"layers.{place}/batch/seq/mlp" for place in ("0.ffn", "1.extra_ffn")),
    ])  # fmt: skip


def test_dropout_in_experts_is_apart(st_moe):
    graph = then(st_moe, "specialize{expert-dropout=0.1 policy=all}")
    assert drawn(graph) == ["layers.1.ffn/group/expert/slot/mlp"]
    both = then(graph, "specialize{dropout=0.5 expert-dropout=0.1 policy=all}")
    rates = [n.attrs["value"] for n in nodes(both, "constant")]
    assert (rates.count(0.5), rates.count(0.1)) == (7, 1)


def test_dropout_drops_its_share_and_keeps_the_mean(st_moe):
    graph = then(st_moe, "specialize{dropout=0.25 policy=all}")
    mine = [n for n in graph if n.op.name in ("select", "scale") and n.loc == "layers.0.ffn"]
    scale, select = (n for n in mine if "mlp" in n.result.type)
    graph.set_output("after", select.result)
    graph.set_output("before", scale.operands[0])
    draws = [outputs(graph, key) for key in range(40)]
    before, after = (np.array([draw[name] for draw in draws]) for name in ("before", "after"))
    kept = after != 0
    assert kept.size == 40 * 2 * 8 * MLP
    assert kept.mean() == pytest.approx(0.75, abs=0.02)
    np.testing.assert_allclose(after[kept], before[kept] / 0.75, rtol=1e-12)


# --- padding


def test_padding_gets_no_slot_and_counts_in_no_loss():
    graph = made("upcycle{experts=4},add-losses{balance=k-hot}")
    mask = np.arange(8) < np.array([[8], [3]])
    bounded = "specialize{{capacity-factor=1.0 minimum=1{}}},trace-routing"
    masked, plain = (
        outputs(then(graph, bounded.format(option)), mask=mask)
        for option in (" padding-mask=true", "")
    )
    slots, plain_slots = (found["trace.layers.0.ffn.slots"] for found in (masked, plain))
    assert (slots[~mask] == -1).all()
    # Of 11 tokens more choices fit into the same slots than of 16.
    has_slot = slots[mask] >= 0
    assert has_slot.sum() > (plain_slots[mask] >= 0).sum()
    assert masked["metric.layers.0.ffn.dropped"] == pytest.approx(1 - has_slot.mean())
    z_loss = (logsumexp(masked["trace.layers.0.ffn.logits"][mask]) ** 2).mean()
    only = then(made("upcycle{experts=4 layers=0},add-losses"), "specialize{padding-mask=true}")
    assert outputs(only, mask=mask)["loss.router_z"] == pytest.approx(z_loss, rel=1e-12)


# --- how capacity is counted


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ("capacity-factor=1.25 minimum=1", 5),
        ("capacity-factor=1.25 minimum=1 convention=assignments", 10),
        ("capacity-factor=1.1 minimum=1", 4),
        ("capacity-factor=1.1 minimum=1 rounding=ceil", 5),
        ("capacity-factor=1.1 minimum=1 multiple=8", 8),
        ("capacity-factor=0.25 minimum=3", 3),
        ("capacity-factor=16.0", 16),
        ("capacity-factor=16.0 cap=false", 64),
        ("capacity-factor=1.0 minimum=1 groups=2", 2),
        ("capacity-factor=1.0 minimum=1 group-size=4", 1),
    ],
)
def test_how_many_slots_there_are(options, slots):
    graph = then(made("upcycle{experts=4 layers=0}"), f"specialize{{{options}}}")
    (place,) = nodes(graph, "assign_slots")
    size = place.attrs["group_size"] or 16 // place.attrs["groups"]
    assert capacity(place.attrs, size, 2) == slots
    (dispatch,) = nodes(graph, "dispatch")
    graph.set_output("rows", dispatch.result)
    assert outputs(graph)["rows"].shape == (16 // size, 4, slots, 4)


# --- other kinds of routing


@pytest.mark.parametrize("routing", ["prototypes", "expert-choice"])
@pytest.mark.parametrize("noise", ["jitter=0.5", "router-noise=1.0", "input-dropout=0.5"])
def test_every_router_can_be_perturbed(routing, noise):
    graph = made(f"upcycle{{experts=4 routing={routing}}},trace-routing")
    noisy = then(graph, f"specialize{{{noise}}}")
    part = "slots" if routing == "expert-choice" else "experts"
    plain, first, second = (
        outputs(*case)[f"trace.layers.0.ffn.{part}"] for case in ((graph,), (noisy, 1), (noisy, 2))
    )
    assert (first != second).any()
    assert (first != plain).any()
    graph.attrs["mode"] = "eval"
    assert equal(then(noisy, "specialize{mode=eval}"), graph)


# --- some layers alone


def test_stacks_are_specialised_apart():
    """Flaxformer's batch-prioritised routing in the encoder, none in the decoder."""
    graph = imported("t5_gated_untied", "upcycle{experts=4}")
    with pytest.raises(InputError, match=re.escape("layers=encoder.*; force=true")):
        then(graph, "specialize{priority}")
    encoder = "specialize{layers=encoder.* priority capacity-factor=1.0 group-size=8 policy=random}"
    decoder = "specialize{layers=decoder.* capacity-factor=2.0 group-size=2 jitter=0.1}"
    both = then(graph, f"{encoder},{decoder}")
    expected = {
        "encoder": (1.0, 8, ("keep", "priority")),
        "decoder": (2.0, 2, ()),
    }
    for node in nodes(both, "assign_slots"):
        settings = tuple(node.attrs[n] for n in ("capacity_factor", "group_size", "using"))
        assert settings == expected[node.loc.partition(".")[0]]
    assert sorted(n.attrs["by"] for n in nodes(both, "fold_key")) == list(range(5))
    # Either is taken back without the other.
    assert equal(then(both, decoder), both)
    back = then(both, "specialize{layers=encoder.* capacity-factor=1.0 group-size=8}")
    assert {n.loc.partition(".")[0] for n in nodes(back, "random_uniform")} == {"decoder"}
