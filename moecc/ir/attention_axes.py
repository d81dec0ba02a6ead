"""The axes of an attention by their parts: what kernels call batch, heads, queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moecc.ir.attention_kernels import AttentionFacts
from moecc.ir.attributes import AttentionAttrs

Sizes = Mapping[str, int]
"""The axes of an operand in order, with their sizes."""


@dataclass(frozen=True)
class AttentionAxes:
    """The axes of an attention in the order in which kernels take them.

    Attributes:
      batch: the first axis that queries, keys and values share, or none.
      heads: the others that they share.
      groups: the axes that only queries have, but for that of their sequence.
      queries: the axis of the queries' sequence, or none.
      width: the axis that is summed over.
      keys: the axis of keys and values.
      wide: the axes that only values have.
    """

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    groups: tuple[str, ...]
    queries: tuple[str, ...]
    width: str
    keys: str
    wide: tuple[str, ...]

    @classmethod
    def of(
        cls, query: Sizes, key: Sizes, value: Sizes, attrs: AttentionAttrs
    ) -> AttentionAxes | None:
        """Return the axes of operands; None where only two of the three share one."""
        own = {attrs.over, attrs.along}
        shared = tuple(a for a in query if a in key and a in value and a not in own)
        free = tuple(a for a in query if a not in shared and a not in own)
        wide = tuple(a for a in value if a not in shared and a != attrs.along)
        if set(key) != {*shared, *own} or set(free) & set(wide):
            return None
        queries = attrs.causal or tuple(sorted(free, key=lambda a: query[a])[-1:])
        groups = tuple(a for a in free if a not in queries)
        if set(queries) - set(free):
            return None
        return cls(shared[:1], shared[1:], groups, queries, attrs.over, attrs.along, wide)

    @property
    def result(self) -> tuple[str, ...]:
        """The axes of the averaged values."""
        return (*self.batch, *self.heads, *self.groups, *self.queries, *self.wide)


@dataclass(frozen=True)
class Program:
    """What decides a kernel besides the attention itself.

    Attributes:
      platform: ``tpu``, ``gpu`` or ``cpu``.
      dtype: the type of the computation, as in ``bf16``.
      partitioned: whether XLA's partitioner shards it.
      on_mesh: whether it is that of one device of several.
    """

    platform: str
    dtype: str
    partitioned: bool = False
    on_mesh: bool = False


def facts_of(
    query: Sizes, key: Sizes, value: Sizes, attrs: AttentionAttrs, program: Program
) -> AttentionFacts:
    """Return what decides the kernel of an attention in `program`."""
    axes = AttentionAxes.of(query, key, value, attrs)
    free = [n for a, n in query.items() if a not in key]
    return AttentionFacts(
        platform=program.platform,
        dtype=program.dtype,
        queries=max(free, default=1) if axes is None else prod(query[a] for a in axes.queries),
        keys=key[attrs.along],
        width=key[attrs.over],
        wide=0 if axes is None else prod(value[a] for a in axes.wide),
        given=attrs.given,
        causal=bool(attrs.causal),
        window=attrs.window,
        capped=attrs.cap > 0,
        laid_out=axes is not None,
        partitioned=program.partitioned,
        on_mesh=program.on_mesh,
    )
