"""Plans that cannot be, blocks that are left alone, and graphs that stay well-formed."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass
from tiers import examples

from moecc.analysis import find_ffn_blocks
from moecc.errors import InputError
from moecc.ir import Graph, parse, print_graph
from moecc.ir.builder import Builder
from moecc.ir.structure import clone, equal
from moecc.rewrite.passes import Context
from moecc.testing import graphs, laws
from moecc.testing.steps import feed_forward
from moecc.types import F64, tensor
from moecc.weights.expr import Source

from .dense_blocks import Dense, Tensors, relative, run, tokens, upcycled

REFUSED = [  # options, where, a part of the message
    ({"top_k": 9}, "top-k", "store more experts: experts=9"),
    ({"top_k": 0}, "top-k", "1 <= top-k <= experts=8"),
    ({"experts": 1, "top_k": 1}, "experts", "at least two"),
    ({"granularity": 0}, "granularity", "at least 1"),
    ({"granularity": 3}, "granularity", "top-k=3 experts=9 would do"),
    ({"granularity": 2, "experts": 7}, "granularity", "top-k=2 experts=8 would do"),
    ({"gates": "switch"}, "gates", "gates=softmax weighs several"),
    ({"gates": "sparsemixer", "top_k": 3}, "gates", "gates=renormalised takes any top-k"),
    ({"gates": "sparsemixer", "granularity": 2}, "gates", "suits any granularity"),
    ({"shared": 1.0}, "shared", "at least 0, less than 1"),
    ({"shared": -0.1}, "shared", "at least 0, less than 1"),
    ({"drop_ratio": 1.5}, "drop-ratio", "at least 0, at most 1"),
    ({"noise_std": -1.0}, "noise-std", "at least 0"),
    ({"router_std": float("nan")}, "router-std", "at least 0"),
    ({"gate_scale": 0.0}, "gate-scale", "more than 0"),
    ({"groups": 0}, "groups", "at least 1"),
    ({"slots": "capacity", "capacity_factor": 0.0}, "capacity-factor", "more than 0"),
    ({"layers": "every:0"}, "layers", "selects no layer"),
    ({"capacity_factor": 0.0}, "capacity-factor", "ST-MoE: 1.25 in training"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "where", "says"), REFUSED)
def test_a_plan_that_cannot_be_is_refused(options, where, says):
    problems = UpcyclePass(**options).validate()
    assert where in [p.where for p in problems]
    assert says in "\n".join(map(str, problems))


@given(
    st.integers(-1, 9), st.integers(-1, 9), st.integers(-1, 5),
    st.sampled_from(["renormalised", "switch", "sparsemixer", "softmax"]),
)  # fmt: skip
def test_what_is_not_refused_runs(experts, top_k, granularity, gates):
    """Options by themselves are refused, or work on a block of 12 neurons."""
    item = UpcyclePass(experts, top_k, granularity=granularity, gates=gates)
    if item.validate():
        return
    graph = Dense().graph()
    if 12 % granularity:
        with pytest.raises(InputError, match="do not divide into"):
            item.apply(graph, Context())
        return
    assert item.apply(graph, Context()).matched == 1
    laws.check_graph(graph)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shared": 0.3}, "expected: shared=0.3333333333, say"),
        ({"shared": 0.99999999}, "expected: shared=0.9166666667, say"),
        ({"granularity": 5, "top_k": 5, "experts": 5}, "expected: G among 1"),
        ({"granularity": 2, "shared": 0.25}, "the 9 neurons do not divide into granularity=2"),
        ({"granularity": 2, "shared": 0.25}, "hint: pad=1 adds neurons that add nothing"),
        ({"experts": 5, "split": "index"}, "hint: pad=1 adds some that add nothing"),
        ({"pad": 64}, "more neurons would be added than there are"),
    ],
)
def test_neurons_that_do_not_divide_are_refused(options, says):
    graph = Dense(layers=2).graph()
    before = clone(graph)
    with pytest.raises(InputError) as error:
        upcycled(graph, **options)
    assert [p.where for p in error.value.problems] == ["layers.0.ffn", "layers.1.ffn"]
    assert says in str(error.value)
    assert equal(graph, before)


# --- odd blocks


def _weights(graph, dtype=F64, **axes):
    sizes = {"embed": 4, "mlp": 6, "head": 2, "wide": 4}
    found = {}
    for name, names in axes.items():
        type = tensor(dtype, **{n: sizes[n] for n in names})
        found[name] = graph.param(name, type, Source(name, type))
    return found


def odd(build, *, dtype=F64, **axes):
    """Return a graph in which `build` makes ``y`` of ``x`` with weights of the given axes."""
    graph = Graph("odd")
    builder = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(dtype, batch="B", seq="S", embed=4))
    graph.set_output("y", build(builder, x, **_weights(graph, dtype, **axes)))
    return graph


def same(graph, **options):
    """Return whether the converted `graph` computes the same, with a wild router."""
    tensors = Tensors(graph)
    inputs = tokens(Dense(embed=4))
    after, _ = upcycled(graph, router_std=1.0, **options)
    laws.check_graph(after)
    expected = run(graph, tensors.params(graph), inputs)["y"]
    return relative(run(after, tensors.params(after), inputs)["y"], expected) <= 1e-12


OUT_IN, IN_OUT = ("mlp", "embed"), ("embed", "mlp")


def test_a_weight_that_is_used_twice_before_the_activation_cannot_take_half_the_factor():
    def tied(b, x, w, down):
        gate, up = (b.contract(x, w, over="embed") for _ in range(2))
        return b.contract(b.mul(b.silu(gate), up), down, over="mlp")

    graph = odd(tied, w=OUT_IN, down=IN_OUT)
    assert same(graph)
    assert same(graph, granularity=2)
    with pytest.raises(InputError, match="the block is linear in none"):
        same(graph, granularity=2, scale_placement="up-down")


def test_two_biases_of_one_product_are_both_scaled():
    def doubled(b, x, g, u, p, q, d):
        up = b.contract(x, u, over="embed")
        up = b.mul(b.add(up, p), b.relu(b.add(up, q)))
        return b.contract(b.mul(b.silu(b.contract(x, g, over="embed")), up), d, over="mlp")

    graph = odd(doubled, g=OUT_IN, u=OUT_IN, p=("mlp",), q=("mlp",), d=IN_OUT)
    assert same(graph, granularity=2)
    assert same(graph, granularity=2, scale_placement="down")
    with pytest.raises(InputError, match="linear in none"):
        same(graph, granularity=2, scale_placement="up-down")


def test_a_multiplicative_bias_and_constants_go_along():
    def built(b, x, g, u, m, d):
        gate = b.contract(x, g, over="embed")
        half = b.constant(value=0.5, dtype="f64")
        gate = b.minimum(b.silu(gate), b.constant(value=0.7, dtype="f64"))
        up = b.add(b.contract(x, u, over="embed"), half)
        y = b.contract(b.mul(b.mul(gate, up), b.exp(m)), d, over="mlp")
        return b.mul(y, half)

    graph = odd(built, g=OUT_IN, u=OUT_IN, m=("mlp",), d=IN_OUT)
    for options in ({}, {"granularity": 2}, {"shared": 0.5, "granularity": 3, "top_k": 3,
                                             "experts": 6}):  # fmt: skip
        assert same(graph, **options)


def test_a_weight_that_another_part_of_the_model_uses_stays():
    def built(b, x, up, down):
        y = b.contract(b.silu(b.contract(x, up, over="embed")), down, over="mlp")
        with b.at("layers.1.ffn"):
            again = b.contract(b.silu(b.contract(y, up, over="embed")), down, over="mlp")
        return b.contract(b.contract(again, up, over="embed"), up, over="mlp")

    graph = odd(built, up=OUT_IN, down=IN_OUT)
    assert same(graph, granularity=2)
    after, result = upcycled(graph, init="noise")
    assert result.matched == 2
    assert after.params["up"].type.names == OUT_IN
    drawn = [str(p.weight) for n, p in after.params.items() if "router" not in n]
    # Layers that share weights share experts.
    assert len({w for w in drawn if "normal(" in w}) == 2


# --- what is left alone, and why


def refusals(graph, **options):
    before = clone(graph)
    after, result = upcycled(graph, **options)
    assert result.matched == 0
    assert not result.changed
    assert equal(after, before)
    return [m.reason for m in result.near_misses]


def test_a_hidden_value_with_a_second_user_is_a_near_miss():
    graph = Dense(layers=2, residual=True).graph()
    silu = [n for n in graph if n.op.name == "silu"][1]
    builder = Builder(graph, loc="probe")
    graph.set_output("probe", builder.relu(silu.result))
    after, result = upcycled(graph)
    assert result.matched == 1
    (miss,) = result.near_misses
    assert miss.where == "layers.1.ffn"
    assert miss.reason == f"%{silu.result.name} inside it is also used by relu @probe"
    assert [n.loc for n in after if n.op.name == "dispatch"] == ["layers.0.ffn"]


@pytest.mark.parametrize("options", [{}, {"shared": 0.5}])
def test_what_is_sparse_already_is_a_near_miss(options):
    """The shared expert of a sparse layer is no dense block either."""
    once, _ = upcycled(Dense(layers=2, residual=True).graph(), **options)
    reasons = refusals(once)
    assert len(reasons) == (4 if options else 2)
    assert sum(r == "it is sparse already" for r in reasons) == 2
    assert all("sparse already" in r for r in reasons)


# --- random graphs


@settings(max_examples=examples(20, 100))
@given(graphs(steps=[feed_forward]), st.integers(0, 2), st.booleans())
def test_random_graphs_keep_what_is_promised(graph, seed, scaled):
    """Every block that the strategy makes, with taps inside it, batch axes and shared weights."""
    for param in graph.params.values():
        param.weight = param.weight or Source(param.name, param.type)
    item = UpcyclePass(experts=2, top_k=1, gate_scale=2.5 if scaled else 1.0, router_std=0.5)
    assume(not _has_weights_to_scale_apart(graph) or not scaled)
    once = clone(graph)
    item.apply(once, Context(seed))
    laws.check_changed_flag(item, graph)
    laws.check_idempotent(item, graph)
    laws.check_round_trip(once)
    assert parse(print_graph(once)).outputs.keys() == graph.outputs.keys()
    laws.check_preserves(item, graph)


def _has_weights_to_scale_apart(graph):
    blocks = find_ffn_blocks(graph).blocks
    downs = {b.down.operands[1] for b in blocks}
    return any(up.operands[1] in downs for b in blocks for up in b.ups)
