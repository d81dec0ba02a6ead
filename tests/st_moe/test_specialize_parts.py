"""What a mode does beside capacity and policy: dropout, padding, and routing of other kinds."""

import re
from pathlib import Path

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.ir import clone, equal
from moecc.ir.ops.slots import capacity
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import laws, run_reference

from .layers import MLP, transformer

GOLDEN = Path(__file__).parents[1] / "golden"


def made(text, layers=2, *, causal=False):
    """Return a small model after the passes of `text`."""
    graph = transformer(layers, causal=causal)
    run_pipeline(graph, Pipeline.parse(text))
    laws.check_graph(graph)
    return graph


def then(graph, text):
    after = clone(graph)
    run_pipeline(after, Pipeline.parse(text))
    laws.check_graph(after)
    return after


def outputs(graph, key=0, **more):
    rng = np.random.default_rng(0)
    given = {"ids": rng.integers(0, 11, (2, 8)).astype(np.int32), "key": np.uint64(key), **more}
    return run_reference(graph, inputs={n: given[n] for n in graph.inputs})


def drawn(graph):
    """Return where dropout is, by the axes of its numbers."""
    values = [n.results[0] for n in graph if n.op.name == "random_uniform"]
    return ["/".join((v.node.loc, *v.type.names)) for v in values if v.node is not None]


# --- dropout


ST_MOE = "st-moe{experts=4 layers=every:2 losses=false}"


def test_dropout_is_on_what_sublayers_add_and_on_dense_hidden_values():
    graph = then(made(ST_MOE, causal=True), "specialize{dropout=0.1 policy=all}")
    stream = "batch/seq/embed"
    assert sorted(drawn(graph)) == sorted([
        *(f"layers.{i}.{part}/{stream}" for i in range(2) for part in ("attention", "ffn")),
        f"layers.1.extra_ffn/{stream}",
        *(f"layers.{place}/batch/seq/mlp" for place in ("0.ffn", "1.extra_ffn")),
    ])  # fmt: skip


def test_dropout_in_experts_is_apart():
    graph = then(made(ST_MOE, causal=True), "specialize{expert-dropout=0.1 policy=all}")
    assert drawn(graph) == ["layers.1.ffn/group/expert/slot/mlp"]
    both = then(graph, "specialize{dropout=0.5 expert-dropout=0.1 policy=all}")
    rates = [n.attrs["value"] for n in both if n.op.name == "constant"]
    assert (rates.count(0.5), rates.count(0.1)) == (7, 1)


def test_dropout_drops_its_share_and_keeps_the_mean():
    graph = then(made(ST_MOE, causal=True), "specialize{dropout=0.25 policy=all}")
    mine = [n for n in graph if n.op.name in ("select", "scale") and n.loc == "layers.0.ffn"]
    scale, select = (n for n in mine if "mlp" in n.result.type)
    graph.set_output("after", select.result)
    graph.set_output("before", scale.operands[0])
    found = [outputs(graph, key) for key in range(40)]
    dropped = np.array([f["after"] == 0 for f in found])
    assert dropped.size == 40 * 2 * 8 * MLP
    assert dropped.mean() == pytest.approx(0.25, abs=0.02)
    for one in found:
        kept = one["after"] != 0
        np.testing.assert_allclose(one["after"][kept], one["before"][kept] / 0.75, rtol=1e-12)


# --- padding


def test_padding_gets_no_slot_and_counts_in_no_loss():
    graph = made("upcycle{experts=4},add-losses{balance=k-hot}")
    masked = then(
        graph, "specialize{capacity-factor=1.0 minimum=1 padding-mask=true},trace-routing"
    )
    plain = then(graph, "specialize{capacity-factor=1.0 minimum=1},trace-routing")
    mask = np.arange(8) < np.array([[8], [3]])
    found = outputs(masked, mask=mask)
    slots = found["trace.layers.0.ffn.slots"]
    assert (slots[~mask] == -1).all()
    # Of 11 tokens more choices fit into the same slots than of 16.
    assert (slots[mask] >= 0).sum() > (outputs(plain)["trace.layers.0.ffn.slots"][mask] >= 0).sum()
    logits = found["trace.layers.0.ffn.logits"][mask]
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    assert found["metric.layers.0.ffn.dropped"] == pytest.approx(1 - (slots[mask] >= 0).mean())
    only = then(made("upcycle{experts=4 layers=0},add-losses"), "specialize{padding-mask=true}")
    assert outputs(only, mask=mask)["loss.router_z"] == pytest.approx(z, rel=1e-12)


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
    (place,) = (n for n in graph if n.op.name == "assign_slots")
    size = place.attrs["group_size"] or 16 // place.attrs["groups"]
    assert capacity(place.attrs, size, 2) == slots
    (dispatch,) = (n for n in graph if n.op.name == "dispatch")
    graph.set_output("rows", dispatch.result)
    assert outputs(graph)["rows"].shape == (16 // size, 4, slots, 4)


# --- other kinds of routing


@pytest.mark.parametrize("routing", ["prototypes", "expert-choice"])
@pytest.mark.parametrize("noise", ["jitter=0.5", "router-noise=1.0", "input-dropout=0.5"])
def test_every_router_can_be_perturbed(routing, noise):
    graph = made(f"upcycle{{experts=4 routing={routing}}},trace-routing")
    noisy = then(graph, f"specialize{{{noise}}}")
    name = (
        "trace.layers.0.ffn.slots" if routing == "expert-choice" else "trace.layers.0.ffn.experts"
    )
    plain, one, two = outputs(graph)[name], outputs(noisy, 1)[name], outputs(noisy, 2)[name]
    assert (one != two).any()
    assert (one != plain).any()
    graph.attrs["mode"] = "eval"
    assert equal(then(noisy, "specialize{mode=eval}"), graph)


# --- some layers alone


def encoder_decoder(text):
    with open_model(str(GOLDEN / "t5_gated_untied")) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse(text))
    return graph


def placed(graph):
    return {n.loc: n for n in graph if n.op.name == "assign_slots"}


def test_stacks_are_specialised_apart():
    """Flaxformer's batch-prioritised routing in the encoder, none in the decoder."""
    graph = encoder_decoder("upcycle{experts=4}")
    with pytest.raises(InputError, match=re.escape("layers=encoder.*; force=true")):
        then(graph, "specialize{priority}")
    one = "specialize{layers=encoder.* priority capacity-factor=1.0 group-size=8 policy=random}"
    two = "specialize{layers=decoder.* capacity-factor=2.0 group-size=2 jitter=0.1}"
    both = then(graph, f"{one},{two}")
    for loc, node in placed(both).items():
        inside = loc.startswith("encoder")
        assert node.attrs["capacity_factor"] == (1.0 if inside else 2.0)
        assert node.attrs["group_size"] == (8 if inside else 2)
        assert node.attrs["using"] == (("keep", "priority") if inside else ())
    numbers = [n.attrs["by"] for n in both if n.op.name == "fold_key"]
    assert sorted(numbers) == list(range(5))
    # Either is taken back without the other.
    assert equal(then(both, two), both)
    back = then(both, "specialize{layers=encoder.* capacity-factor=1.0 group-size=8}")
    jittered = [n.loc for n in back if n.op.name == "random_uniform"]
    assert jittered
    assert all(loc.startswith("decoder") for loc in jittered)
