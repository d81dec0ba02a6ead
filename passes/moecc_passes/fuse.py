"""Passes that fuse: attention into one operation, gate and up into one product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.ops.attention import Given
from moecc.ir.ops.contraction import ContractOp
from moecc.ir.structure import erase_unused, replace_value
from moecc.rewrite import P, fits
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.types import Axis
from moecc.weights.movement import Concat
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
    erase_unused(root.result)
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


# Fuse sibling contractions: gate and up, of one value, whose results meet in one down matrix.
#
# The rewrite of the pass ``fuse-gate-up``, in the core so that backends can apply it too. Siblings
# contract the same value, each with its own parameter, over the same axes and to the same new axis,
# and meet, element by element, in a value whose new axis a further parameter contracts. Query, key
# and value are therefore no siblings, nor are routers.

PROJECTION = P.contract(P.any("x"), P.param("w"), over=P.attr("over"))
"""A contraction of a value with a parameter."""


@dataclass(frozen=True)
class Siblings:
    """Contractions of one value that can be fused.

    Attributes:
      nodes: the contractions, in the order of the graph; each has one new axis, `axis`.
      axis: the axis along which the matrices are concatenated.
    """

    nodes: tuple[Node, ...]
    axis: str

    @property
    def params(self) -> tuple[Value, ...]:
        """The matrices, in the order of `nodes`."""
        return tuple(node.operands[1] for node in self.nodes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of `axis`, in the order of `nodes`."""
        return tuple(int(str(param.type[self.axis].size)) for param in self.params)


@dataclass(frozen=True)
class Fusion:
    """A parameter that replaces several, for callers that hold the values of those.

    Attributes:
      param: the new parameter's name.
      parts: the names of the replaced parameters, in order; they no longer exist.
      axis: the axis along which their values are concatenated.
    """

    param: str
    parts: tuple[str, ...]
    axis: str


def find_siblings(graph: Graph, *, need_weights: bool = True) -> list[Siblings]:
    """Return the sibling contractions of `graph`, in order; a contraction is in at most one group.

    Excluded are parameters that are also read elsewhere, of different types on disk, with axes in
    different orders, or sharded along the concatenated axis: a shard of the whole is not the
    concatenation of the shards of the parts.

    Args:
      graph: a graph.
      need_weights: whether parameters without a weight expression are excluded too.  A caller that
        concatenates their values itself (see `Fusion`) does not need expressions.
    """
    order = {node: i for i, node in enumerate(graph)}
    groups: list[Siblings] = []
    grouped: set[Node] = set()
    for down in graph:
        for group in _groups(down, order):
            axis = _fusable_axis(group, need_weights)
            if axis is not None and grouped.isdisjoint(group):
                groups.append(Siblings(tuple(group), axis))
                grouped.update(group)
    return groups


def fuse_siblings(graph: Graph, *, origin: str, need_weights: bool = True) -> list[Fusion]:
    """Fuse each group of siblings into one contraction, in place, and return the fusions.

    Before::

        %a = contract %n, %gate {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %u = contract %n, %up {over=embed} : f32[batch=B, seq=S, mlp=1536]

    After::

        %f = contract %n, %gate.fused {over=embed} : f32[batch=B, seq=S, mlp=3072]
        %a = slice %f {axis=mlp, start=0, stop=1536} : f32[batch=B, seq=S, mlp=1536]
        %u = slice %f {axis=mlp, start=1536, stop=3072} : f32[batch=B, seq=S, mlp=1536]

    Args:
      graph: changed in place.
      origin: the pass and rewrite, for the new nodes.
      need_weights: see `find_siblings`.
    """
    fused: dict[str, Value] = {}
    fusions = []
    for siblings in find_siblings(graph, need_weights=need_weights):
        first = siblings.params[0]
        axis, width = siblings.axis, sum(siblings.sizes)
        type = first.type.with_axes(Axis(axis, width) if a.name == axis else a for a in first.type)
        weights = tuple(p.weight for p in siblings.params if p.weight is not None)
        weight = Concat(weights, axis) if weights else None
        fused_param = graph.param(graph.fresh(f"{first.name}.fused"), type, weight, loc=first.loc)
        parts = tuple(param.name for param in siblings.params)
        _replace(graph, siblings, fused_param, origin)
        fused |= dict.fromkeys(parts, fused_param)
        fusions.append(Fusion(fused_param.name, parts, siblings.axis))
    # Put each new parameter at the position of the first that it replaces, and erase those.
    order = dict.fromkeys(fused.get(name, value) for name, value in graph.params.items())
    for name in fused:
        graph.erase_param(name)
    graph.order_params(order)
    return fusions


