"""Facts that importing needs of any config: depth, experts, layer names on disk."""

from __future__ import annotations

import re

from moecc.families.configs import (
    STACKS,
    EncDecConfig,
    ModelConfig,
    MoeConfig,
    StMoeConfig,
    WhisperConfig,
)

_LAYER = re.compile(
    r"(?:(?:model\.)?(?P<stack>encoder|decoder)\.(?:block|layers)|(?:\w+\.)*?(?:layers|layer|h))"
    r"\.(?P<n>\d{1,6})\."
)


def layer_of(name: str) -> tuple[str, int] | None:
    """Return stack and number of the layer that a tensor belongs to, or None.

    The stack is ``encoder`` or ``decoder`` with a space after it, or empty where there is but one.
    """
    match = _LAYER.match(name)
    if match is None:
        return None
    stack = match["stack"]
    return (f"{stack} " if stack else ""), int(match["n"])


def depth(config: ModelConfig, stack: str = "") -> int:
    """Return the number of layers of a stack, as `layer_of` names it."""
    if isinstance(config, EncDecConfig | WhisperConfig):
        return config.layers(stack.strip())
    found: int = getattr(config, "num_hidden_layers", 0)
    return found


def depth_key(config: ModelConfig, stack: str) -> str:
    """Return the key of config.json with the number of layers of a stack."""
    if isinstance(config, EncDecConfig):
        return "num_layers" if stack.strip() == "encoder" else "num_decoder_layers"
    if isinstance(config, WhisperConfig):
        return f"{stack.strip()}_layers"
    return config.key("num_hidden_layers")


def block_count(config: ModelConfig, *, with_experts: bool) -> int:
    """Return the number of layers, plus the experts' blocks of all layers if `with_experts`."""
    if isinstance(config, EncDecConfig):
        layers = sum(map(config.layers, STACKS))
        sparse = sum(sum(config.sparse_layers(stack)) for stack in STACKS)
        apart = config.experts if not isinstance(config, StMoeConfig) else None
        experts = apart.count if apart else 0
    elif isinstance(config, MoeConfig):
        layers, sparse = config.num_hidden_layers, sum(config.sparse_layers)
        experts = config.num_experts
    elif isinstance(config, WhisperConfig):
        layers, sparse, experts = sum(map(config.layers, STACKS)), 0, 0
    else:
        layers, sparse, experts = depth(config), 0, 0
    return layers + (sparse * experts if with_experts else 0)


def is_tied(config: ModelConfig) -> bool:
    """Whether the output matrix is the embedding."""
    return bool(getattr(config, "tie_word_embeddings", isinstance(config, WhisperConfig)))
