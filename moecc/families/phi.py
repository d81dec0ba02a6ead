"""phi, phi3 and phimoe; stablelm, which like phi may have blocks side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moecc.families.config import EngineReading, GgufFacts, TensorNames, config_class, number
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, DecoderConfig
from moecc.families.mixture import FIXED_GATES_DEFAULTS, ONE_WIDTH, TRANSFORMERS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.families.rope import ROPE_KEYS, attention_factor
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.ir.conventions import Gates


@config_class
class PhiConfig(DecoderConfig):
    """A phi (1, 1.5, 2): blocks side by side behind one norm, biases everywhere."""

    model_type = "phi"
    architecture = "PhiForCausalLM"
    fixed = {
        "norm_kind": "layer",
        "parallel": True,
        "gated_mlp": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    }
    options = frozenset({"qk_norm", "rotary_dim"})
    gguf = GgufFacts(
        "phi2",
        output_bias=True,
        mlp_bias=True,
        needs_head=True,
        states=(("qk_layernorm", False),),
    )
    keys = {"rms_norm_eps": "layer_norm_eps", "qk_norm": "qk_layernorm"}
    plain_heads = "phi has heads of hidden_size / num_attention_heads"
    own_code = True
    names = TensorNames(
        final_norm="model.final_layernorm.weight",
        attention_output="dense",
        query_norm="q_layernorm",
        key_norm="k_layernorm",
        dense_up="fc1",
        dense_down="fc2",
    )
    defaults = {
        **DEFAULTS,
        "vocab_size": 51_200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_key_value_heads": None,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


LENGTH_KEY = "original_max_position_embeddings"
"""The length that longrope starts from."""


@config_class
class Phi3Config(DecoderConfig):
    """A phi3 (3, 3.5, 4-mini): no biases, one sliding window in every layer or in none."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    options = frozenset({"rotary_dim"})
    window_style = "uniform"
    rope_types = ("default", "longrope")
    length_outside = True
    plain_heads = "phi3 has heads of hidden_size / num_attention_heads"
    # The code that its first checkpoints bring is in transformers.
    own_code = True
    names = TensorNames(qkv="qkv_proj", gate_up="gate_up_proj")
    gguf = GgufFacts("phi3", optional_keys=(("attention.sliding_window", "sliding_window", None),))
    defaults = {
        **DEFAULTS,
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        LENGTH_KEY: 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
        "pad_token_id": 32_000,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.rope.type == "longrope" and self.rope.attention_factor is not None:
            fault = "phi3 has no key for the factor on cosine and sine of longrope"
            factor = f"{self.rope.attention_factor:g}"
            yield key_problem(fault, "what follows from the lengths", factor, "rope_scaling")

    def _write_rope(self) -> JsonDict:
        keys = super()._write_rope()
        if self.rope.type == "longrope":
            scaling = self.rope.scaling()
            scaling["type"] = scaling.pop("rope_type")
            keys["rope_scaling"] = scaling
        # transformers 5 has a key for the length in any case.
        length = self.rope.original_max_position_embeddings or self.max_position_embeddings
        return {**keys, LENGTH_KEY: length}


JITTER = 0.01
"""The relative distance within which SparseMixer counts a logit, the only one that moecc has."""

MSCALES = ("short_mscale", "long_mscale")
"""The factor on cosine and sine, up to the original length and beyond it."""


@config_class
class PhimoeConfig(MoeConfig):
    """A phimoe: norms with a mean and a bias, two choices weighted by the logits near them."""

    model_type = "phimoe"
    architecture = "PhimoeForCausalLM"
    aliases = ("PhiMoEForCausalLM",)
    fixed = {"norm_kind": "layer", "norm_topk_prob": False}
    options = ATTENTION_BIASES | {"head_bias"}
    keys = {**ONE_WIDTH, "router_jitter_noise": "router_jitter_noise"}
    always = {"input_jitter_noise": 0.0}
    window_style = "uniform"
    rope_types = ("default", "longrope")
    length_outside = True
    own_code = True
    experts_keys = ("num_local_experts",)
    sparse_style = "all"
    upcycle_options = "top-k=2 gates=sparsemixer"
    names = TensorNames(sparse="block_sparse_moe.", gate="w1", up="w3", down="w2")
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(never="it knows the class as PhiMoEForCausalLM alone"),
        "SGLang": EngineReading(("plain heads", "head bias"), ("untied", "full attention", "silu")),
        "llama.cpp": EngineReading(never="it weights the two choices by their softmax"),
        "mlx-lm": EngineReading(
            ("plain heads", "attention biases", "head bias", "untied", "plain rope"),
            ("full attention", "silu"),
        ),
    }
    defaults = {
        **FIXED_GATES_DEFAULTS,
        "vocab_size": 32_064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        LENGTH_KEY: None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": JITTER,
        "input_jitter_noise": 0.0,
        "lm_head_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    router_jitter_noise: float = number(least=0, default=JITTER)

    @property
    def gates(self) -> Gates:
        """The gate convention."""
        return "sparsemixer"

    @classmethod
    def conventions(cls) -> tuple[Gates, ...]:
        """Return the gate conventions that the family can have."""
        return ("sparsemixer",)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.experts_per_token != 2:
            fault = "SparseMixer makes two choices"
            yield key_problem(fault, "2", f"{self.experts_per_token}", "num_experts_per_tok")
        if self.router_jitter_noise != JITTER:
            fault = "moecc has no other distance in SparseMixer, where it changes the gates"
            noise = f"{self.router_jitter_noise:g}"
            yield key_problem(fault, f"{JITTER:g}", noise, "router_jitter_noise")

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        reader.number("input_jitter_noise", least=0)
        data, factor = dict(reader.data), None
        for key in ROPE_KEYS[1:]:
            part = data.get(key)
            if isinstance(part, Mapping) and not part.keys().isdisjoint(MSCALES):
                data[key] = {name: part[name] for name in part if name not in MSCALES}
                factor = _read_factor(reader, key, part)
        rope = super()._read_rope(reader.with_data(data), values)["rope"]
        if rope.type == "longrope" and factor is None:
            reader.refuse("rope_scaling", f"longrope of phimoe needs {' and '.join(MSCALES)}")
        return {"rope": replace(rope, attention_factor=factor)}

    def _write_rope(self) -> JsonDict:
        keys = super()._write_rope()
        if self.rope.type != "longrope":
            return keys
        length = {LENGTH_KEY: self.rope.original_max_position_embeddings}
        factors = dict.fromkeys(MSCALES, attention_factor(self.rope))
        parameters = {**self.rope.scaling(), **factors, **length}
        return {
            **keys,
            **length,
            "rope_scaling": {**parameters, "type": "longrope"},
            "rope_parameters": {"rope_theta": self.rope.theta, **parameters},
        }


def _read_factor(reader: Reader, key: str, part: Mapping[str, object]) -> float | None:
    """Return the factor on cosine and sine, which has to be the same for any length."""
    inner = Reader(part, {}, f"{reader.where}: {key}")
    short, long = (inner.number(name, above=0) for name in MSCALES)
    reader.problems.extend(inner.problems)
    if short != long and not inner.problems:
        fault = "the factor on cosine and sine depends on the length, which moecc does not express"
        reader.refuse(key, fault, expected="the same short_mscale and long_mscale")
    return short


@config_class
class StableLmConfig(DecoderConfig):
    """A stablelm; norms of queries and keys have a scale for each head, and no bias."""

    model_type = "stablelm"
    architecture = "StableLmForCausalLM"
    fixed = {"norm_kind": "layer", "qk_norm_each": True}
    gguf = GgufFacts(
        "stablelm",
        needs_head=True,
        states=(("qk_layernorm", False), ("use_parallel_residual", False)),
    )
    options = frozenset({"qkv_bias", "qk_norm", "parallel", "rotary_dim"})
    keys = {
        "rms_norm_eps": "layer_norm_eps",
        "qkv_bias": "use_qkv_bias",
        "qk_norm": "qk_layernorm",
        "parallel": "use_parallel_residual",
    }
    plain_heads = "stablelm has heads of hidden_size / num_attention_heads"
    names = TensorNames(query_norm="q_layernorm.norms.{head}", key_norm="k_layernorm.norms.{head}")
    defaults = {
        **DEFAULTS,
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
