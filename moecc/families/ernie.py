"""ernie4_5 and ernie4_5_moe: neighbours rotated together, a bias in the choice of experts.

On disk the rows of queries and keys are ordered so that neighbours are rotated together.
"""

from __future__ import annotations

from moecc.families.config import EngineReading, GgufFacts, TensorNames, config_class
from moecc.families.decoder import BIASES, DEFAULTS, DecoderConfig
from moecc.families.mixture import FIXED_GATES_DEFAULTS, TRANSFORMERS, MoeConfig
from moecc.families.reader import Reader
from moecc.support.untyped import JsonDict

LEAST_SUM = 1e-12
"""What the chosen gates are divided by where their sum is less: too small to be met."""


@config_class
class Ernie45Config(DecoderConfig):
    """An ernie4_5: a llama with biases on all projections or on none."""

    model_type = "ernie4_5"
    architecture = "Ernie4_5ForCausalLM"
    options = BIASES
    keys = dict.fromkeys(BIASES, "use_bias")
    strict = ("head_dim",)
    names = TensorNames(pairs_neighbours=True)
    gguf = GgufFacts("ernie4_5")
    defaults = {
        **DEFAULTS,
        "vocab_size": 103_424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@config_class
class Ernie45MoeConfig(MoeConfig):
    """An ernie4_5_moe without biases in its projections; experts in every n-th layer of a range."""

    model_type = "ernie4_5_moe"
    architecture = "Ernie4_5_MoeForCausalLM"
    fixed = {"norm_topk_prob": True}
    keys = {"experts_per_token": "moe_k"}
    only = {"use_bias": (False, "biases in this family are not supported")}
    always = {"use_bias": False, "moe_norm_min": LEAST_SUM}
    experts_keys = ("moe_num_experts",)
    sparse_style = "interval"
    has_shared_expert = True
    shared_is_optional = True
    synonyms = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
    shared_count_key = "moe_num_shared_experts"
    shared_gate = False
    has_routing_bias = True
    names = TensorNames(
        shared="shared_experts.",
        routing_bias="moe_statics.e_score_correction_bias",
        routing_bias_rows=True,
        pairs_neighbours=True,
    )
    gguf = GgufFacts(
        "ernie4_5-moe",
        keys=(
            ("leading_dense_block_count", "moe_layer_start_index"),
            ("interleave_moe_layer_step", "moe_layer_interval"),
        ),
    )
    engines = {
        **TRANSFORMERS,
        # Its router on a CPU leaves the bias out; those of GPUs, which were not run, read it.
        "vLLM": EngineReading(("silu in dense blocks",), ("no routing bias", "silu")),
        "SGLang": EngineReading(("silu",)),
        "mlx-lm": EngineReading(silent=("no routing bias", "plain rope", "silu")),
    }
    defaults = {
        **FIXED_GATES_DEFAULTS,
        "vocab_size": 103_424,
        "hidden_size": 2560,
        "intermediate_size": 12_288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": LEAST_SUM,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        # Gates are chosen by a bias besides, so that those of the chosen may be as small as any.
        if reader.number("moe_norm_min", above=0) > LEAST_SUM:
            fault = "the chosen gates would no longer be divided by their sum"
            reader.refuse("moe_norm_min", fault, expected=f"at most {LEAST_SUM:g}")
        return super()._read(reader)
