"""What a decoder may have beyond the plain one, and how a family that lacks it says so.

The plain decoder has norms before each block, scores divided by the root of the head's width, and
rotary positions in every layer.  Each feature is a field of `DecoderConfig` with a neutral value; a
family fixes it (`fixed`), leaves it open (`options`), or has it at the neutral value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .reader import KeyProblem, key_problem


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature.

    Attributes:
      neutral: the value without the feature.
      words: what it is, in a message: "llama has no …".
    """

    neutral: object
    words: str


FEATURES: Mapping[str, Feature] = {
    "norm_placement": Feature("before", "norms elsewhere than before each block"),
    "norm_offset": Feature(False, "norms whose scale is stored less one"),
    "qk_norm_across": Feature(False, "norms over all heads of the queries together"),
    "layer_norm": Feature(False, "norms with a mean and a bias"),
    "head_bias": Feature(False, "bias of the output matrix"),
    "scale_embedding": Feature(False, "factor √hidden_size on the embedding"),
    "embedding_multiplier": Feature(1.0, "factor on the embedding"),
    "residual_multiplier": Feature(1.0, "factor on what a block adds"),
    "attention_scale": Feature(None, "scale of its own on the attention scores"),
    "attention_softcap": Feature(None, "soft cap on the attention scores"),
    "logits_divisor": Feature(1.0, "divisor of the logits"),
    "logit_softcap": Feature(None, "soft cap on the logits"),
    "rotary_dim": Feature(None, "rotation of only part of each head"),
    "rope_layers": Feature(None, "layers without rotary positions"),
    "local_rope": Feature(None, "rotary positions of their own in layers with a window"),
}
"""The features by the name of their field."""

PLACEMENTS = ("before", "after", "around")
"""Norms before a block, after it (on what it adds), or both."""


def feature_problems(
    config: object, family: str, fixed: Mapping[str, object], options: frozenset[str]
) -> Iterator[KeyProblem]:
    """Yield the features of `config` that differ from what its family has."""
    for name, feature in FEATURES.items():
        value, expected = getattr(config, name), fixed.get(name, feature.neutral)
        if name in options or value == expected:
            continue
        article = "has no" if expected == feature.neutral else "always has its own"
        what = f"{family} {article} {feature.words}"
        yield key_problem(what, _shown(expected), _shown(value), name)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return f"{value}".lower()
    return "none" if value is None else f"{value}"
