"""The conditions under which an engine reads a model as it is, by the words of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moecc.families.configs import DecoderConfig, GptOssConfig, ModelConfig, MoeConfig

Holds = Callable[[DecoderConfig], bool]


@dataclass(frozen=True)
class Condition:
    """A condition.

    Attributes:
      holds: whether a config fulfils it.
      otherwise: what the engine does not do with a config that does not.
    """

    holds: Holds
    otherwise: str


def _every_layer(config: DecoderConfig) -> bool:
    return not isinstance(config, MoeConfig) or all(config.sparse_layers)


def _not_renormalised(config: DecoderConfig) -> bool:
    if not isinstance(config, MoeConfig) or config.experts_per_token == config.num_experts:
        return True  # the gates of all experts add up to 1
    return not config.norm_topk_prob


def _full_attention(config: DecoderConfig) -> bool:
    seen = (window for window in config.sliding_windows if window is not None)
    return all(window >= config.max_position_embeddings for window in seen)


def _several_choices(config: DecoderConfig) -> bool:
    if not isinstance(config, MoeConfig) or not config.norm_topk_prob:
        return True
    return config.experts_per_token > 1


def _released_swiglu(config: DecoderConfig) -> bool:
    if not isinstance(config, GptOssConfig):
        return True
    return (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)


def _every_second_window(config: DecoderConfig) -> bool:
    windows = config.sliding_windows
    return None not in windows[::2] and set(windows[1::2]) <= {None}


CONDITIONS: Mapping[str, Condition] = {
    "every layer": Condition(_every_layer, "dense layers among sparse ones"),
    "untied": Condition(
        lambda c: not c.tie_word_embeddings, "an output matrix tied to the embedding"
    ),
    "plain heads": Condition(
        lambda c: c.head_dim * c.num_attention_heads == c.hidden_size,
        "heads of another width than hidden_size / heads",
    ),
    "qkv biases": Condition(lambda c: c.qkv_bias, "queries, keys and values without biases"),
    "no attention biases": Condition(
        lambda c: not c.qkv_bias and not c.output_bias, "biases of the attention's projections"
    ),
    "attention biases": Condition(
        lambda c: c.qkv_bias and c.output_bias, "attention projections without biases"
    ),
    "head bias": Condition(lambda c: c.head_bias, "an output matrix without a bias"),
    "released SwiGLU": Condition(
        _released_swiglu, "another SwiGLU than that of the released models"
    ),
    "every second window": Condition(
        _every_second_window, "windows other than in every second layer from the first"
    ),
    "yarn": Condition(lambda c: c.rope.type == "yarn", "rotary positions other than YaRN"),
    "full attention": Condition(_full_attention, "sliding windows"),
    "silu": Condition(lambda c: c.hidden_act == "silu", "another activation than SiLU"),
    "plain rope": Condition(lambda c: c.rope.type == "default", "scaled rotary positions"),
    "usual rope factor": Condition(
        lambda c: c.rope.attention_factor is None, "an attention_factor of rotary scalings"
    ),
    "no routing bias": Condition(
        lambda c: not isinstance(c, MoeConfig) or not c.routing_bias,
        "a bias in the choice of experts",
    ),
    "several choices": Condition(_several_choices, "one renormalised gate a token"),
    "epsilon 1e-5": Condition(
        lambda c: c.rms_norm_eps == 1e-5, "another epsilon than 1e-5 of its norms of queries"
    ),
    "not renormalised": Condition(_not_renormalised, "renormalised gates"),
}


def unfulfilled(words: tuple[str, ...], config: ModelConfig) -> tuple[str, ...]:
    """Return what an engine does not do, of the conditions `words` that `config` does not meet."""
    if not isinstance(config, DecoderConfig):
        return ()
    found = (CONDITIONS[word] for word in words)
    return tuple(c.otherwise for c in found if not c.holds(config))
