"""What is said to fit is what ``convert`` writes; what ``auto`` chooses; what engines read."""

import json

import pytest
from tiers import few

from moecc.analysis import layer_number
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS, parse_config
from moecc.families.t5 import SwitchTransformersConfig
from moecc.jobs import targets
from moecc.jobs.convert import plan, write
from moecc.jobs.targets import choose, fits
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.translate.engines import verdicts
from moecc.translate.export import export_graph

from .small_config import GOLDEN, OF_EACH_FAMILY, small
from .test_propose import graph_of


def fitting(graph):
    return {fit.target for fit in fits(graph) if fit.fits}


def reasons(graph, target):
    (fit,) = (fit for fit in fits(graph) if fit.target == target)
    return "\n".join(map(str, fit.reasons))


def test_a_dense_graph_is_taken_as_upcycled():
    assert {"mixtral", "qwen2_moe", "st_moe"} <= fitting(graph_of("llama"))
    assert "qwen3_moe" in fitting(graph_of("qwen3", head_dim=4))
    assert "mixtral" not in fitting(graph_of("qwen3", head_dim=4))
    assert fitting(graph_of("llama", mlp_bias=True)) == {"st_moe"}
    assert "feed-forward" in reasons(graph_of("llama", mlp_bias=True), "mixtral")
    (fit,) = (fit for fit in fits(graph_of("qwen2")) if fit.target == "qwen2_moe")
    assert fit.passes == "upcycle{experts=8 top-k=2 shared=0.5}"


def test_a_sparse_graph_is_taken_as_it_is():
    graph = graph_of("qwen3", {}, head_dim=4)
    assert {fit.passes for fit in fits(graph)} == {""}
    assert {"qwen3_moe", "st_moe"} <= fitting(graph)


def test_layers_that_are_alike_are_exported_once_or_twice(monkeypatch):
    def export(graph, target, source):
        exported.append(len({loc for node in graph if (loc := layer_number(node.loc)) is not None}))
        return export_graph(graph, target, source=source)

    exported = []
    monkeypatch.setattr(targets, "export_graph", export)
    alike = fits(graph_of("qwen2", num_hidden_layers=5))
    assert set(exported) == {2}
    assert alike == fits(graph_of("qwen2", num_hidden_layers=2))
    exported.clear()
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}
    found = reasons(graph_of("qwen2", num_hidden_layers=5, **windows), "mixtral")
    assert set(exported) == {5}
    assert "[0, 4]" in found


@pytest.mark.parametrize("source", few(OF_EACH_FAMILY.values(), 20))
def test_auto_writes_whatever_is_read(source):
    """A dense model stays in its family, upcycled it becomes one that engines read."""
    with open_model(str(GOLDEN / source)) as model:
        family = str(model.graph.attrs["family"])
        sparse = issubclass(CONFIGS[family], MoeConfig | SwitchTransformersConfig)
        assert choose(model.graph).target == family
        if sparse:
            return
        planned = plan(model, Pipeline.parse("upcycle{experts=4 top-k=2}"), "auto")
    chosen = CONFIGS[planned.target]
    assert issubclass(chosen, MoeConfig) or planned.target == "st_moe"
    assert any(remark.startswith(f"auto chose {planned.target}") for remark in planned.remarks)


def test_auto_explains(tmp_path):
    with open_model(str(GOLDEN / "llama_gqa")) as model:
        planned = plan(model, Pipeline.parse("upcycle"), "auto")
        (remark,) = (r for r in planned.remarks if r.startswith("auto"))
        assert remark.startswith("auto chose mixtral, which runs in transformers 5, transformers 4")
        write(planned, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"
    graph = graph_of("qwen2", {"layers": "0,2", "expert_bias": "additive"})
    reason = choose(graph).reason
    way_out = "--emit torch writes the class for transformers"
    start = f"auto chose st_moe, which only moecc reads; {way_out}; the nearest other is "
    assert reason.startswith(start)


# --- engines


def config(family, **keys):
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    return parse_config(small(family, **experts, **keys))


def verdict(config, engine):
    (verdict_of_engine,) = (v for v in verdicts(config) if v.engine == engine)
    return verdict_of_engine


def test_vllm_takes_silu_for_another_activation_where_no_block_is_dense():
    for keys, silent in (({}, True), ({"mlp_only_layers": [0]}, False)):
        found = verdict(config("qwen3_moe", hidden_act="gelu", head_dim=4, **keys), "vLLM")
        assert found.reasons == ("another activation than SiLU",)
        assert found.silent == silent


@pytest.mark.parametrize(
    ("name", "runs", "silent"),
    [
        ("llama4_square", True, False),
        ("lfm2_moe_square", False, True),
        ("ernie4_5_moe_square_v4", False, True),
        ("phimoe_square_v4", False, False),
    ],
)
def test_what_vllm_does_of_whole_families(name, runs, silent):
    found = verdict(parse_config(json.loads((GOLDEN / name / "config.json").read_text())), "vLLM")
    assert (found.runs, found.silent) == (runs, silent)


def test_vllm_is_told_the_bounds_of_yarn_and_no_factor():
    stated = json.loads((GOLDEN / "gpt_oss_limits" / "config.json").read_text())
    stated |= {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True}
    assert "beta_fast" not in stated["rope_parameters"]
    rope = parse_config(stated).to_json()["rope_parameters"]
    assert (rope["beta_fast"], rope["beta_slow"]) == (32.0, 1.0)
    for factors in ({"attention_factor": 1.5}, {"mscale": 0.7, "mscale_all_dim": 0.7}):
        found = verdict(parse_config(stated | {"rope_parameters": rope | factors}), "vLLM")
        assert found.reasons == ("a factor of rotary scalings that the config states",)
        assert found.silent


def test_known_misreadings():
    tied = config("mixtral", tie_word_embeddings=True)
    assert verdict(tied, "SGLang").reasons == ("an output matrix tied to the embedding",)
    assert verdict(tied, "SGLang").silent
    assert verdict(tied, "vLLM").runs
    assert verdict(tied, "vLLM").note == ""
    linear = config("mixtral", rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert str(verdict(linear, "vLLM")) == "vLLM ✓"
    assert str(verdict(config("mixtral"), "SGLang")) == "SGLang ✓ (code read)"
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 4}
    for engine in ("vLLM", "SGLang"):
        grows = verdict(config("qwen3_moe", norm_topk_prob=True, **dynamic), engine)
        assert grows.reasons == ("rotary positions whose base grows with the length",)
        assert grows.silent
    shared = {"norm_topk_prob": True, "qkv_bias": False, "head_dim": 4}
    qwen = config("qwen2_moe", **shared)
    assert verdict(qwen, "vLLM").reasons == ("queries, keys and values without biases",)
    assert verdict(qwen, "vLLM").silent
    assert "renormalised gates" in verdict(qwen, "llama.cpp").reasons
    plain = config("qwen2_moe", norm_topk_prob=False)
    assert verdict(plain, "llama.cpp").note == "as gguf:qwen2moe"
    partial = config("qwen3_moe", norm_topk_prob=True, decoder_sparse_step=2, head_dim=4)
    assert str(verdict(partial, "llama.cpp")).startswith(
        "llama.cpp ✗ (dense layers among sparse ones"
    )
    assert verdict(partial, "mlx-lm").runs
