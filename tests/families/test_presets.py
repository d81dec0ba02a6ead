"""Published models by name: their parameters to the last one, groups, FLOPs."""

import pytest

from moecc.families.describe import count_parameters, paper_groups, sequence_flops
from moecc.model.open import open_model

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


def graph_of(name):
    return open_model(f"preset:{name}").graph


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_those_of_the_published_model(name):
    assert count_parameters(graph_of(name)).total == PARAMETERS[name]


def test_groups_are_those_of_the_paper():
    groups = count_parameters(graph_of("st-moe-l")).groups
    paper = paper_groups(groups)
    assert sum(groups.values()) == paper["All"] == PARAMETERS["st-moe-l"]
    assert paper["MoE"] + paper["Non-MoE"] == paper["All"]
    # The paper: "around 80 %".
    assert paper["MoE"] / paper["All"] == pytest.approx(0.809, abs=5e-4)
    assert paper["Attention"] == 72 * 4 * 1024 * 1024 + 2 * 32 * 16
    assert paper["FFN"] == 48 * 3 * 1024 * 2816


def test_flops_are_counted_as_the_paper_does_and_as_they_are():
    found = sequence_flops(graph_of("st-moe-32b"))
    assert found.lengths == {"S": 512, "T": 114}
    assert found.paper / 1e12 == pytest.approx(20.18, abs=5e-3)
    assert found.weights / 1e12 == pytest.approx(21.78, abs=5e-3)
    # Keys and values of 24 cross-attentions, of 512 tokens in place of 114.
    assert found.weights - found.paper == 24 * 2 * 2 * 5120 * 64 * 128 * (512 - 114)
    assert found.attention / 1e12 == pytest.approx(0.262, abs=1e-3)
    assert sequence_flops(graph_of("t5-xxl")).paper / 1e12 == pytest.approx(6.19, abs=5e-3)


def test_a_capacity_counts_where_it_binds_and_never_in_the_paper():
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
