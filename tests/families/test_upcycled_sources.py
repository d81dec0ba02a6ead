"""Every dense family upcycles: all blocks are found, and copies compute the golden outputs."""

import json

import pytest
from family_configs import MemoryCheckpoint, run_checkpoint
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.analysis import find_ffn_blocks
from moecc.families.describe import describe
from moecc.formats.open import open_checkpoint
from moecc.ir import verify
from moecc.rewrite.passes import Context
from moecc.translate.export import export_graph
from moecc.translate.importing import import_checkpoint
from moecc.weights.evaluate import evaluate

from .small_config import GOLDEN, golden_arrays, relative_error

CASES = (
    "olmo2_square_tied",
    "phi3_square",
    "smollm3_square_tied",
    "gemma2_caps",
    "gemma4_keys",
    "gpt2_square",
    "gpt_neox_parallel",
    "mpnet_square",
    "electra_narrow",
    "albert_groups",
    "modernbert_windows",
    "deberta_v3",
    "clip_text",
    "swin_windows",
    "dinov2_plain",
    "dinov3_gated",
    "clip_vision",
    "siglip_vision_square",
    "bart_square",
    "mbart_plain",
    "marian_swish",
    "m2m_100_scaled",
    "whisper_square",
)
"""A checkpoint of each family, square where nothing but the names of axes tells them apart."""


@pytest.mark.parametrize("case", CASES)
def test_copies_written_as_st_moe_compute_the_golden_outputs(case):
    with open_checkpoint(GOLDEN / case) as checkpoint:
        graph = import_checkpoint(checkpoint)
        blocks = find_ffn_blocks(graph)
        assert len(blocks.blocks) == describe(graph).layers
        assert not blocks.refusals
        UpcyclePass(experts=4, top_k=2, router_std=1.0).apply(graph, Context())
        verify(graph)
        made = export_graph(graph, "st_moe")
        arrays = {name: evaluate(expr, checkpoint.read) for name, expr in made.tensors}
    # What is read again has been through JSON.
    config = json.loads(json.dumps(made.config_json))
    written = MemoryCheckpoint(config, arrays)
    again = import_checkpoint(written)
    found = run_checkpoint(again, written, golden_arrays(case, *again.inputs))
    (expected,) = golden_arrays(case, *again.outputs).values()
    assert relative_error(found, expected) <= 1e-7


@pytest.mark.parametrize("options", [{}, {"init": "noise", "noise_std": 0.1}, {"shared": 0.5}])
def test_layers_that_share_parameters_share_experts(options):
    with open_checkpoint(GOLDEN / "albert_groups") as checkpoint:
        graph = import_checkpoint(checkpoint)
        groups = [name for name in graph.params if ".ffn.weight" in name]
        UpcyclePass(experts=4, top_k=2, **options).apply(graph, Context())
    experts = [name for name, v in graph.params.items() if "expert" in v.type and "ffn.w" in name]
    assert experts == groups
    assert sum("router" in name for name in graph.params) == 4
