"""The pass ``fuse-attention``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.attention import Given
from moecc.ir.structure import replace_value
from moecc.rewrite import P, fits
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves, Remark
from moecc_passes.routed import weighted_values

# Find attention by its dataflow, from the averaged values back to queries and keys.
#
# Scores are products of queries with keys, then scaled, softly capped, biased and masked, in that
# order; each of these may be missing.  Their softmax, of which sinks may have taken their part,
# weighs the values.

SOFTMAX = P.softmax(P.any("scores"), axis=P.attr("axis"))
SUNK = P.mul(
    SOFTMAX.named("softmax"),
    P.sigmoid(
        P.sub(
            P.logsumexp(P.any("scores"), axes=P.attr("axes")).only_used_here(), P.any("sinks")
        ).only_used_here()
    ).only_used_here(),
)
"""What is left of weights where sinks take their part of them (gpt-oss)."""

MASK = P.mask(P.any("x"), P.any("keep"), fill=float("-inf"))
SCALE = P.scale(P.any("x"), by=P.attr("by"))
TANH = P.tanh(P.any("x"))
SUM = P.add(P.any("a"), P.any("b"))
PRODUCT = P.contract(P.any("a"), P.any("b"), over=P.attr("over"))
"""Not one that asks for precision of its own: the sums of an attention are in float32 anyway."""


@dataclass
class Attention:
    """An attention of several operations.

    Attributes:
      root: the node that averages values.
      query: the first operand of the scores.
      key: the second.
      value: what is averaged.
      over: the axis that queries and keys are summed over.
      along: the axis of the softmax.
      scale: the factor on the products.
      cap: the soft cap; 0 for none.
      bias: what is added to scores, or None.
      sinks: scores that no value belongs to, or None.
      masks: which scores count.
    """

    root: Node
    query: Value
    key: Value
    value: Value
    over: str
    along: str
    scale: float = 1.0
    cap: float = 0.0
    bias: Value | None = None
    sinks: Value | None = None
    masks: list[Value] = field(default_factory=list)


@dataclass(frozen=True)
class NotFused:
    """A softmax that weighs values, and why that is not fused."""

    node: Node
    reason: str


class _NotFusedError(Exception):
    """What is in the way; caught where an attention is read."""


def attentions(graph: Graph) -> Iterator[Attention | NotFused]:
    """Yield each softmax that weighs values, as an attention, or with what is in the way.

    A softmax of experts weighs no values along its axis, and one of soft slots has parameters for
    queries: neither is an attention.
    """
    params = set(graph.params.values())
    for node in graph:
        if params.issuperset(node.operands):
            params.update(node.results)
        softmax = fits(SOFTMAX, node)
        if softmax is None or _is_of_params(node.operands[0], params):
            continue
        weights = _weights(node)
        axis = softmax.attr("axis")
        user = weights.only_user
        product = None if user is None else fits(PRODUCT, user)
        root = user if product is not None and product.attr("over") == (axis,) else None
        if root is None:
            if weighted_values(node) is not None:
                yield NotFused(node, "something stands between its weights and the values")
            continue
        try:
            yield _read(node, weights, root)
        except _NotFusedError as error:
            yield NotFused(node, str(error))


def _is_of_params(scores: Value, params: set[Value]) -> bool:
    """Whether `scores` are products of a value with what is made of parameters alone."""
    node = scores.node
    while node is not None and node.op.elementwise and node.operands:
        node = node.operands[0].node
    if node is None or fits(PRODUCT, node) is None:
        return False
    return not params.isdisjoint(node.operands)


def _weights(softmax: Node) -> Value:
    """Return what weighs the values: the softmax, or what sinks leave of it."""
    for user in softmax.result.users:
        sunk = fits(SUNK, user)
        if sunk is not None and sunk.node("softmax") is softmax:
            return user.result
    return softmax.result


def _has_param(node: Node) -> bool:
    return any(v.is_param for v in node.operands)


def _unmasked(scores: Value, users: int) -> tuple[Value, list[Value]]:
    """Return what is masked to make `scores`, which have so many users, and its masks."""
    masks: list[Value] = []
    while True:
        if len(scores.users) != users or scores.is_output:
            raise _NotFusedError(f"%{scores.name} is used elsewhere too")
        mask = fits(MASK, scores.node)
        if mask is None:
            return scores, masks
        masks.append(mask.value("keep"))
        scores, users = mask.value("x"), 1


def _read(softmax: Node, weights: Value, root: Node) -> Attention:
    """Return the attention of `softmax`, whose `weights` average values in `root`.

    Raises:
      _NotFusedError: with what is in the way.
    """
    along = str(softmax.attrs["axis"])
    (value,) = (v for v in root.operands if v is not weights)
    scores, sinks, users = softmax.operands[0], None, 1
    if weights is not softmax.result:
        sunk = fits(SUNK, weights.node)
        assert sunk is not None, "sinks were found"
        sinks, users = sunk.value("sinks"), 2
        if sunk.attr("axes") != (along,):
            raise _NotFusedError("its sinks are not those of its softmax")
    scores, masks = _unmasked(scores, users)
    scores, bias = _bias(scores, along)
    scores, scale, cap = _scaled(scores)
    product = fits(PRODUCT, scores.node)
    if product is None or len(product.attr("over")) != 1:
        raise _NotFusedError(f"%{scores.name} is no product of queries and keys")
    query, key = product.value("a"), product.value("b")
    if along in query.type:
        query, key = key, query
    (over,) = product.attr("over")
    return Attention(root, query, key, value, over, along, scale, cap, bias, sinks, masks)


def _bias(scores: Value, along: str) -> tuple[Value, Value | None]:
    """Return scores without what is added to them, and that."""
    total = fits(SUM, scores.node)
    if total is None:
        return scores, None
    for x, bias in (("a", "b"), ("b", "a")):
        value = total.value(x)
        if value.type == scores.type and _is_product(value):
            return _alone(value), total.value(bias)
    raise _NotFusedError(f"%{scores.name} is no sum of products and a bias")


def _is_product(scores: Value) -> bool:
    """Whether `scores` are products of values, scaled and capped or not."""
    node = scores.node
    while node is not None and (fits(SCALE, node) or fits(TANH, node)):
        node = node.operands[0].node
    return node is not None and fits(PRODUCT, node) is not None and not _has_param(node)


def _scaled(scores: Value) -> tuple[Value, float, float]:
    """Return products, the factor on them, and their soft cap."""
    scores, factor = _factor(scores)
    capped = fits(TANH, scores.node)
    if capped is None:
        return scores, factor, 0.0
    products, inner = _factor(_alone(capped.value("x")))
    if factor <= 0:
        raise _NotFusedError("its soft cap is not positive")
    return products, inner * factor, factor


def _factor(value: Value) -> tuple[Value, float]:
    """Return what is scaled in `value`, and by what."""
    factor = 1.0
    while (scale := fits(SCALE, value.node)) is not None:
        factor *= float(scale.attr("by"))
        value = _alone(scale.value("x"))
    return value, factor


def _alone(value: Value) -> Value:
    """Return `value`, which must have one use."""
    if value.only_user is None:
        raise _NotFusedError(f"%{value.name} is used elsewhere too")
    return value


# The pass ``fuse-attention``: scores, softmax and averaged values as one operation.

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

    name = "fuse-attention"
    summary = "fuse scores, softmax and weighted values into one operation"
    preserves = Preserves("reassociation", "sums of weights are divided after values are added")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Fuse all attentions; remark on those that are left."""
        count = 0
        remarks: list[Remark] = []
        for attention in list(attentions(graph)):
            reason = (
                attention.reason if isinstance(attention, NotFused) else _fused(graph, attention)
            )
            node = attention.node if isinstance(attention, NotFused) else attention.root
            if reason is None:
                count += 1
            else:
                remarks.append(Remark(where(node), f"this attention is not fused: {reason}"))
        return PassResult(bool(count), count, {"attentions-fused": count}, remarks)


