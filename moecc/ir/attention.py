"""Attention: its axes, its blocks of queries and keys, and the kernels that compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from moecc.ir.ops.attention import AttentionOp

# Blocks of queries and the keys that each of them meets, where attention runs block by block.

BLOCK = 128
"""Queries of a block.  Measured on a CPU (``benchmarks/attention.py``)."""

TPU_BLOCKS = (512, 256, 128)
"""Rows of a block of splash attention: the largest that divides a sequence."""

MOST_SPANS = 8
"""Spans of queries with keys of their own, each written out; more take long to compile."""


class Span(NamedTuple):
    """A run of equal blocks of queries, and the keys that some query of it sees."""

    start: int
    blocks: int
    size: int
    first_key: int
    last_key: int


def spans(queries: int, keys: int, *, causal: bool, window: int = 0) -> Iterator[Span]:
    """Yield runs of blocks, in order; what is left is a smaller block in a span of its own.

    Args:
      queries: how many there are in a sequence.
      keys: how many keys there are.
      causal: whether a query sees only keys up to its own index.
      window: how many of them; 0 for all.
    """
    blocks, remainder = divmod(queries, BLOCK)
    count = min(blocks, MOST_SPANS) if causal or blocks <= MOST_SPANS else 1
    seen = keys if not causal else 0
    for number in range(count):
        first, last = blocks * number // count, blocks * (number + 1) // count
        yield _span(first * BLOCK, last - first, BLOCK, keys, seen, window)
    if remainder:
        yield _span(blocks * BLOCK, 1, remainder, keys, seen, window)


def _span(start: int, blocks: int, size: int, keys: int, seen: int, window: int) -> Span:
    last = seen or min(start + blocks * size, keys)
    first = max(start - window + 1, 0) if window else 0
    # A query that sees nothing has one key all the same, which the rule hides.
    return Span(start, blocks, size, min(first, last - 1), last)


def share_of_scores(queries: int, keys: int, *, causal: bool, window: int = 0) -> float:
    """Return which share of all pairs of queries and keys the blocks compute."""
    runs = spans(queries, keys, causal=causal, window=window)
    met = sum(run.blocks * run.size * (run.last_key - run.first_key) for run in runs)
    return met / max(queries * keys, 1)


def are_written_out(queries: int, *, causal: bool) -> bool:
    """Whether no block is in a loop, so that what two of them compute alike is computed once."""
    return all(run.blocks == 1 for run in spans(queries, queries, causal=causal))


def tpu_block(size: int) -> int:
    """Return the rows of a block of splash attention; `size` is a multiple of the smallest."""
    return next(block for block in TPU_BLOCKS if size % block == 0)


def share_of_tpu_blocks(queries: int, keys: int, *, causal: bool, window: int) -> float:
    """Return which share of all pairs of queries and keys splash attention computes.

    It computes each block of which some query sees some key, and skips the others.
    """
    if not causal:
        return 1.0
    high, wide = tpu_block(queries), tpu_block(keys)
    met = sum(
        (min(start + high, keys) - 1) // wide
        - (max(start - window + 1, 0) // wide if window else 0)
        + 1
        for start in range(0, queries, high)
    )
    return met * high * wide / (queries * keys)


# Kernels of attention: which there are, where each is legal, and which is chosen.
#
# Facts that plans and users rely on.  The XLA backend implements them, in a table by name.

CUDNN_WIDTH = 128
"""The widest heads that cuDNN's kernel has a gradient for."""


@dataclass(frozen=True)
class AttentionFacts:
    """What decides which kernels take an attention.

    Attributes:
      platform: ``tpu``, ``gpu`` or ``cpu``.
      dtype: the type of the computation, as in ``bf16``.
      queries: how many there are in a sequence.
      keys: how many keys there are.
      width: of a head of queries and keys.
      wide: of a head of values.
      further: the words of its further operands.
      causal: whether queries see no later keys.
      window: how many keys they see; 0 for all.
      capped: whether there is a soft cap.
      laid_out: whether each axis is one of queries, keys and values, or of two of them as usual.
      partitioned: whether XLA's partitioner shards the program.
      is_tracked: whether the program is that of one device of several, and the library that lowers
        it does not know how results of cuDNN vary over a mesh.
    """

    platform: str
    dtype: str
    queries: int
    keys: int
    width: int
    wide: int
    further: tuple[str, ...] = ()
    causal: bool = False
    window: int = 0
    capped: bool = False
    laid_out: bool = True
    partitioned: bool = False
    is_tracked: bool = False


def _splash(facts: AttentionFacts) -> Iterator[str]:
    if facts.partitioned:
        yield "XLA's partitioner shards no kernels of Pallas"
    for word in facts.further:
        if word != "sinks":
            yield f"it takes no {word.replace('_', ' ')}"
    for side, size in (("queries", facts.queries), ("keys", facts.keys)):
        if size % TPU_BLOCKS[-1]:
            yield f"{size} {side} are no multiple of {TPU_BLOCKS[-1]}"
    if facts.causal and facts.queries != facts.keys:
        yield "it hides keys from as many queries alone"
    if facts.width != facts.wide:
        yield "its values are as wide as its keys"
    if facts.dtype not in ("bf16", "f32"):
        yield f"it computes in bf16 or f32, not in {facts.dtype}"


