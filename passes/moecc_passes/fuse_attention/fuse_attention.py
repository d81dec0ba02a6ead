"""The pass ``fuse-attention``: scores, softmax and averaged values as one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.errors import InputError
from moecc.ir.attributes import Given
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.replace import replace_value
from moecc.ir.verify import where
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite import P, fits
from moecc_passes.fuse_attention.find import Attention, NotFused, attentions

CAUSAL = P.causal(P.any("query"), P.any("key"), window=P.attr("window"))
SEGMENTS = P.same_segment(P.any("query"), P.any("key"))
POSITIONS = P.positions(P.any(), axis=P.attr("axis"))
RENAMED = P.rename(P.any("x"), axis=P.attr("axis"), to=P.attr("to"))


@dataclass(frozen=True)
class FuseAttentionPass(Pass):
    """Make one ``attention`` of the operations from scores to averaged values.

    Kernels then need no memory for scores, which are the largest values of a long sequence.
    Grouped heads, scale, soft cap, relative bias, sinks, causal masks and windows, segments and
    one further mask become a part of it.  A causal mask of plain positions is an attribute, so
    that kernels skip what it hides.  Other forms stay as they are, with a remark.

    Before::

        %scores = contract %q, %k {over=head_dim} : f32[batch=B, seq=S, kv_head=3, kv_seq=S]
        %scaled = scale %scores {by=0.125}
        %causal = causal %positions, %keys : pred[seq=S, kv_seq=S]
        %masked = mask %scaled, %causal
        %weights = softmax %masked {axis=kv_seq}
        %mixed = contract %weights, %v {over=kv_seq} : f32[batch=B, seq=S, kv_head=3, head_dim=64]

    After::

        %mixed = attention %q, %k, %v {over=head_dim, along=kv_seq, scale=0.125, causal=seq}

    It is not bit-exact: a soft cap's two factors become one, and kernels add in another order.
    Run it after what reads or changes attention weights: ``specialize`` (dropout), ``add-losses``,
    ``pack-segments``, ``decode``; and before ``roll-layers``.
    """

    name: ClassVar[str] = "fuse-attention"
    summary: ClassVar[str] = "make scores, softmax and averaged values one operation"
    preserves = Preserves("reassociation", "sums of weights are divided after values are added")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Fuse all attentions; remark on those that are left."""
        made = 0
        remarks: list[Remark] = []
        for found in list(attentions(graph)):
            reason = found.reason if isinstance(found, NotFused) else _fused(graph, found)
            node = found.node if isinstance(found, NotFused) else found.root
            if reason is None:
                made += 1
            else:
                remarks.append(Remark(where(node), f"this attention is not fused: {reason}"))
        return PassResult(bool(made), made, {"attentions-fused": made}, remarks)


def _fused(graph: Graph, attention: Attention) -> str | None:
    """Replace `attention` by one operation; return why not, or None."""
    hidden = _Hidden()
    for keep in attention.masks:
        reason = hidden.add(keep, attention)
        if reason is not None:
            return reason
    given = hidden.given
    if attention.bias is not None:
        given["bias"] = attention.bias
    if attention.sinks is not None:
        given["sinks"] = attention.sinks
    root = attention.root
    builder = Builder(graph, loc=root.loc, origin=FuseAttentionPass.name, before=root)
    try:
        made = builder.attention(
            attention.query,
            attention.key,
            attention.value,
            *given.values(),
            over=attention.over,
            along=attention.along,
            scale=attention.scale,
            cap=attention.cap,
            causal=hidden.causal,
            window=hidden.window,
            given=tuple(given),
            name="mixed",
        )
    except InputError as error:
        return error.problems[0].what
    if made.type != root.result.type:
        assert made.node is not None, "it was built"
        made.node.erase()
        return f"its axes would be in another order: {made.type}"
    replace_value(root.result, made)
    _erase_dead(root)
    return None


class _Hidden:
    """What hides keys from queries, as operands and attributes of an ``attention``."""

    def __init__(self) -> None:
        self.given: dict[Given, Value] = {}
        self.causal: tuple[str, ...] = ()
        self.window = 0

    def add(self, keep: Value, attention: Attention) -> str | None:
        """Take one more mask; return why it cannot be, or None."""
        causal = fits(CAUSAL, keep.node)
        if causal is not None and not self.causal:
            axis = _in_order(causal.value("query"))
            if axis is not None and _in_order(causal.value("key")) == attention.along:
                self.causal, self.window = (axis,), int(causal.attr("window"))
                return None
        segments = fits(SEGMENTS, keep.node)
        if segments is not None and "query_segments" not in self.given:
            self.given["query_segments"] = segments.value("query")
            self.given["key_segments"] = segments.value("key")
            return None
        if "keep" in self.given:
            return "it has two masks that are neither causal nor of segments"
        self.given["keep"] = keep
        return None


def _in_order(positions: Value) -> str | None:
    """Return the axis along which `positions` are 0, 1, 2, …, or None if they may be others.

    On a mesh a device would have to know which part of them is its own.
    """
    if len(positions.type) != 1 or positions.type.is_sharded:
        return None
    (axis,) = positions.type.names
    renamed = fits(RENAMED, positions.node)
    plain = positions if renamed is None else renamed.value("x")
    return axis if fits(POSITIONS, plain.node) is not None else None


def _erase_dead(root: Node) -> None:
    """Erase `root`, and what nothing uses without it."""
    work = [root]
    while work:
        node = work.pop()
        if node.alive and node.is_dead:
            makers = [v.node for v in node.operands]
            node.erase()
            work += dict.fromkeys(n for n in makers if n is not None)
