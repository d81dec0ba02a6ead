"""The same model at small sizes, for fast runs.

Everything a pass may depend on is kept: the layers and which of them are sparse, experts and top-k,
the ratio of query to key heads, biases and norms, and of every size its small prime
factors, so that divisors of it (a granularity, a mesh) still divide it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import lcm
from typing import Any

from moecc.errors import InputError
from moecc.families.alibi import AlibiConfig
from moecc.families.bart import BartConfig
from moecc.families.bert import BertConfig
from moecc.families.config import ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.encdec import STACKS, EncDecConfig
from moecc.families.gpt import GptConfig, GptNeoXConfig
from moecc.families.mixture import MoeConfig
from moecc.families.vision import VisionConfig
from moecc.families.whisper import TwoStackConfig, WhisperConfig
from moecc.support.untyped import JsonDict

MOST_VOCAB = 64
MOST_MLP = 96
MOST_SHARED = 2
MOST_EXPERT = 32
MOST_NEURONS = 1024
"""The limit on the neurons of all experts of a layer together, if there are many experts."""
MOST_HEADS = 3
MOST_HEAD_DIM = 8
MOST_PATCH = 4
MOST_PATCHES = 3
SMALL_WINDOW = 3
"""Less than a short test sequence, so that a window has an effect."""


def shrink_size(size: int, most: int) -> int:
    """Return a number up to `most` made of prime factors of `size`: each once, then the rest.

    A size up to `most` stays; one without a prime factor up to `most` becomes 1 or a small prime.
    """
    if size <= most:
        return size
    factors = list(_prime_factors(size, most))
    distinct = sorted(set(factors))
    repeated = list(factors)
    for prime in distinct:
        repeated.remove(prime)
    small = 1
    for prime in (*distinct, *repeated):
        if small * prime <= most:
            small *= prime
    return small if small > 1 else next(p for p in (13, 7, 3, 1) if p <= most)


def _prime_factors(size: int, most: int) -> Iterator[int]:
    for prime in range(2, most + 1):
        while size % prime == 0:
            yield prime
            size //= prime


def shrink_config(config: ModelConfig) -> ModelConfig:
    """Return `config` with small sizes of the same structure.

    Raises:
      InputError: the config holds a graph, whose sizes only its own constraints determine.
    """
    shrink = next((SHRINKERS[c] for c in type(config).__mro__ if c in SHRINKERS), None)
    if shrink is None:
        raise InputError("the config holds no sizes")
    return shrink(config)


def _small_vocabulary(config: ModelConfig) -> JsonDict:
    """Return a smaller vocabulary, which may be without the padding token."""
    extra = {**config.extra, "pad_token_id": None}
    return {"vocab_size": shrink_size(config.vocab_size, MOST_VOCAB), "extra": extra}


def _shrink_encdec(config: EncDecConfig) -> EncDecConfig:
    return replace(
        config,
        **_small_vocabulary(config),
        hidden_size=shrink_size(config.hidden_size, MOST_HEADS * MOST_HEAD_DIM),
        head_dim=shrink_size(config.head_dim, MOST_HEAD_DIM),
        num_attention_heads=shrink_size(config.num_attention_heads, MOST_HEADS),
        intermediate_size=shrink_size(config.intermediate_size, MOST_EXPERT),
    )


def _shrink_bert(config: BertConfig) -> BertConfig:
    heads = shrink_size(config.num_attention_heads, MOST_HEADS)
    positions = config.max_position_embeddings - config.position_offset
    width = heads * shrink_size(config.head_dim, MOST_HEAD_DIM)
    is_narrow = config.embedding_width != config.hidden_size
    return replace(
        config,
        **_small_vocabulary(config),
        hidden_size=width,
        # One more than the model's width, so that the two stay different.
        word_width=width + 1 if is_narrow else 0,
        num_attention_heads=heads,
        intermediate_size=shrink_size(config.intermediate_size, MOST_MLP),
        max_position_embeddings=shrink_size(positions, MOST_VOCAB) + config.position_offset,
    )


def _shrink_gpt(config: GptConfig) -> GptConfig:
    heads = shrink_size(config.num_attention_heads, MOST_HEADS)
    head_dim = shrink_size(config.head_dim, MOST_HEAD_DIM)
    small: JsonDict = {
        **_small_vocabulary(config),
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "intermediate_size": shrink_size(config.intermediate_size, MOST_MLP),
        "max_position_embeddings": shrink_size(config.max_position_embeddings, MOST_VOCAB),
    }
    if config.embedding_width != config.hidden_size:
        # One less or more than the model's width, so that the two stay different.
        small["word_width"] = heads * head_dim + 1
    elif config.word_width:
        small["word_width"] = heads * head_dim
    if isinstance(config, AlibiConfig):
        small["intermediate_size"] = 4 * heads * head_dim
    if isinstance(config, GptNeoXConfig):
        small["rotary_dim"] = _rotated(config.rotary_dim, config.head_dim, head_dim)
    return replace(config, **small)


def _shrink_vision(config: VisionConfig) -> VisionConfig:
    heads = shrink_size(config.num_attention_heads, MOST_HEADS)
    side = shrink_size(config.patch_size, MOST_PATCH)
    small: JsonDict = {
        "hidden_size": heads * shrink_size(config.head_dim, MOST_HEAD_DIM),
        "num_attention_heads": heads,
        "intermediate_size": shrink_size(config.intermediate_size, MOST_MLP),
        "patch_size": side,
        "image_size": tuple(
            side * shrink_size(n // config.patch_size, MOST_PATCHES) for n in config.image_size
        ),
    }
    return replace(config, **small)


def _two_stacks(config: TwoStackConfig) -> JsonDict:
    """Return the fields that small stacks share."""
    encoder, decoder = (shrink_size(config.heads(s)[0], MOST_HEADS) for s in STACKS)
    width = shrink_size(config.heads("encoder")[1], MOST_HEAD_DIM)
    return {
        **_small_vocabulary(config),
        "d_model": lcm(encoder, decoder) * width,
        "encoder_attention_heads": encoder,
        "decoder_attention_heads": decoder,
        "encoder_ffn_dim": shrink_size(config.encoder_ffn_dim, MOST_MLP),
        "decoder_ffn_dim": shrink_size(config.decoder_ffn_dim, MOST_MLP),
    }


def _shrink_bart(config: BartConfig) -> BartConfig:
    longest = shrink_size(config.max_position_embeddings, MOST_VOCAB)
    return replace(config, **_two_stacks(config), max_position_embeddings=longest)


def _shrink_whisper(config: WhisperConfig) -> WhisperConfig:
    return replace(
        config,
        **_two_stacks(config),
        num_mel_bins=shrink_size(config.num_mel_bins, MOST_HEAD_DIM),
        max_source_positions=shrink_size(config.max_source_positions, MOST_HEAD_DIM),
        max_target_positions=shrink_size(config.max_target_positions, MOST_VOCAB),
    )


def _rotated(rotary_dim: int, head_dim: int, small: int) -> int:
    """Return as large a part of a head of width `small`, an even number."""
    return min(max(2, small * rotary_dim // head_dim // 2 * 2), small)


def _shrink_decoder(config: DecoderConfig) -> DecoderConfig:
    groups = config.num_attention_heads // config.num_key_value_heads
    kv_heads = shrink_size(config.num_key_value_heads, MOST_HEADS)
    heads = kv_heads * shrink_size(groups, MOST_HEADS)
    head_dim = shrink_size(config.head_dim, MOST_HEAD_DIM)
    width = config.num_attention_heads * config.head_dim
    changes: JsonDict = {
        **_small_vocabulary(config),
        # Whether the heads together have the model's width depends on the family.
        "hidden_size": heads * head_dim * (1 if width == config.hidden_size else 2),
        "intermediate_size": shrink_size(config.intermediate_size, MOST_MLP),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "sliding_windows": tuple(w and min(w, SMALL_WINDOW) for w in config.sliding_windows),
        **_rotary_sizes(config, head_dim),
    }
    if isinstance(config, MoeConfig):
        changes.update(_expert_sizes(config))
    return replace(config, **changes)


def _rotary_sizes(config: DecoderConfig, head_dim: int) -> dict[str, object]:
    """Return the rotated entries of smaller heads, and as many divisors as these need."""
    size = head_dim
    if config.rotary_dim is not None:
        size = _rotated(config.rotary_dim, config.head_dim, head_dim)
    rope = config.rope
    if rope.type == "longrope":
        short, long = rope.short_factor[: size // 2], rope.long_factor[: size // 2]
        rope = replace(rope, short_factor=short, long_factor=long)
    return {"rope": rope, "rotary_dim": None if size == head_dim else size}


def _expert_sizes(config: MoeConfig) -> dict[str, object]:
    most = max(min(MOST_EXPERT, MOST_NEURONS // config.num_experts), 6)
    width = shrink_size(config.expert_intermediate_size, most)
    shared = config.shared_expert_intermediate_size
    sizes: dict[str, object] = {"expert_intermediate_size": width}
    if shared is not None:
        counted = min(shared // config.expert_intermediate_size, MOST_SHARED) * width
        free = shrink_size(shared, MOST_MLP)
        sizes["shared_expert_intermediate_size"] = counted if config.shared_count_key else free
    if config.expert_intermediate_size == config.intermediate_size:
        # In mixtral both are the same number.
        sizes["intermediate_size"] = width
    return sizes


SHRINKERS: dict[type[ModelConfig], Callable[[Any], ModelConfig]] = {
    DecoderConfig: _shrink_decoder,
    EncDecConfig: _shrink_encdec,
    BertConfig: _shrink_bert,
    GptConfig: _shrink_gpt,
    VisionConfig: _shrink_vision,
    WhisperConfig: _shrink_whisper,
    BartConfig: _shrink_bart,
}
"""What makes the sizes of each class of config small, and of those derived from it."""
