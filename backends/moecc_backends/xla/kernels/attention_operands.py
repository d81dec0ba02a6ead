"""What an attention is made of, as arrays without names of axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax


class AttentionArrays(NamedTuple):
    """The operands of an attention.

    What follows the values is laid out as scores are, ``[batch, head, group, seq, kv_seq]``, with
    axes of size 1 that stand for any.

    Attributes:
      query: ``[batch, head, group, seq, width]``.
      key: ``[batch, head, kv_seq, width]``.
      value: ``[batch, head, kv_seq, wide]``.
      bias: what is added to scores.
      sinks: scores that no value belongs to.
      keep: which scores count.
      query_segments: the segment of each query, 0 for padding.
      key_segments: the segment of each key.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    sinks: jax.Array | None = None
    keep: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None


@dataclass(frozen=True)
class AttentionRule:
    """The attributes of an attention, see the operation of that name.

    Attributes:
      scale: the factor on the products.
      cap: the soft cap of scores; 0 for none.
      causal: whether a query sees only keys up to its own index.
      window: how many of them; 0 for all.
      by_key: whether gradients that are computed block by block have scores with the key first.
    """

    scale: float = 1.0
    cap: float = 0.0
    causal: bool = False
    window: int = 0
    by_key: bool = False
