"""Plans that cannot be, blocks that are left alone, and graphs that stay well-formed."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass
from tiers import examples

from moecc.analysis import find_ffn_blocks
from moecc.errors import InputError, UsageError
from moecc.ir import F64, Builder, Graph, clone, equal, tensor
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.testing import graphs, laws
from moecc.testing.steps import feed_forward
from moecc.weights.expr import Source

from .dense_blocks import EXACT, Dense, applied, error, tokens, upcycled

REFUSED = [  # options, the one to blame, a part of the message
    ("top-k=9", "top-k", "store more experts: experts=9"),
    ("top-k=9", "top-k", "ST-MoE has top-k=2"),
    ("top-k=0", "top-k", "1 <= top-k <= experts=8"),
    ("experts=1 top-k=1", "experts", "at least two"),
    ("granularity=0", "granularity", "at least 1"),
    ("granularity=3", "granularity", "top-k=3 experts=9 would do"),
    ("granularity=2 experts=7", "granularity", "top-k=2 experts=8 would do"),
    ("gates=switch", "gates", "gates=softmax weighs several"),
    ("gates=sparsemixer top-k=3", "gates", "gates=renormalised takes any top-k"),
    ("gates=sparsemixer granularity=2", "gates", "suits any granularity"),
    ("shared=1.0", "shared", "at least 0, less than 1"),
    ("shared=-0.1", "shared", "at least 0, less than 1"),
    ("drop-ratio=1.5", "drop-ratio", "at least 0, at most 1"),
    ("noise-std=-1.0", "noise-std", "at least 0"),
    ("router-std=inf", "router-std", "at least 0"),
    ("gate-scale=0.0", "gate-scale", "more than 0"),
    ("groups=0", "groups", "at least 1"),
    ("slots=capacity capacity-factor=0.0", "capacity-factor", "more than 0"),
    ("layers=every:0", "layers", "selects no layer"),
    ("capacity-factor=0.0", "capacity-factor", "ST-MoE: 1.25 in training, 2.0"),
    ("routing=prototypes experts=8 top-k=3", "top-k", "a divisor of experts=8"),
    ("routing=prototypes gates=sigmoid", "gates", "a softmax of its own"),
    ("routing=prototypes granularity=2", "granularity", "granularity=1"),
    ("routing=hash gates=softmax", "gates", "no scores that gates"),
    ("routing=hash gate-scale=2.0", "gate-scale", "gate-scale=1.0"),
    ("routing=hash balance-bias", "balance-bias", "balance-bias=false"),
    ("routing=soft slots=capacity", "slots", "drops nothing"),
    ("routing=soft soft-slots=0", "soft-slots", "at least 1"),
    ("routing=soft decoder-layers=every:2", "decoder-layers", "Appendix D"),
    ("routing=expert-choice decoder-layers=all", "decoder-layers", "Appendix D"),
    ("routing=expert-choice layers=decoder.layers.*", "layers", "Appendix D"),
    ("balance-bias gates=ones", "balance-bias", "no score that a bias"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "blamed", "says"), REFUSED)
def test_a_plan_that_cannot_be_is_refused_when_it_is_read(options, blamed, says):
    text = f"upcycle{{{options}}}"
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    (problem,) = caught.value.problems
    assert says in str(problem)
    option = re.search(rf"\b{blamed}\b", text)
    assert problem.where.endswith(f":{option.start() + 1}")


def test_a_number_that_is_none_is_refused():
    (problem,) = UpcyclePass(router_std=float("nan")).validate()
    assert (problem.where, problem.expected) == ("router-std", "at least 0")


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
            applied(item, graph)
    else:
        assert applied(item, graph)[1].matched == 1


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
    item = UpcyclePass(**options)
    assert item.validate() == []
    with pytest.raises(InputError, match=says) as caught:
        item.apply(graph, Context())
    assert [p.where for p in caught.value.problems] == ["layers.0.ffn", "layers.1.ffn"]
    assert equal(graph, before)


# --- odd blocks


def odd(build, **axes):
    """Return a graph in which `build` makes ``y`` of ``x`` with weights of the given axes."""
    graph = Graph("odd")
    builder = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F64, batch="B", seq="S", embed=4))
    sizes, weights = {"embed": 4, "mlp": 6}, {}
    for name, names in axes.items():
        type = tensor(F64, **{n: sizes[n] for n in names})
        weights[name] = graph.param(name, type, Source(name, type))
    graph.set_output("y", build(builder, x, **weights))
    return graph


def same(graph, **options):
    """Return whether the converted `graph` computes the same, with a wild router."""
    after, _ = upcycled(graph, router_std=1.0, **options)
    return error(graph, after, tokens(Dense(embed=4))) <= EXACT


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
    assert same(graph)
    assert same(graph, granularity=2)
    assert same(graph, shared=0.5, granularity=3, top_k=3, experts=6)


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


def test_a_hidden_value_with_a_second_user_is_a_near_miss():
    graph = Dense(layers=2, residual=True).graph()
    silu = [n for n in graph if n.op.name == "silu"][1]
    graph.set_output("probe", Builder(graph, loc="probe").relu(silu.result))
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
    twice, result = upcycled(once)
    assert (result.matched, result.changed) == (0, False)
    assert equal(twice, once)
    reasons = [miss.reason for miss in result.near_misses]
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
    once, _ = applied(item, graph, seed)
    assert once.outputs.keys() == graph.outputs.keys()
    laws.check_pass(item, graph)


def _has_weights_to_scale_apart(graph):
    blocks = find_ffn_blocks(graph).blocks
    downs = {b.down.operands[1] for b in blocks}
    return any(up.operands[1] in downs for b in blocks for up in b.ups)
