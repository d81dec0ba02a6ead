"""Published models by name: their parameters to the last one, groups, FLOPs."""

from __future__ import annotations

import pytest

from moecc.families import build
from moecc.families.describe import count_parameters, describe, paper_groups, sequence_flops
from moecc.families.registry import parse_config
from moecc.ir import Graph, equal, parse, print_graph, verify
from moecc.model.open import open_model
from moecc.presets import preset_config, preset_names

# Totals: ST-MoE by the formula below, Mixtral of its published config, the others of T5's.
PARAMETERS = {
    "st-moe-base": 700_641_024,
    "st-moe-l": 4_105_444_352,
    "st-moe-32b": 269_104_613_376,
    "dense-l": 783_150_080,
    "t5-xxl": 11_135_332_352,
    "switch-c": 1_571_327_875_360,
    "mixtral-8x7b": 46_702_792_704,
}


def graph_of(name: str) -> Graph:
    return open_model(f"preset:{name}").graph


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_those_of_the_published_model(name: str) -> None:
    assert count_parameters(graph_of(name)).total == PARAMETERS[name]


def test_all_presets_build() -> None:
    assert set(PARAMETERS) < set(preset_names())
    for name in preset_names():
        if name != "switch-c":
            verify(graph_of(name))


def t5_parameters(
    d: int, ff: int, heads: int, dk: int, layers: int, experts: int, sparse: int
) -> int:
    """Count as ST-MoE's tables do: one extra dense sublayer beside each of `sparse` mixtures."""
    attention, block = 4 * d * heads * dk, 3 * d * ff
    norms = 5 * layers + 2 * sparse + 2
    return (
        2 * 32_128 * d
        + 3 * layers * attention
        + 2 * layers * block
        + 2 * sparse * (experts * block + d * experts)
        + norms * d
        + 2 * 32 * heads
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("st-moe-base", (768, 2048, 12, 64, 12, 16, 3)),
        ("st-moe-l", (1024, 2816, 16, 64, 24, 32, 6)),
        ("st-moe-32b", (5120, 20_480, 64, 128, 24, 64, 6)),
        ("dense-l", (1024, 2816, 16, 64, 24, 0, 0)),
        ("t5-xxl", (4096, 10_240, 64, 64, 24, 0, 0)),
    ],
)
def test_the_totals_follow_from_the_sizes(name: str, shape: tuple[int, ...]) -> None:
    assert t5_parameters(*shape) == PARAMETERS[name]  # type: ignore[arg-type]


def test_switch_xxl_has_128_experts_in_every_second_layer() -> None:
    """The paper has 395 billion; the 64 experts in one of four layers of its table are 106."""
    keys = {"d_model": 4096, "d_ff": 10_240, "d_kv": 64, "num_experts_per_tok": 1,
            "gates": "softmax", "extra_ffn": "none"}  # fmt: skip

    def total(experts: int, every: int) -> int:
        layers = list(range(every - 1, 24, every))
        sizes = {"num_experts": experts, "sparse_encoder_layers": layers,
                 "sparse_decoder_layers": layers}  # fmt: skip
        config = parse_config({**preset_config("st-moe-32b"), **keys, **sizes})
        return count_parameters(build(config)).total

    assert total(128, 2) / 1e9 == pytest.approx(394.7, abs=0.05)
    assert total(64, 4) / 1e9 == pytest.approx(106, abs=0.5)


def test_the_sparse_model_is_the_dense_one_and_its_experts() -> None:
    block, width, experts, layers = 3 * 1024 * 2816, 1024, 32, 12
    extra = PARAMETERS["st-moe-l"] - PARAMETERS["dense-l"]
    assert extra == layers * ((experts - 1) * block + width * experts + block + width)


def test_groups_are_those_of_the_paper() -> None:
    groups = count_parameters(graph_of("st-moe-l")).groups
    paper = paper_groups(groups)
    assert sum(groups.values()) == paper["All"] == PARAMETERS["st-moe-l"]
    assert paper["MoE"] + paper["Non-MoE"] == paper["All"]
    # The paper: "around 80 %".
    assert paper["MoE"] / paper["All"] == pytest.approx(0.809, abs=5e-4)
    assert paper["Attention"] == 72 * 4 * 1024 * 1024 + 2 * 32 * 16
    assert paper["FFN"] == 48 * 3 * 1024 * 2816


def test_flops_are_counted_as_the_paper_does_and_as_they_are() -> None:
    found = sequence_flops(graph_of("st-moe-32b"))
    assert found.lengths == {"S": 512, "T": 114}
    assert found.paper / 1e12 == pytest.approx(20.18, abs=5e-3)
    assert found.weights / 1e12 == pytest.approx(21.78, abs=5e-3)
    # Keys and values of 24 cross-attentions, of 512 tokens in place of 114.
    assert found.weights - found.paper == 24 * 2 * 2 * 5120 * 64 * 128 * (512 - 114)
    assert found.attention / 1e12 == pytest.approx(0.262, abs=1e-3)
    assert sequence_flops(graph_of("t5-xxl")).paper / 1e12 == pytest.approx(6.19, abs=5e-3)


def test_the_batch_does_not_count_and_lengths_do() -> None:
    graph = graph_of("dense-l")
    once, twice = (sequence_flops(graph, {"S": s, "T": 2 * s}) for s in (64, 128))
    assert twice.paper == 2 * once.paper
    assert twice.weights == 2 * once.weights
    assert twice.attention == 4 * once.attention
    alone = sequence_flops(graph_of("mixtral-8x7b"), {"S": 1})
    assert alone.paper == alone.weights == describe(graph_of("mixtral-8x7b")).flops_per_token


def test_a_capacity_counts_where_it_binds_and_never_in_the_paper() -> None:
    graph = graph_of("st-moe-l")
    before = sequence_flops(graph)
    for node in graph:
        if node.op.name == "assign_slots":
            assert node.attrs["capacity_factor"] == 2.0
            node.attrs = {**node.attrs, "capacity_factor": 1.25}
    after = sequence_flops(graph)
    assert after.paper == before.paper
    rows = 6 * (512 + 114)
    assert before.weights - after.weights == pytest.approx(0.75 * rows * 2 * 3 * 1024 * 2816)


def test_layers_are_counted_in_both_stacks() -> None:
    facts = describe(graph_of("st-moe-base"))
    assert (facts.layers, facts.stacks) == (24, {"encoder": 12, "decoder": 12})
    assert [layer.loc for layer in facts.expert_layers] == [
        f"{stack}.layers.{n}.ffn" for stack in ("encoder", "decoder") for n in (3, 7, 11)
    ]
    assert describe(graph_of("llama-3.1-8b")).stacks == {}


def test_the_largest_model_of_the_paper_is_a_page_of_text() -> None:
    graph = graph_of("st-moe-32b")
    # Experts are an axis, not nodes: 48 layers of some thirty operations each.
    assert graph.node_count < 48 * 40
    assert equal(parse(print_graph(graph)), graph)
