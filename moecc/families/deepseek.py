"""deepseek_v2, deepseek_v3 and kimi_k2: latent attention, and experts in groups.

`kimi_k2` is a deepseek_v3 by another name, and Moonlight is one by its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moecc.families.config import EngineReading, GgufFacts, TensorNames, config_class
from moecc.families.decoder import LatentAttention
from moecc.families.mixture import MOE_DEFAULTS, UNEXAMINED, MoeConfig
from moecc.families.reader import COUNT, NEURONS, KeyProblem, Reader, key_problem
from moecc.families.rope import ROPE_KEYS, read_rope, yarn_mscale
from moecc.support.untyped import JsonDict

NOPE, ROTARY, BOTH = "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim"
QUERY_RANK, KEY_RANK, VALUE_DIM = "q_lora_rank", "kv_lora_rank", "v_head_dim"
INTERLEAVE, ALL_DIM = "rope_interleave", "mscale_all_dim"
METHOD, GROUPED = "topk_method", "group_limited_greedy"
NO_LATENT = (
    "one rotary key serves all heads of its attention (MLA), and keys and values are products of a "
    "vector that is normalised once more, which no model of another family has"
)
GGUF = GgufFacts(
    "deepseek2",
    keys=(
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("expert_weights_scale", "routed_scaling_factor"),
    ),
    optional_keys=(
        ("attention.q_lora_rank", QUERY_RANK, None),
        ("expert_weights_norm", "norm_topk_prob", False),
    ),
    renormalises=None,
)
NO_LAYERS = {"num_nextn_predict_layers": 0, "num_mtp_layers": 0}
"""The keys that count layers which predict further tokens; no graph has any."""

DEEPSEEK_DEFAULTS: Mapping[str, object] = {
    **{k: v for k, v in MOE_DEFAULTS.items() if k not in ("router_aux_loss_coef", "mlp_bias")},
    KEY_RANK: 512,
    QUERY_RANK: 1536,
    NOPE: 128,
    ROTARY: 64,
    VALUE_DIM: 128,
    "num_nextn_predict_layers": 1,
}


@config_class
class _LatentConfig(MoeConfig):
    """A mixture with latent attention, whose first layers are dense.

    `head_dim` counts all entries of a head of queries, of which the last `rotary_dim` are rotated;
    what config.json calls so are those alone.  The norms of the latent vectors have the epsilon
    10⁻⁶ of the class in transformers, whatever `rms_norm_eps` is.
    """

    options = frozenset({"qkv_bias", "output_bias", "rotary_dim", "latent"})
    keys = {
        "head_dim": "",
        "gate_scale": "routed_scaling_factor",
        # transformers has no balance loss for these families.
        "router_aux_loss_coef": "",
    }
    idle = tuple(NO_LAYERS)
    always = {**NO_LAYERS, "moe_layer_freq": 1}
    own_code = True
    code_name = "deepseek"
    has_further_layers = True
    shares_keys = False
    limits_groups = True
    experts_keys = ("n_routed_experts",)
    sparse_style = "leading"
    has_shared_expert = True
    shared_count_key = "n_shared_experts"
    shared_gate = False
    names = TensorNames(shared="shared_experts.")

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores, which YaRN raises by the square of its own."""
        scale, rope = super().score_scale, self.rope
        if rope.factor is None or not rope.mscale_all_dim:
            return scale
        return scale * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        nope, rotary = reader.size(NOPE, COUNT), reader.size(ROTARY, COUNT)
        sources = {"head_dim": (rotary, ROTARY), BOTH: (nope + rotary, f"{NOPE} and {ROTARY}")}
        for key, (usual, stating) in sources.items():
            if reader.has(key) and reader.value(key) != usual:
                reader.refuse(key, f"transformers makes this of {stating}", expected=f"{usual}")
        values = super()._read(reader.with_data({**reader.data, "head_dim": nope + rotary}))
        latent = LatentAttention(
            reader.optional_size(QUERY_RANK, NEURONS),
            reader.size(KEY_RANK, NEURONS),
            reader.size(VALUE_DIM, COUNT),
            reader.flag(INTERLEAVE) if INTERLEAVE in cls.defaults else True,
        )
        return {**values, "head_dim": nope + rotary, "rotary_dim": rotary, "latent": latent}

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        rope = read_rope(reader, values["max_position_embeddings"], types=cls.rope_types)
        for key in ROPE_KEYS[1:]:
            stated = (reader.mapping(key) or {}).get(ALL_DIM)
            if stated and rope.type != "yarn":
                fault = f"transformers scales scores by {ALL_DIM} under every rope type"
                reader.refuse(key, fault, expected=f"{ALL_DIM} with yarn alone")
        return {"rope": rope}

    def _write_rope(self) -> JsonDict:
        return self.rope.to_json()

    def _write(self) -> JsonDict:
        latent, rotary = self.latent, self.rotated_dim
        assert latent is not None, "checked"
        return {
            **super()._write(),
            NOPE: self.head_dim - rotary,
            ROTARY: rotary,
            QUERY_RANK: latent.query_rank,
            KEY_RANK: latent.key_rank,
            VALUE_DIM: latent.value_dim,
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        if self.latent is None:
            fault = f"no other model becomes a {self.model_type}: {NO_LATENT}"
            yield key_problem(fault, "latent attention", "none", KEY_RANK)
            return
        yield from super().checks()
        if self.rotated_dim >= self.head_dim:
            fault = "every head of queries has entries that are not rotated"
            yield key_problem(fault, f"below {self.head_dim}", f"{self.rotated_dim}", ROTARY, NOPE)
        if not self.latent.interleaved and INTERLEAVE not in self.defaults:
            fault = f"{self.model_type} rotates neighbours"
            yield key_problem(fault, "true", "false", INTERLEAVE)


@config_class
class DeepseekV2Config(_LatentConfig):
    """A deepseek_v2: shares of a softmax, of all experts or of those in the best groups."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    fixed = {"norm_topk_prob": False}
    # llama.cpp compares groups by their two best experts, and transformers here by their best.
    gguf = replace(
        GGUF,
        fixed=(("expert_gating_func", 1),),
        states=(("attention_bias", False), (METHOD, "greedy")),
    )
    only = {
        "norm_topk_prob": (False, "transformers never divides its gates by their sum"),
        "scoring_func": ("softmax", "transformers chooses by a softmax, whatever this is"),
        "moe_layer_freq": (1, "transformers has experts in every layer after the dense ones"),
        "mlp_bias": (False, "transformers 4 gives experts biases, too, and 5 does not"),
    }
    always = {"scoring_func": "softmax", "norm_topk_prob": False}
    upcycle_options = "top-k=2 gates=softmax shared=0.5 shared-gate=none"
    # Version 4 leaves the factor of YaRN on the scores out.
    engines = {
        "transformers 5": EngineReading(),
        "transformers 4": EngineReading(silent=("scores as usual",)),
        **UNEXAMINED,
        "mlx-lm": EngineReading(("untied", "scaled rope"), ("yarn", "silu")),
    }
    defaults = {
        **DEEPSEEK_DEFAULTS,
        "vocab_size": 102_400,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "n_group": None,
        "topk_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        METHOD: "greedy",
        "moe_intermediate_size": 1407,
        "mlp_bias": False,
    }

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        grouped = reader.choice(METHOD, ("greedy", GROUPED)) == GROUPED
        groups = read_groups(reader) if grouped else {}
        reader.used.update(("n_group", "topk_group"))
        return super()._read(reader) | groups

    def _write(self) -> JsonDict:
        method = GROUPED if self.expert_groups > 1 else "greedy"
        return {**super()._write(), **write_groups(self), METHOD: method}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.hidden_size % self.num_attention_heads:
            fault = "transformers wants a width that its heads divide"
            heads, width = f"{self.num_attention_heads}", f"{self.hidden_size}"
            keys = ("hidden_size", "num_attention_heads")
            yield key_problem(fault, f"a multiple of {heads}", width, *keys)


MLX = EngineReading(
    ("untied",), ("no groups of experts", "several choices", "neighbours rotated", "silu")
)


@config_class
class DeepseekV3Config(_LatentConfig):
    """A deepseek_v3: sigmoids, biases of the choice, and groups by their two best experts."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    only = {
        "scoring_func": ("sigmoid", "transformers chooses by sigmoids, whatever this is"),
        METHOD: ("noaux_tc", "transformers chooses by biased sigmoids, whatever this is"),
        "moe_layer_freq": (1, "transformers has experts in every layer after the dense ones"),
    }
    always = {"scoring_func": "sigmoid", METHOD: "noaux_tc"}
    gguf = replace(
        GGUF,
        fixed=(("expert_gating_func", 2),),
        optional_keys=(
            *GGUF.optional_keys,
            ("expert_group_count", "n_group", 1),
            ("expert_group_used_count", "topk_group", 1),
        ),
        states=(("attention_bias", False), (INTERLEAVE, True)),
    )
    score = "sigmoid"
    has_routing_bias = True
    upcycle_options = "top-k=2 gates=sigmoid-renormalised shared=0.5 shared-gate=none"
    # Version 4 takes 0 for experts of the groups that are left, and 5 never chooses them.
    engines = {
        "transformers 5": EngineReading(),
        "transformers 4": EngineReading(silent=("no groups of experts",)),
        **UNEXAMINED,
        "mlx-lm": MLX,
    }
    defaults = {
        **DEEPSEEK_DEFAULTS,
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        INTERLEAVE: True,
    }

    norm_topk_prob: bool = True

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        return {**super()._read(reader), **read_groups(reader, smallest=2)}

    def _write(self) -> JsonDict:
        assert self.latent is not None, "checked"
        interleaved = self.latent.interleaved
        return {**super()._write(), **write_groups(self), INTERLEAVE: interleaved}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.latent is not None and self.num_experts < 2 * self.expert_groups:
            fault = f"{self.model_type} compares groups by their two best experts"
            count = f"{self.num_experts}"
            yield key_problem(fault, "two experts a group", count, "n_group", "n_routed_experts")


@config_class
class KimiK2Config(DeepseekV3Config):
    """A deepseek_v3 by another name, which transformers does not know."""

    model_type = "kimi_k2"
    engines = (
        {
            name: EngineReading(never="it has no model_type kimi_k2; --to deepseek_v3 is the same")
            for name in ("transformers 5", "transformers 4")
        }
        | UNEXAMINED
        | {"mlx-lm": MLX}
    )


def read_groups(reader: Reader, smallest: int = 1) -> JsonDict:
    """Return the fields of groups of experts; a choice of all groups is one without any.

    Args:
      reader: the config.
      smallest: the least number of experts in a group.
    """
    groups, chosen = reader.size("n_group", COUNT), reader.size("topk_group", COUNT)
    experts = reader.size("n_routed_experts", COUNT)
    if groups == chosen and experts % groups == 0 and experts >= smallest * groups:
        return {"expert_groups": 1, "open_groups": 1}
    return {"expert_groups": groups, "open_groups": chosen}


def write_groups(config: MoeConfig) -> JsonDict:
    """Return the keys of groups of experts."""
    return {"n_group": config.expert_groups, "topk_group": config.open_groups}