def _cudnn(facts: AttentionFacts) -> Iterator[str]:
    if facts.dtype not in ("bf16", "f16"):
        yield f"it computes in bf16 or f16, not in {facts.dtype}"
    if facts.is_tracked:
        yield "before jax 0.10.2 it says nothing of how its results vary over a mesh"
    if facts.capped:
        yield "it has no soft cap"
    for word in facts.further:
        if word != "bias":
            yield f"it takes no {word.replace('_', ' ')}"
    if facts.causal and facts.queries != facts.keys:
        yield "it hides keys from as many queries alone"
    if facts.width > CUDNN_WIDTH or facts.width % 8:
        yield f"heads of {facts.width} are no multiple of 8 up to {CUDNN_WIDTH}"
    if facts.width != facts.wide:
        yield "its values are as wide as its keys"


def _everything(facts: AttentionFacts) -> Iterator[str]:
    return iter(())


def _all_scores(facts: AttentionFacts) -> float:
    return 1.0


def _spans_of_queries(facts: AttentionFacts) -> float:
    return share_of_scores(facts.queries, facts.keys, causal=facts.causal, window=facts.window)


def _blocks_of_tpus(facts: AttentionFacts) -> float:
    return share_of_tpu_blocks(facts.queries, facts.keys, causal=facts.causal, window=facts.window)


@dataclass(frozen=True)
class AttentionKernel:
    """A row of the table.

    Attributes:
      name: what users type and reports say.
      doc: how scores are made, in a line.
      why_not: yields why an attention that is laid out as usual is not taken.
      platform: the one that it is for; empty for all.
      needs_layout: whether its operands are laid out as usual.
      moves_scores: whether scores go through memory, in blocks or whole.
      again: what its gradient computes again, in pairs of products; a gradient that has the scores
        needs two pairs.
      share: which share of the scores it computes.
    """

    name: str
    doc: str
    why_not: Callable[[AttentionFacts], Iterator[str]]
    platform: str = ""
    needs_layout: bool = True
    moves_scores: bool = False
    again: float = 0.0
    share: Callable[[AttentionFacts], float] = _all_scores

    def reason(self, facts: AttentionFacts) -> str | None:
        """Return the first reason why `facts` rule it out, or None."""
        if self.platform not in ("", facts.platform):
            return f"it is a kernel of {self.platform.upper()}s"
        if self.needs_layout and not facts.laid_out:
            return "two of queries, keys and values share an axis that the third lacks"
        return next(self.why_not(facts), None)


KERNELS = (
    AttentionKernel(
        "splash",
        "blocks in VMEM, hidden ones skipped: JAX's Pallas kernel",
        _splash,
        "tpu",
        # One kernel makes the gradient of queries, another those of keys and values: scores twice,
        # and twice what the gradient of the result makes of them.
        again=1.5,
        share=_blocks_of_tpus,
    ),
    AttentionKernel("cudnn", "cuDNN's fused attention, through jax.nn", _cudnn, "gpu", again=0.5),
    AttentionKernel(
        "blocks",
        "blocks of queries, with a gradient of its own",
        _everything,
        moves_scores=True,
        again=0.5,
        share=_spans_of_queries,
    ),
    AttentionKernel(
        "plain", "product by product", _everything, needs_layout=False, moves_scores=True
    ),
)
"""The kernels, in the order in which they are tried."""

ATTENTIONS = tuple(kernel.name for kernel in KERNELS)
"""Their names."""


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of an attention, and why those before it in the table are not.

    Attributes:
      kernel: the kernel.
      reasons: by the name of each other kernel of the same platform that is tried first.
    """

    kernel: AttentionKernel
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.reasons)
        return f"{self.kernel.name} ({why})" if why else self.kernel.name


def choose_attention(facts: AttentionFacts) -> KernelChoice:
    """Return the first kernel that `facts` allow."""
    reasons: list[tuple[str, str]] = []
    for kernel in KERNELS:
        reason = kernel.reason(facts)
        if reason is None:
            return KernelChoice(kernel, tuple(reasons))
        if kernel.platform in ("", facts.platform):
            reasons.append((kernel.name, reason))
    raise AssertionError("the last kernel takes everything")


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
    def of(cls, query: Sizes, key: Sizes, value: Sizes, attrs: AttentionOp) -> AttentionAxes | None:
        """Return the axes of operands; None where only two of the three share one."""
        inner_axes = {attrs.over, attrs.along}
        shared = tuple(a for a in query if a in key and a in value and a not in inner_axes)
        free = tuple(a for a in query if a not in shared and a not in inner_axes)
        wide = tuple(a for a in value if a not in shared and a != attrs.along)
        if set(key) != {*shared, *inner_axes} or set(free) & set(wide):
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
class AttentionProgram:
    """What decides a kernel besides the attention itself.

    Attributes:
      platform: ``tpu``, ``gpu`` or ``cpu``.
      dtype: the type of the computation, as in ``bf16``.
      partitioned: whether XLA's partitioner shards it.
      is_tracked: see `AttentionFacts`.
    """

    platform: str
    dtype: str
    partitioned: bool = False
    is_tracked: bool = False


def facts_of(
    query: Sizes, key: Sizes, value: Sizes, attrs: AttentionOp, program: AttentionProgram
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
        further=attrs.given,
        causal=bool(attrs.causal),
        window=attrs.window,
        capped=attrs.cap > 0,
        laid_out=axes is not None,
        partitioned=program.partitioned,
        is_tracked=program.is_tracked,
    )
