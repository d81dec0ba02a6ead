"""gpt_oss: attention sinks, biases throughout, experts with a clamped activation of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import Windows, typed_windows
from moecc.families.mixture import MOE_DEFAULTS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.families.rope import RopeConfig

USUAL_ROPE = RopeConfig(
    theta=150_000.0,
    type="yarn",
    factor=32.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
)
"""What transformers assumes where a config states no rotary parameters at all."""

NO_LIMIT = 1e6
"""A bound on the activations that none reaches."""


@config_class
class GptOssConfig(MoeConfig):
    """A gpt_oss: ``down((up + 1) · gate · sigmoid(alpha · gate))``, gate and up clamped.

    A `plain` one is a model of another family in this one's tensors: its sinks take nothing, its
    biases that others lack are zeros and those of `up` −1, and its experts compute SwiGLU, which
    they do with `swiglu_alpha` 1 and a `swiglu_limit` that is never reached.  No file says so.
    """

    model_type: ClassVar[str] = "gpt_oss"
    architecture: ClassVar[str] = "GptOssForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {"qk_norm": False, "mlp_bias": False}
    bias_key: ClassVar[str | None] = "attention_bias"
    window_style: ClassVar[str] = "typed"
    experts_keys: ClassVar[tuple[str, ...]] = ("num_local_experts",)
    sparse_style: ClassVar[str] = "all"
    has_expert_width: ClassVar[bool] = False
    renormalises: ClassVar[bool | None] = True
    has_logits_bias: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, object]] = {
        **{key: value for key, value in MOE_DEFAULTS.items() if key != "norm_topk_prob"},
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "attention_bias": True,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "hidden_act_alpha": None,
    }

    norm_topk_prob: bool = True
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    plain: bool = False

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.hidden_act != "silu":
            what = "gpt_oss has SwiGLU, by its own formula"
            yield key_problem(what, "silu", self.hidden_act, "hidden_act")

    @classmethod
    def from_others(cls) -> dict[str, object]:
        """Return the fields of a model that comes from another family."""
        return {"plain": True, "swiglu_alpha": 1.0, "swiglu_limit": NO_LIMIT}

    @classmethod
    def _read_windows(cls, reader: Reader, layers: int) -> Windows:
        """Read the windows; without `layer_types` every second layer has one, the first too."""
        return typed_windows(reader, tuple(layer % 2 == 0 for layer in range(layers)))

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        stated = any(key in reader.data for key in ("rope_scaling", "rope_parameters"))
        return super()._read_rope(reader, head_dim) if stated else {"rope": USUAL_ROPE}

    @classmethod
    def _read_layout(cls, reader: Reader) -> dict[str, object]:
        reader.optional_number("hidden_act_alpha", above=0)  # SGLang's name of swiglu_alpha
        return {key: reader.number(key, above=0) for key in ("swiglu_alpha", "swiglu_limit")}

    def _write_layout(self) -> dict[str, object]:
        # transformers wants a window even where no layer has one.
        window = next((w for w in self.sliding_windows if w is not None), 128)
        return {
            "sliding_window": window,
            "swiglu_alpha": self.swiglu_alpha,
            "hidden_act_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
        }