def _groups(down: Node, order: dict[Node, int]) -> Iterator[list[Node]]:
    """Yield the contractions that meet in the operand of `down`, grouped by their input."""
    projection = fits(PROJECTION, down)
    if projection is None or len(projection.attr("over")) != 1:
        return
    (inner,) = projection.attr("over")
    groups: dict[object, list[Node]] = {}
    for node in _projections_to(projection.value("x"), inner):
        attrs = ContractOp.of_node(node)
        key = (node.operands[0], attrs.over, attrs.precision)
        groups.setdefault(key, []).append(node)
    for group in groups.values():
        if len(group) > 1:
            yield sorted(group, key=order.__getitem__)


def _projections_to(value: Value, inner: str) -> list[Node]:
    """Return the contractions to the axis `inner` that feed `value` element by element."""
    ends: list[Node] = []
    seen: set[Node] = set()
    stack = [value]
    while stack:
        node = stack.pop().node
        if node is None or node in seen:
            continue
        seen.add(node)
        if fits(PROJECTION, node):
            if inner in node.operands[1].type:
                ends.append(node)
        elif node.op.elementwise and inner in node.result.type:
            stack.extend(v for v in node.operands if inner in v.type)
    return ends


def _fusable_axis(group: list[Node], need_weights: bool) -> str | None:
    """Return the axis along which the matrices of `group` can be concatenated, or None."""
    params = [node.operands[1] for node in group]
    x, over = group[0].operands[0], ContractOp.of_node(group[0]).over
    added = [n for n in params[0].type.names if n not in over and n not in x.type]
    if len(added) != 1 or len(set(params)) != len(params):
        return None
    axis = added[0]
    if any(len(p.users) != 1 or p.type[axis].mesh for p in params):
        return None
    if len({p.type for p in params}) != 1:
        return None
    return axis if _weights_agree(params, need_weights) else None


def _weights_agree(params: list[Value], need_weights: bool) -> bool:
    """Return whether one expression can hold the values of all the parameters."""
    weights = [p.weight for p in params]
    if None in weights:
        return not need_weights and not any(weights)
    return len({w.type.dtype for w in weights if w is not None}) == 1


def _replace(graph: Graph, siblings: Siblings, param: Value, origin: str) -> None:
    """Replace the siblings by one contraction and its slices."""
    first, axis = siblings.nodes[0], siblings.axis
    builder = Builder(graph, loc=first.loc, origin=origin, before=first)
    attrs = ContractOp.of_node(first)
    product = builder.contract(
        first.operands[0], param, over=attrs.over, precision=attrs.precision, name="fused"
    )
    parts: list[Value] = []
    start = 0
    for node, size in zip(siblings.nodes, siblings.sizes, strict=True):
        builder.loc = node.loc
        parts.append(builder.slice(product, axis=axis, start=start, stop=start + size))
        start += size
    for node, part in zip(siblings.nodes, parts, strict=True):
        name = node.result.name
        replace_value(node.result, part)
        node.erase()
        # A replacement takes over the name of the value, so that the text differs less.
        graph.rename(part, name)


@dataclass(frozen=True)
class FuseGateUpPass(Pass):
    """Contract a value once, with the concatenated matrices of gate and up, and split the result.

    One large product is faster than two half as large.  Where the matrices cannot become one (a
    parameter that something else reads too, element types that differ on disk, an axis that is
    sharded, no weight expression) nothing is changed and nothing is said.  A graph of this form
    is for running: no family has such a layer, so export before it, and lay it on its mesh before
    it, too: what is cut along the neurons then stays two products.

    Before::

        param %gate : f32[mlp=1536, embed=576] = source("gate" : bf16[mlp=1536, embed=576])
        param %up : f32[mlp=1536, embed=576] = source("up" : bf16[mlp=1536, embed=576])
        %a = contract %n, %gate {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %u = contract %n, %up {over=embed} : f32[batch=B, seq=S, mlp=1536]
        %s = silu %a : f32[batch=B, seq=S, mlp=1536]
        %m = mul %s, %u : f32[batch=B, seq=S, mlp=1536]
        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=576]

    After::

        param %gate.fused : f32[mlp=3072, embed=576] = concat(source("gate" : …), …, axis=mlp)
        %fused = contract %n, %gate.fused {over=embed} : f32[batch=B, seq=S, mlp=3072]
        %a = slice %fused {axis=mlp, start=0, stop=1536} : f32[batch=B, seq=S, mlp=1536]
        %u = slice %fused {axis=mlp, start=1536, stop=3072} : f32[batch=B, seq=S, mlp=1536]
        …

    It is not bit-exact: a product of another shape adds in another order.
    """

    name = "fuse-gate-up"
    summary = "fuse the gate and up products of a block"
    preserves = Preserves("reassociation", "a product of another shape adds in another order")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Fuse all siblings."""
        fusions = fuse_siblings(graph, origin=f"{self.name}/concatenate")
        parts = sum(len(fusion.parts) for fusion in fusions)
        stats = {"products-fused": parts, "products-made": len(fusions)}
        return PassResult(bool(fusions), len(fusions), stats)
