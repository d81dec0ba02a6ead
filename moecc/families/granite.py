"""granite, granitemoehybrid and granitemoe: factors on embedding, scores, residual and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.families.config import EngineReading, GgufFacts, TensorNames, config_class
from moecc.families.decoder import ATTENTION_BIASES, BIASES, DEFAULTS, DecoderConfig
from moecc.families.mixture import FIXED_GATES_DEFAULTS, ONE_WIDTH, TRANSFORMERS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.support.untyped import JsonDict

FACTORS = frozenset(
    {"embedding_multiplier", "residual_multiplier", "attention_scale", "logits_divisor"}
)
SCORES = "attention_multiplier"
"""The key of the factor on the scores, by default 1."""

LAYER_TYPES, POSITIONS = "layer_types", "position_embedding_type"
ATTENTION = frozenset({"attention", "full_attention"})
"""The names of layers without Mamba, in transformers 4 and 5."""

GRANITE_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    SCORES: 1.0,
    "logits_scaling": 1.0,
}
FACTOR_KEYS = (
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("attention.scale", SCORES),
    ("logit_scale", "logits_scaling"),
)
"""The keys of GGUF."""


@config_class
class _FactorsConfig(DecoderConfig):
    """A decoder with granite's factors, of which that on the scores is always stated."""

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values, scale = super()._read(reader), reader.number(SCORES, above=0)
        return {**values, "attention_scale": None if scale == values["head_dim"] ** -0.5 else scale}

    def _write(self) -> JsonDict:
        return {**super()._write(), SCORES: self.score_scale}


@config_class
class GraniteConfig(_FactorsConfig):
    """A granite."""

    model_type = "granite"
    architecture = "GraniteForCausalLM"
    options = BIASES | FACTORS
    gguf = GgufFacts(
        "granite", pairs_neighbours=True, output_bias=True, mlp_bias=True, keys=FACTOR_KEYS
    )
    defaults = {**DEFAULTS, **GRANITE_DEFAULTS}


@config_class
class GraniteHybridConfig(_FactorsConfig):
    """A granitemoehybrid (Granite 4) of attention and dense blocks alone, with positions or not."""

    model_type = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    options = ATTENTION_BIASES | FACTORS | {"rope_layers"}
    keys = {"intermediate_size": "shared_intermediate_size"}
    synonyms = {"layers_block_type": "layer_types"}
    only = {
        "num_local_experts": (
            0,
            "experts beside a shared one are not supported here, but by --via torch",
        ),
    }
    # The last one is Mamba's, and infinite, for which JSON has no number.
    idle = (
        "num_experts_per_tok",
        "intermediate_size",
        "output_router_logits",
        "time_step_limit",
    )
    always = {"num_local_experts": 0, "num_experts_per_tok": 0}
    names = TensorNames(dense="shared_mlp.", gate_up="input_linear", dense_down="output_linear")
    defaults = {
        **DEFAULTS,
        **{k: v for k, v in GRANITE_DEFAULTS.items() if k != "intermediate_size"},
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
        "position_embedding_type": None,
    }

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        kinds = reader.items(LAYER_TYPES)
        if not kinds or not set(map(str, kinds)) <= ATTENTION:
            fault = "layers of Mamba are not supported here, but by --via torch"
            reader.refuse(LAYER_TYPES, fault, expected=f"{' or '.join(sorted(ATTENTION))}")
        return super()._read(reader.without(LAYER_TYPES))

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        rope, layers = super()._read_rope(reader, values), values["num_hidden_layers"]
        kind = reader.value(POSITIONS)
        return {**rope, "rope_layers": None if kind == "rope" else (False,) * layers}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.rope_layers is not None and any(self.rope_layers):
            fault = "granitemoehybrid has rotary positions in all layers or in none"
            yield key_problem(fault, "all or none", f"{self.rope_layers}", POSITIONS)

    def _write(self) -> JsonDict:
        kinds = ["attention"] * self.num_hidden_layers
        kind = "rope" if self.rope_layers is None else None
        return {**super()._write(), LAYER_TYPES: kinds, POSITIONS: kind}


@config_class
class GraniteMoeConfig(_FactorsConfig, MoeConfig):
    """A granitemoe: a granite with experts in every layer, gates always renormalised."""

    model_type = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    only = {POSITIONS: ("rope", "only rotary positions are supported")}
    fixed = {"norm_topk_prob": True}
    options = ATTENTION_BIASES | FACTORS
    keys = ONE_WIDTH
    experts_keys = ("num_local_experts",)
    sparse_style = "all"
    names = TensorNames(
        sparse="block_sparse_moe.",
        router="router.layer.weight",
        expert_gate_up="input_linear.weight",
        expert_down="output_linear.weight",
    )
    gguf = GgufFacts("granitemoe", pairs_neighbours=True, output_bias=True, keys=FACTOR_KEYS)
    engines = {
        **TRANSFORMERS,
        "transformers 4": EngineReading(("plain heads",)),
        "vLLM": EngineReading(("plain heads",), ("no attention biases", "silu")),
        "SGLang": EngineReading(("plain heads", "silu"), ("no attention biases", "plain rope")),
        "mlx-lm": EngineReading(("plain heads",), ("usual rope factor", "silu")),
    }
    defaults = {
        **FIXED_GATES_DEFAULTS,
        **GRANITE_DEFAULTS,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    }
