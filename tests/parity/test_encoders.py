"""transformers loads exported encoders and encoder-decoders, and computes what the graphs do.

With padding, and with experts that drop tokens.
"""

import json

import numpy as np
import pytest
from family_configs import exported_checkpoint, random_checkpoint
from moecc_passes.upcycle.upcycle import UpcyclePass
from safetensors.numpy import save_file

from moecc.backend import get_backend
from moecc.families.registry import parse_config
from moecc.rewrite.passes import Context
from moecc.translate.export import export_graph
from moecc.translate.importing import import_checkpoint
from moecc.weights.evaluate import evaluate

from .interpreters import ask, in_each_interpreter, interpreters

pytestmark = pytest.mark.parity

T5 = {
    "vocab_size": 40, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 4,
    "num_decoder_layers": 2, "num_heads": 3, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 36,
    "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 20,
}  # fmt: skip
SWITCH = {
    **T5, "model_type": "switch_transformers", "num_experts": 4, "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
}  # fmt: skip
ROUTED = {"experts": 4, "top_k": 1, "gates": "switch", "router_std": 0.5}
CASES = {
    "t5-t5": ({**T5, "model_type": "t5"}, "t5", {}),
    "t5-t5-untied": (
        {**T5, "model_type": "t5", "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        "t5", {},
    ),
    "mt5-mt5": ({**T5, "model_type": "mt5"}, "mt5", {}),
    "umt5-umt5": ({**T5, "model_type": "umt5"}, "umt5", {}),
    "t5-switch": ({**T5, "model_type": "t5"}, "switch_transformers", ROUTED),
    "t5-switch-half": (
        {**T5, "model_type": "t5"}, "switch_transformers", {**ROUTED, "layers": "every:2"},
    ),
    "switch-switch": ({**SWITCH, "expert_capacity": 2}, "switch_transformers", {}),
    "switch-switch-untied": ({**SWITCH, "tie_word_embeddings": False}, "switch_transformers", {}),
    "bert-bert": (BERT, "bert", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    if not interpreters():
        return []
    place = tmp_path_factory.mktemp("exports")
    return [write(place / name, *case) for name, case in CASES.items()]


def write(folder, keys, target, options):
    """Write a model of random weights, padded inputs, and the output of its graph."""
    checkpoint = random_checkpoint(parse_config({"dtype": "float32", **keys}), seed=8)
    graph = import_checkpoint(checkpoint, padding=True)
    if options:
        UpcyclePass(**options).apply(graph, Context())
    made = export_graph(graph, target)
    folder.mkdir()
    written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
    (folder / "config.json").write_text(json.dumps(made.config_json))
    save_file(written.arrays, folder / "model.safetensors", {"format": "pt"})
    rng = np.random.default_rng(1)
    inputs = {"tokens": rng.integers(0, 40, (2, 14)), "mask": np.arange(14) < [[14], [9]]}
    if "decoder_tokens" in graph.inputs:
        inputs["decoder_tokens"] = rng.integers(0, 40, (2, 7))
    params = {n: evaluate(v.weight, checkpoint.read) for n, v in graph.params.items()}
    (output,) = get_backend("reference").compile(graph).run(params, inputs).values()
    for name, array in {**inputs, "output": output}.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@in_each_interpreter
def test_transformers_computes_what_the_graph_does(python, folders):
    models = ask(python, "load_encoders.py", [str(f) for f in folders])["models"]
    assert set(models) == set(CASES)
    for name, found in models.items():
        assert found["missing"] == found["unexpected"] == found["mismatched"] == [], name
        assert found["class"].lower().startswith(CASES[name][1].replace("_", "")), name
        assert found["difference"] <= 2e-6, (name, found)
