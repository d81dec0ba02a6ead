"""The conditions under which an engine reads a model as it is, by the words of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moecc.families.configs import DecoderConfig, ModelConfig, MoeConfig

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
    "full attention": Condition(_full_attention, "sliding windows"),
    "silu": Condition(lambda c: c.hidden_act == "silu", "another activation than SiLU"),
    "plain rope": Condition(lambda c: c.rope.type == "default", "scaled rotary positions"),
    "plain or linear rope": Condition(
        lambda c: c.rope.type in ("default", "linear"), "rotary scalings other than linear"
    ),
    "not renormalised": Condition(_not_renormalised, "renormalised gates"),
}


def unfulfilled(words: tuple[str, ...], config: ModelConfig) -> tuple[str, ...]:
    """Return what an engine does not do, of the conditions `words` that `config` does not meet."""
    if not isinstance(config, DecoderConfig):
        return ()
    found = (CONDITIONS[word] for word in words)
    return tuple(c.otherwise for c in found if not c.holds(config))
