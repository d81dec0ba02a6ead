"""Kernels of attention: which there are, where each is legal, and which is chosen.

Facts that plans and users rely on.  The XLA backend implements them, in a table by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moecc.ir.attention_blocks import TPU_BLOCKS, share_of_scores, share_of_tpu_blocks

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
      given: the words of its further operands.
      causal: whether queries see no later keys.
      window: how many keys they see; 0 for all.
      capped: whether there is a soft cap.
      laid_out: whether each axis is one of queries, keys and values, or of two of them as usual.
      partitioned: whether XLA's partitioner shards the program.
      on_mesh: whether the program is that of one device of several.
    """

    platform: str
    dtype: str
    queries: int
    keys: int
    width: int
    wide: int
    given: tuple[str, ...] = ()
    causal: bool = False
    window: int = 0
    capped: bool = False
    laid_out: bool = True
    partitioned: bool = False
    on_mesh: bool = False


def _splash(facts: AttentionFacts) -> Iterator[str]:
    if facts.partitioned:
        yield "XLA's partitioner shards no kernels of Pallas"
    for word in facts.given:
        if word != "sinks":
            yield f"it takes no {word.replace('_', ' ')}"
    for what, size in (("queries", facts.queries), ("keys", facts.keys)):
        if size % TPU_BLOCKS[-1]:
            yield f"{size} {what} are no multiple of {TPU_BLOCKS[-1]}"
    if facts.causal and facts.queries != facts.keys:
        yield "it hides keys from as many queries alone"
    if facts.width != facts.wide:
        yield "its values are as wide as its keys"
    if facts.dtype not in ("bf16", "f32"):
        yield f"it computes in bf16 or f32, not in {facts.dtype}"


def _cudnn(facts: AttentionFacts) -> Iterator[str]:
    if facts.dtype not in ("bf16", "f16"):
        yield f"it computes in bf16 or f16, not in {facts.dtype}"
    if facts.on_mesh:
        yield "it says nothing of how its results vary over a mesh"
    if facts.capped:
        yield "it has no soft cap"
    for word in facts.given:
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
