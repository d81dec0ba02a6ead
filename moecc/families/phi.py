"""phi3 and phimoe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.families.rope import (
    ROPE_KEYS,
    attention_factor,
    partial_rotary_factor,
    read_partial_rotary,
    read_rope,
)
from moecc.ir.conventions import Gates


@config_class
class Phi3Config(DecoderConfig):
    """A phi3 (3, 3.5, 4-mini): no biases, one sliding window in every layer or in none."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    options: ClassVar[frozenset[str]] = frozenset({"rotary_dim"})
    window_style: ClassVar[str] = "uniform"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "longrope")
    # The code that its first checkpoints bring is in transformers.
    own_code: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
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
        width = self.head_dim * self.num_attention_heads
        if width != self.hidden_size:
            what = "phi3 has heads of hidden_size / num_attention_heads"
            keys = ("head_dim", "hidden_size", "num_attention_heads")
            yield key_problem(what, f"heads x head_dim = {self.hidden_size}", f"{width}", *keys)
        if self.rope.type == "longrope" and self.rope.attention_factor is not None:
            what = "phi3 has no key for the factor on cosine and sine of longrope"
            found = f"{self.rope.attention_factor:g}"
            yield key_problem(what, "what follows from the lengths", found, "rope_scaling")

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        length = reader.size("max_position_embeddings")
        return {
            "rope": read_rope(reader, length, types=cls.rope_types, partial=True, outside=True),
            "rotary_dim": read_partial_rotary(reader, head_dim, "partial_rotary_factor", 1.0),
        }

    def _write_rope(self) -> dict[str, object]:
        share = partial_rotary_factor(self.rotated_dim, self.head_dim)
        keys = super()._write_rope()
        if self.rope.type == "longrope":
            scaling = self.rope.scaling()
            scaling["type"] = scaling.pop("rope_type")
            keys["rope_scaling"] = scaling
        parameters = keys["rope_parameters"]
        assert isinstance(parameters, dict), "as the rope writes them"
        return {
            **keys,
            "rope_parameters": {**parameters, "partial_rotary_factor": share},
            "partial_rotary_factor": share,
            # The length that longrope starts from; transformers 5 has a key for it in any case.
            "original_max_position_embeddings": self.rope.original_max_position_embeddings
            or self.max_position_embeddings,
        }


# phimoe: norms with a mean and a bias, gates by SparseMixer, longrope with a stated factor.

JITTER = 0.01
"""The relative distance within which SparseMixer counts a logit, the only one that moecc has."""

MSCALES = ("short_mscale", "long_mscale")
"""The factor on cosine and sine, up to the original length and beyond it."""


@config_class
class PhimoeConfig(MoeConfig):
    """A phimoe: two choices a token, of which each is weighted by the logits near it."""

    model_type: ClassVar[str] = "phimoe"
    architecture: ClassVar[str] = "PhimoeForCausalLM"
    aliases: ClassVar[tuple[str, ...]] = ("PhiMoEForCausalLM",)
    fixed: ClassVar[Mapping[str, object]] = {
        "qk_norm": False,
        "mlp_bias": False,
        "layer_norm": True,
    }
    options: ClassVar[frozenset[str]] = frozenset({"head_bias"})
    bias_key: ClassVar[str | None] = "attention_bias"
    window_style: ClassVar[str] = "uniform"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "longrope")
    # The code that its first checkpoints bring is in transformers.
    own_code: ClassVar[bool] = True
    experts_keys: ClassVar[tuple[str, ...]] = ("num_local_experts",)
    sparse_style: ClassVar[str] = "all"
    has_expert_width: ClassVar[bool] = False
    renormalises: ClassVar[bool | None] = False
    upcycle_options: ClassVar[str] = "top-k=2 gates=sparsemixer"
    defaults: ClassVar[Mapping[str, object]] = {
        **{key: value for key, value in MOE_DEFAULTS.items() if key != "norm_topk_prob"},
        "vocab_size": 32_064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": None,
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

    layer_norm: bool = True
    router_jitter_noise: float = JITTER

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
            what = "SparseMixer makes two choices"
            yield key_problem(what, "2", f"{self.experts_per_token}", "num_experts_per_tok")
        if self.router_jitter_noise != JITTER:
            what = "moecc has no other distance in SparseMixer, where it changes the gates"
            found = f"{self.router_jitter_noise:g}"
            yield key_problem(what, f"{JITTER:g}", found, "router_jitter_noise")

    @classmethod
    def _read_features(cls, reader: Reader) -> dict[str, object]:
        return {**super()._read_features(reader), "head_bias": reader.flag("lm_head_bias")}

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        data, factor = dict(reader.data), None
        for key in ROPE_KEYS[1:]:
            part = data.get(key)
            if isinstance(part, Mapping) and not part.keys().isdisjoint(MSCALES):
                data[key] = {name: part[name] for name in part if name not in MSCALES}
                factor = _read_factor(reader, key, part)
        length = reader.size("max_position_embeddings")
        rope = read_rope(reader.with_data(data), length, types=cls.rope_types, outside=True)
        if rope.type == "longrope" and factor is None:
            reader.refuse("rope_scaling", f"longrope of phimoe needs {' and '.join(MSCALES)}")
        return {"rope": replace(rope, attention_factor=factor)}

    def _write_rope(self) -> dict[str, object]:
        keys = super()._write_rope()
        if self.rope.type != "longrope":
            return keys
        length = self.rope.original_max_position_embeddings
        parameters = {
            **self.rope.scaling(),
            **dict.fromkeys(MSCALES, attention_factor(self.rope)),
            "original_max_position_embeddings": length,
        }
        return {
            **keys,
            "rope_scaling": {**parameters, "type": "longrope"},
            "rope_parameters": {"rope_theta": self.rope.theta, **parameters},
            "original_max_position_embeddings": length,
        }

    @classmethod
    def _read_layout(cls, reader: Reader) -> dict[str, object]:
        reader.number("input_jitter_noise", least=0)
        return {"router_jitter_noise": reader.number("router_jitter_noise", least=0)}

    def _write_layout(self) -> dict[str, object]:
        noise = {"router_jitter_noise": self.router_jitter_noise, "input_jitter_noise": 0.0}
        return {**noise, "lm_head_bias": self.head_bias}


def _read_factor(reader: Reader, key: str, part: Mapping[str, object]) -> float | None:
    """Return the factor on cosine and sine, which has to be the same for any length."""
    inner = Reader(part, {}, f"{reader.where}: {key}")
    short, long = (inner.number(name, above=0) for name in MSCALES)
    reader.problems.extend(inner.problems)
    if short != long and not inner.problems:
        what = "the factor on cosine and sine depends on the length, which moecc does not express"
        reader.refuse(key, what, expected="the same short_mscale and long_mscale")
    return short