def _fused(graph: Graph, attention: Attention) -> str | None:
    """Replace `attention` by one operation; return why not, or None."""
    hidden = _Hidden()
    for keep in attention.masks:
        reason = hidden.add(keep, attention)
        if reason is not None:
            return reason
    operands = hidden.given
    if attention.bias is not None:
        operands["bias"] = attention.bias
    if attention.sinks is not None:
        operands["sinks"] = attention.sinks
    root = attention.root
    builder = Builder(graph, loc=root.loc, origin=FuseAttentionPass.name, before=root)
    try:
        fused = builder.attention(
            attention.query,
            attention.key,
            attention.value,
            *operands.values(),
            over=attention.over,
            along=attention.along,
            scale=attention.scale,
            cap=attention.cap,
            causal=hidden.causal,
            window=hidden.window,
            given=tuple(operands),
            name="mixed",
        )
    except InputError as error:
        return error.problems[0].message
    if fused.type != root.result.type:
        assert fused.node is not None, "it was built"
        fused.node.erase()
        return f"its axes would be in another order: {fused.type}"
    replace_value(root.result, fused)
    # Erase `root`, and what nothing uses without it.
    work = [root]
    while work:
        node = work.pop()
        if node.alive and node.is_dead:
            makers = [v.node for v in node.operands]
            node.erase()
            work += dict.fromkeys(n for n in makers if n is not None)
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
