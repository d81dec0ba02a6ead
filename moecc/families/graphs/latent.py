"""Latent attention: heads are products of narrow, normalised vectors."""

from __future__ import annotations

from collections.abc import Callable

from moecc.families.decoder import DecoderConfig
from moecc.families.graphs.parameters import Parameters
from moecc.ir.builder import Builder
from moecc.ir.graph import Value

LATENT_EPS = 1e-6
"""Of the norms of latent vectors: the default of their class, whatever the config states."""


def latent_heads(
    builder: Builder,
    x: Value,
    prefix: str,
    config: DecoderConfig,
    params: Parameters,
    rotation: tuple[Value, Value] | None,
) -> tuple[Value, Value, Value]:
    """Emit queries, keys and values ``[batch, seq, head, head_dim]``, the rotated entries first.

    Those of the keys are of all heads; they are repeated, since caches, kernels and programs have
    keys by head.

    Args:
      builder: where operations are appended.
      x: the normalised input of the layer, ``[batch, seq, embed]``.
      prefix: the names of the layer's attention.
      config: of a model with latent attention.
      params: the parameters of the model.
      rotation: cosines and sines, ``[seq, head_dim]``; None for no rotation.
    """
    assert config.latent is not None, "the model has latent attention"
    latent, loc = config.latent, builder.loc
    count, width, embed = config.num_attention_heads, config.head_dim, config.hidden_size
    rotary, rank, nope = config.rotated_dim, latent.key_rank, width - config.rotated_dim

    def biased(y: Value, name: str, bias: Callable[[str], Value]) -> Value:
        return builder.add(y, bias(f"{prefix}{name}.bias")) if config.qkv_bias else y

    def normalised(y: Value, name: str, **axis: int) -> Value:
        scale = params.plain(f"{prefix}{name}.weight", loc, **axis)
        return builder.rms_norm(y, scale, axis=next(iter(axis)), eps=LATENT_EPS)

    source, name = x, "q_proj"
    if latent.query_rank is not None:
        axes, name = {"query_latent": latent.query_rank}, "q_b_proj"
        weight = params.plain(f"{prefix}q_a_proj.weight", loc, **axes, embed=embed)
        source = builder.contract(x, weight, over="embed", name="query_latent")
        source = biased(source, "q_a_proj", lambda name: params.plain(name, loc, **axes))
        source = normalised(source, "q_a_layernorm", **axes)
    over = source.type.axes[-1]
    assert isinstance(over.size, int), "the width of a model is known"
    axes, name = {"q": count * width, over.name: over.size}, f"{prefix}{name}.weight"
    weight = params.rotated_first(
        name, name, loc, (count, width), nope, axes, pairs=latent.interleaved
    )
    query = builder.contract(source, weight, over=over.name, name="q")
    query = builder.split(query, axis="q", into=(("head", count), ("head_dim", width)))
    query_rotary = builder.slice(query, axis="head_dim", start=0, stop=rotary)
    query_plain = builder.slice(query, axis="head_dim", start=rotary, stop=width)

    both = f"{prefix}kv_a_proj_with_mqa"

    def first(kind: str, **axes: int) -> Value:
        name, of = f"{prefix}kv_a_proj.{kind}", f"{both}.{kind}"
        return params.part(name, of, loc, 0, ("heads", rank + rotary), {"latent": rank, **axes})

    def shared(kind: str, **axes: int) -> Value:
        return params.rotated_first(
            f"{prefix}k_rope_proj.{kind}", f"{both}.{kind}", loc, (1, rank + rotary), rank,
            {"head_dim": rotary, **axes}, pairs=latent.interleaved, alone=True,
        )  # fmt: skip

    memory = builder.contract(x, first("weight", embed=embed), over="embed", name="latent")
    memory = biased(memory, "kv_a_proj", lambda name: first("bias"))
    memory = normalised(memory, "kv_a_layernorm", latent=rank)
    key_rotary = builder.contract(x, shared("weight", embed=embed), over="embed", name="k_rope")
    key_rotary = biased(key_rotary, "k_rope_proj", lambda name: shared("bias"))

    def by_head(letter: str, part: tuple[int, int]) -> Value:
        size, of = part[1] - part[0], f"{prefix}kv_b_proj.weight"
        weight = params.group_part(
            f"{prefix}{letter}_b_proj.weight", of, loc, part, (count, nope + latent.value_dim, 1),
            {"kv": count * size, "latent": rank},
        )  # fmt: skip
        y = builder.contract(memory, weight, over="latent", name=letter)
        return builder.split(y, axis="kv", into=(("head", count), ("head_dim", size)))

    if rotation is not None:
        query_rotary = builder.rotate(query_rotary, *rotation, axis="head_dim")
        key_rotary = builder.rotate(key_rotary, *rotation, axis="head_dim")
    key_rotary = builder.broadcast(key_rotary, query_rotary)
    key_plain, value = by_head("k", (0, nope)), by_head("v", (nope, nope + latent.value_dim))
    query = builder.join(query_rotary, query_plain, axis="head_dim")
    key = builder.join(key_rotary, key_plain, axis="head_dim")
    return query, key, value
