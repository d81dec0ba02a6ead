"""gpt_oss: attention sinks, biases throughout, experts with a clamped activation of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from moecc.families.config import (
    EngineReading,
    GgufFacts,
    ModelConfig,
    TensorNames,
    config_class,
    number,
)
from moecc.families.decoder import ATTENTION_BIASES
from moecc.families.mixture import FIXED_GATES_DEFAULTS, ONE_WIDTH, TRANSFORMERS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.families.rope import RopeConfig
from moecc.support.text import exponential_text
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.weights.expr import Expr

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

NO_SINK = -1e4
"""A score beside which every other is far larger, and that fits half precision."""

SCORES = 1e3
"""A size that scores of attention do not reach."""


@config_class
class GptOssConfig(MoeConfig):
    """A gpt_oss: ``down((up + 1) · gate · sigmoid(alpha · gate))``, gate and up clamped.

    A `plain` one is a model of another family in this one's tensors: its sinks take nothing, its
    biases that others lack are zeros and those of `up` −1, and its experts compute SwiGLU, which
    they do with `swiglu_alpha` 1 and a `swiglu_limit` that is never reached.  No file says so.
    """

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    fixed = {"norm_topk_prob": True}
    options = ATTENTION_BIASES
    keys = ONE_WIDTH
    strict = ("head_dim",)
    window_style = "typed"
    experts_keys = ("num_local_experts",)
    sparse_style = "all"
    has_logits_bias = True
    names = TensorNames(
        router="router.weight",
        expert_gate_up="experts.gate_up_proj",
        expert_down="experts.down_proj",
        inputs_first=True,
        in_turns=True,
    )
    gguf = GgufFacts(
        "gpt-oss",
        output_bias=True,
        needs_head=True,
        ffn_norm="post_attention_norm",
        window_period=2,
        keys=(
            ("attention.sliding_window", "sliding_window"),
            ("expert_feed_forward_length", "intermediate_size"),
        ),
        states=(("attention_bias", True), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)),
    )
    # All but transformers 5 and SGLang compute it with alpha 1.702 and limit 7, whatever it says.
    engines = {
        **TRANSFORMERS,
        "transformers 4": EngineReading(silent=("released SwiGLU",)),
        "vLLM": EngineReading(
            ("yarn",),
            (
                "released SwiGLU",
                "attention biases",
                "every second window",
                "untied",
                "computed rope factor",
            ),
        ),
        "SGLang": EngineReading(silent=("untied",)),
        "mlx-lm": EngineReading(never="it reads the experts of the released files only"),
    }
    defaults = {
        **FIXED_GATES_DEFAULTS,
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

    swiglu_alpha: float = number(above=0, default=1.702)
    swiglu_limit: float = number(above=0, default=7.0)
    plain: bool = False

    def __post_init__(self) -> None:
        # vLLM looks for YaRN's bounds in a config and assumes none.
        if self.rope.type == "yarn":
            fast, slow = self.rope.beta_fast or 32.0, self.rope.beta_slow or 1.0
            object.__setattr__(self, "rope", replace(self.rope, beta_fast=fast, beta_slow=slow))
        super().__post_init__()

    @property
    def has_sinks(self) -> bool:
        """Whether each head's softmax has one more score, its sink."""
        return not self.plain

    @property
    def clamp(self) -> tuple[float, float] | None:
        """Steepness and limit of the clamped activation; None of a plain one."""
        return None if self.plain else (self.swiglu_alpha, self.swiglu_limit)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.hidden_act != "silu":
            fault = "gpt_oss has SwiGLU, by its own formula"
            yield key_problem(fault, "silu", self.hidden_act, "hidden_act")

    @property
    def others_up_to(self) -> str:
        """How far a model of another family is from itself in this one, as of a promise."""
        return (
            f"{exponential_text(NO_SINK + SCORES)} of each result of attention where the largest "
            f"score of a token is above {-SCORES:,.0f}, and gates and ups are below {NO_LIMIT:g}"
        )

    @classmethod
    def from_others(cls) -> dict[str, object]:
        """Return the fields of a model that comes from another family."""
        return {"plain": True, "swiglu_alpha": 1.0, "swiglu_limit": NO_LIMIT}

    def completed(self) -> tuple[ModelConfig, dict[str, Expr]]:
        """Return a plain one with sinks that take nothing and biases that add nothing.

        The bias of `up` undoes the 1 that is added to it.
        """
        config, tensors = super().completed()
        if not self.plain:
            return config, tensors
        from moecc.types import F32, tensor
        from moecc.weights.expr import Full
        from moecc.weights.movement import Merge, Stack

        count, width, names = self.num_experts, self.intermediate_size, self.names
        half = tensor(F32, expert=count, mlp=width)
        turns = Stack((Full(0.0, half), Full(-1.0, half)), "turn", 2)
        for layer in range(self.num_hidden_layers):
            prefix = names.layer.format(layer=layer)
            experts = f"{prefix}{names.sparse}"
            tensors |= {
                f"{prefix}self_attn.sinks": Full(
                    NO_SINK, tensor(F32, head=self.num_attention_heads)
                ),
                f"{experts}router.bias": Full(0.0, tensor(F32, expert=count)),
                f"{experts}{names.expert_gate_up}_bias": Merge(turns, ("mlp", "turn"), "gate_up"),
                f"{experts}{names.expert_down}_bias": Full(
                    0.0, tensor(F32, expert=count, embed=self.hidden_size)
                ),
            }
        return replace(self, plain=False), tensors

    @classmethod
    def _usual_windows(cls, reader: Reader, layers: int) -> tuple[bool, ...]:
        return tuple(layer % 2 == 0 for layer in range(layers))

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        reader.optional_number("hidden_act_alpha")  # SGLang's name of swiglu_alpha
        if any(key in reader.data for key in ("rope_scaling", "rope_parameters")):
            return super()._read_rope(reader, values)
        return {"rope": USUAL_ROPE}

    def _write(self) -> JsonDict:
        # transformers wants a window even where no layer has one.
        window = next((w for w in self.sliding_windows if w is not None), 128)
        keys = super()._write()
        return {**keys, "sliding_window": window, "hidden_act_alpha": self.swiglu_alpha}
