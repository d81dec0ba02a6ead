"""The pass ``expert-parallel``: how the rows of routed layers come to their experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

from moecc.errors import InputError, Problem
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import Mesh, nearest_multiple, required_mesh
from moecc.ir.ops.collectives import format_sharding
from moecc.ir.ops.slots import SlotsOp, operands_by_word
from moecc.ir.structure import erase_unused, infer_again, replace_value
from moecc.ir.traits import CollectiveKind, RowMove
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.pattern import NearMiss
from moecc.sharding.assign import Assigner
from moecc.sharding.collectives import (
    RowSlice,
    Step,
    from_experts,
    gathered,
    sums_back,
    to_experts,
    without,
)
from moecc.sharding.vias import BY_NAME, WAYS, Slots, Via, refusals
from moecc_passes.routed import NOTHING_ROUTED, RoutedLayer, routed_layers

# A routed layer on a mesh: over which mesh axes its tokens and experts are sharded.


@dataclass(frozen=True)
class LaidLayer:
    """A routed layer, and what brings its rows to the experts and back.

    Attributes:
      routed: the layer.
      entries: the collectives that take the dispatched rows to the experts.
      gate_entries: those that take gates there, where these go with the rows.
      outputs: what the experts made of them, before anything brings it back.
      expert_mesh: the mesh axes that shard the experts.
    """

    routed: RoutedLayer
    entries: tuple[Node, ...]
    gate_entries: tuple[Node, ...]
    outputs: Value
    expert_mesh: tuple[str, ...]

    @property
    def token_mesh(self) -> tuple[str, ...]:
        """The mesh axes that shard the outermost token axis."""
        return self.routed.slots.type[self.routed.tokens[0]].mesh

    @property
    def is_ragged(self) -> bool:
        """Whether the rows of an expert are not bounded."""
        return bool(self.routed.assigner.attrs["slots"] == "ragged")

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The mesh axes that shard both tokens and experts, in the order of the tokens."""
        return tuple(m for m in self.token_mesh if m in self.expert_mesh)


UNSHARDED = NearMiss(
    "sharded experts",
    "the graph",
    "every device has all experts; annotate-sharding{rules=st-moe}, say, shards them",
)
"""The near miss on routed layers none of which has sharded experts."""


def laid_layers(graph: Graph) -> list[LaidLayer]:
    """Return the routed layers of `graph` whose experts are sharded, in order."""
    layers: list[LaidLayer] = []
    for routed in routed_layers(graph):
        rows = routed.dispatch.results[0]
        gates = () if routed.gate_dispatch is None else (routed.gate_dispatch.result,)
        entries, gate_entries = map(_collectives, ((rows,), gates))
        value = routed.combine.operands[0]
        while value.node is not None and value.node.op.collective is not None:
            value = value.node.operands[0]
        outputs = value
        mesh = outputs.type["expert"].mesh
        if mesh:
            layers.append(LaidLayer(routed, entries, gate_entries, outputs, mesh))
    return layers


def _collectives(values: Iterable[Value]) -> tuple[Node, ...]:
    return tuple(n for v in values for n in v.users if n.op.collective is not None)


def need(holds: bool, layer: LaidLayer, reason: str, expected: str, hint: str) -> None:
    """Raise InputError unless `holds`, with the sharding of tokens and experts of `layer`."""
    if holds:
        return
    tokens = "*".join(layer.token_mesh) or "no mesh axis"
    experts = "*".join(layer.expert_mesh)
    slots = layer.routed.assigner.attrs["slots"]
    raise InputError(
        reason,
        where=layer.routed.name,
        expected=expected,
        found=f"tokens on {tokens}, experts on {experts}, slots={slots}",
        hint=hint,
    )


# Bounded receive buffers: rows that a device has no room for get no slot, and are counted.

PREFIX = "dropped."
"""Outputs that count the choices which found no room begin so, and go on with the layer."""


def bound_rows(graph: Graph, layer: LaidLayer, builder: Builder, mesh: Mesh, factor: float) -> None:
    """Leave out what does not fit into `factor` times a device's share, and return the count.

    Args:
      graph: the graph.
      layer: a dropless layer.
      builder: makes the nodes.
      mesh: the mesh of the graph.
      factor: the room of a device, in shares of the choices.
    """
    routed = layer.routed
    need(
        layer.is_ragged,
        layer,
        "under a capacity every buffer is bounded already",
        "slots=ragged",
        "leave buffer-factor out",
    )
    builder.before = routed.dispatch
    slots, experts = routed.slots, routed.experts
    counts = _counts(layer, builder)
    outer = tuple(m for m in counts.type["group"].mesh if m not in layer.expert_mesh)
    over = counts.type["group"].mesh[len(outer) :]
    if over:
        counts = builder.all_gather(counts, axis="group", mesh=over, name="counts")
    tokens = routed.tokens
    keep = builder.within_buffer(
        experts,
        slots,
        counts,
        tokens=tokens,
        parts=mesh.size(layer.expert_mesh),
        blocks=mesh.size(outer),
        factor=factor,
    )
    bounded = _placed_again(layer, builder, keep)
    movers = [n for n in (routed.dispatch, routed.gate_dispatch, routed.combine) if n is not None]
    for node in movers:
        node.set_operand(2, bounded)
    # How many choices had a slot and have none any more.
    axes = slots.type.names
    lost = builder.sub(_placed(builder, slots), _placed(builder, bounded))
    dropped = builder.sum(lost, axes=axes, name="dropped")
    if dropped.type.unreduced:
        dropped = builder.all_reduce(dropped, mesh=dropped.type.unreduced, name="dropped")
    infer_again(graph, movers, start=routed.assigner)
    graph.set_output(f"{PREFIX}{routed.name}", dropped)


def _placed(builder: Builder, slots: Value) -> Value:
    """Return 1 for each choice that has a slot, of the axes of `slots`."""
    none = builder.constant(value=-1.0, dtype="i32")
    ones = builder.broadcast(builder.constant(value=1.0, dtype="f32"), slots)
    return builder.mask(ones, builder.less(none, slots), fill=0.0)


def _counts(layer: LaidLayer, builder: Builder) -> Value:
    """Return how many slots of each group and expert are taken, ``[group, expert]``."""
    routed = layer.routed
    count = routed.assignment.experts
    hot = builder.one_hot(routed.experts, into=(("expert", count),))
    each = builder.sum(builder.mul(hot, _placed(builder, routed.slots)), axes=routed.choice)
    return builder.group_sum(each, routed.slots, name="counts")


def _placed_again(layer: LaidLayer, builder: Builder, keep: Value) -> Value:
    node = layer.routed.assigner
    need(
        node.op.name == "assign_slots",
        layer,
        "experts that choose have a bound already",
        "slots that assign_slots gives",
        "leave buffer-factor out",
    )
    operands_by_name = {**operands_by_word(node.operands, node.attrs), "keep": keep}
    attrs = {**node.attrs, "using": tuple(operands_by_name)}
    operands, names = (node.operands[0], *operands_by_name.values()), (layer.routed.slots.name,)
    return builder.node(node.op.name, *operands, names=names, **attrs).result


# All-to-all: rows go to the devices of their experts, and results come back.


def exchange(graph: Graph, layer: LaidLayer, builder: Builder, slice_over: str | None) -> None:
    """Bring the rows of `layer` to their experts by all-to-all, and the results back.

    With `slice_over`, devices that are copies of one another along that mesh axis send a part of
    each row, cut along its width, and gather the rows where the experts are (mesh-tensorflow's
    ``d_model_split``).  Results are scattered, sent back and combined in parts, and gathered
    as tokens, of which there are fewer than rows.
    """
    routed, part = layer.routed, None
    dispatch, combine = routed.dispatch, routed.combine
    target = layer.entries[0].result.type
    if slice_over is not None:
        width = [n for n in layer.outputs.type.names if n not in ("group", "expert", "slot")]
        need(
            len(width) == 1,
            layer,
            "rows have one axis besides group, expert and slot",
            "one axis, embed say",
            "leave the slice out",
        )
        part, x = RowSlice(width[0], slice_over), dispatch.operands[0]
        used = {m for t in (x.type, target) for a in t.axes for m in a.mesh}
        need(
            slice_over not in used,
            layer,
            f"rows are sharded over {slice_over!r} already",
            "a mesh axis that shards neither tokens nor experts",
            "leave the slice out",
        )
        builder.before = dispatch
        dispatch.set_operand(0, emit(builder, x, [part.shard]))
        infer_again(graph, [dispatch], start=dispatch)
    # Devices that are copies send parts of rows, and each the gates of all.
    for entries, slice_of_row in ((layer.entries, part), (layer.gate_entries, None)):
        if entries:
            builder.before = entries[0]
            source, entered = entries[0].operands[0], entries[0].result.type
            value = emit(builder, source, to_experts(source.type, entered, slice_of_row))
            for entry in entries:
                replace_value(entry.result, value)
                entry.erase()
    builder.before = combine
    unused, outputs = combine.operands[0], layer.outputs
    combine.set_operand(0, emit(builder, outputs, from_experts(outputs.type, unused.type, part)))
    erase_unused(unused)
    if part is not None:
        (type,) = combine.op.result_types(combine.operands, combine.attrs)
        users = uses(combine.result)
        combine.result.type = type
        builder.before = combine._next
        tokens = emit(builder, combine.result, [part.gather])
        for user, number in users:
            user.set_operand(number, tokens)


def uses(value: Value) -> list[tuple[Node, int]]:
    """Return every use of `value`: the node and the number of its operand."""
    return [(u, i) for u in value.users for i, v in enumerate(u.operands) if v is value]


# Chunks of rows, so that experts work on one while the next is on its way.


def chunk_rows(graph: Graph, layer: LaidLayer, builder: Builder, mesh: Mesh, count: int) -> None:
    """Let the experts of `layer` work on `count` chunks of groups, one after the other.

    Raises:
      InputError: the groups of a device do not divide so, rows are ragged, or something else
        looks at what the experts make.
    """
    routed = layer.routed
    combine, sent = routed.combine, _dispatched(layer)
    group = sent[0].type["group"]
    parts = mesh.size(group.mesh)
    need(
        not layer.is_ragged,
        layer,
        "ragged rows have no equal chunks",
        "slots=capacity",
        "leave chunks out",
    )
    need(
        isinstance(group.size, int) and group.size % (parts * count) == 0,
        layer,
        "the token groups of a device have no such chunks",
        f"a multiple of {parts * count} groups, not {group.size}",
        f"specialize{{groups={parts * count}}} first",
    )
    region = _region(layer)
    outputs = combine.operands[0]
    away = graph.input(graph.fresh("away"), outputs.type)
    combine.set_operand(0, away)
    results = [outputs]
    for at in range(1, count):
        builder.before = combine
        values = {v: _chunk(builder, v, at, count, parts) for v in sent}
        for node in region:
            graph.copy(node, values, before=combine)
        results.append(values[outputs])
    first: dict[Value, Value] = {}
    for value in sent:
        assert value.node is not None, "it was dispatched"
        builder.before = value.node._next
        first[value] = _chunk(builder, value, 0, count, parts)
    for node in region:
        for number, value in enumerate(node.operands):
            if value in first:
                node.set_operand(number, first[value])
    infer_again(graph, region, start=region[0])
    builder.before = combine
    joined = builder.join(*results, axis="group", parts=parts, name=outputs.name)
    combine.set_operand(0, joined)
    graph.erase_input(away.name)


def _chunk(builder: Builder, rows: Value, at: int, count: int, parts: int) -> Value:
    return builder.chunk(rows, axis="group", at=at, of=count, parts=parts, name=rows.name)


def _dispatched(layer: LaidLayer) -> list[Value]:
    """Return the rows that are dispatched, and their gates where these go with them."""
    ways = (RowMove.TO_SLOTS, RowMove.GATES_TO_SLOTS)
    users = list(layer.routed.slots.users)
    return [n.result for way in ways for n in users if n.op.moves is way]


def _region(layer: LaidLayer) -> list[Node]:
    """Return the nodes between dispatch and combine, in order."""
    combine = layer.routed.combine
    depends = set(_dispatched(layer))
    region: list[Node] = []
    for node in layer.routed.dispatch.graph.walk(layer.routed.dispatch):
        if node is combine:
            break
        if any(v in depends for v in node.operands) and node.op.moves is None:
            depends.update(node.results)
            region.append(node)
    inside = {*region, combine}
    outside = [u for n in region for v in n.results for u in v.users if u not in inside]
    need(
        not outside,
        layer,
        "something else looks at what the experts make",
        "nothing between dispatch and combine is used elsewhere",
        "leave chunks out",
    )
    return region


def unchunk(graph: Graph) -> int:
    """Make one of all chunks that are worked on alike, and return how many were made one."""
    count, changed = 0, list[Node]()
    for join in [n for n in graph if n.op.name == "join"]:
        chains = [_chain(v, at, len(join.operands)) for at, v in enumerate(join.operands)]
        if None in chains or len(set(chains)) != 1:
            continue
        first, others = join.operands[0], join.operands[1:]
        started = [n for n in _nodes_behind(first) if n.op.name == "chunk"]
        join.result.replace_by(first)
        join.erase()
        for value in others:
            erase_unused(value)
        for node in started:
            changed += node.result.users
            node.replace_by(node.operands[0])
        count += 1
    # Rows meet their gates, so that no type is right before all chunks are gone.
    infer_again(graph, (node for node in changed if node.alive))
    return count


def _nodes_behind(value: Value) -> list[Node]:
    """Return the nodes that make `value` of the chunks it comes from, these included."""
    nodes: dict[Node, None] = {}
    pending = [value.node]
    while pending:
        node = pending.pop()
        if node is None or node in nodes or not _has_chunk(node):
            continue
        nodes[node] = None
        pending.extend(v.node for v in node.operands if node.op.name != "chunk")
    return list(nodes)


def _has_chunk(node: Node) -> bool:
    """Whether a chunk is among what `node` is made of, up to a dispatch."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op.name == "chunk":
            return True
        if current in seen or current.op.name in ("dispatch", "join"):
            continue
        seen.add(current)
        pending.extend(v.node for v in current.operands if v.node is not None)
    return False


def _chain(value: Value, at: int, of: int) -> object:
    """Return what is done to chunk `at` to make `value`, alike for all chunks; None if nothing."""
    nodes = _nodes_behind(value)
    numbers = {n: i for i, n in enumerate(nodes)}
    lines = []
    for node in nodes:
        attrs = dict(node.attrs)
        if node.op.name == "chunk" and (attrs.pop("at"), attrs["of"]) != (at, of):
            return None
        uses = tuple(
            numbers[v.node] if v.node in numbers and node.op.name != "chunk" else v
            for v in node.operands
        )
        lines.append((node.op.name, uses, tuple(sorted(attrs.items()))))
    return tuple(lines) or None


# Token groups on a mesh: dropless layers may be cut into any number of them.

REGROUPED = Preserves("reassociation", "the rows of dropless layers stand in other groups")
"""What changes where the number of groups of a dropless layer does."""

RENUMBERED = Preserves("approximate", "slots, which are outputs, are numbered in other groups")
"""What changes, too, where a graph returns the slots, as behind ``trace-routing``."""

ATTRIBUTE = "groups_whole"
"""The graph attribute with the groups that each ``assign_slots`` had before, by its name."""


def cut_groups(graph: Graph, assigner: Assigner) -> list[Remark]:
    """Cut the tokens of dropless layers into as many groups as their parts on the mesh need.

    Without a bound on the slots groups change nothing but the sizes of types, unless a loss counts
    in them.  What the number was stands in an attribute of the graph.
    """
    before: dict[str, int] = {}
    remarks: list[Remark] = []
    for node in list(graph):
        parts = _parts(node, assigner)
        was = SlotsOp.of_node(node).groups if parts is not None else 0
        if parts is None or was % parts == 0:
            continue
        before[node.results[-1].name] = was
        now = node.attrs["groups"] = nearest_multiple(was, parts)
        infer_again(graph, [node], start=node)
        text = f"{now} groups instead of {was}: without a capacity the number changes nothing"
        remarks.append(Remark(node.loc, text))
    if before:
        graph.attrs[ATTRIBUTE] = before
    return remarks


def kept_by_cutting(graph: Graph) -> Preserves:
    """Return what `cut_groups` has preserved of `graph`."""
    before = graph.attrs.get(ATTRIBUTE, {})
    if not before:
        return EXACT
    slots = (node.results[-1] for node in graph if node.op.assigns_slots)
    returned = any(value.is_output and value.name in before for value in slots)
    return RENUMBERED if returned else REGROUPED


def _parts(node: Node, assigner: Assigner) -> int | None:
    """Return over how many shards a dropless ``assign_slots`` has its tokens; None elsewhere."""
    if not node.op.assigns_slots:
        return None
    attrs = SlotsOp.of_node(node)
    if attrs.slots != "ragged" or attrs.group_size:
        return None
    if any(user.op.name == "group_sum" for user in node.results[-1].users):
        return None
    outermost = attrs.tokens[0]
    type = assigner.lone(node.operands[0].type)
    return assigner.mesh.size(type[outermost].mesh)


def restore_groups(graph: Graph) -> bool:
    """Give dropless layers the number of groups that they had before; return whether any had."""
    before = graph.attrs.pop(ATTRIBUTE, {})
    for node in graph:
        name = node.results[-1].name
        if name in before and node.op.assigns_slots:
            node.attrs["groups"] = before[name]
    return bool(before)


# Gathered tokens: every device sees the tokens of all, and keeps what its experts chose.
#
# The ring of experts gathers tokens before dispatch and scatters the sums after combine; routing
# is
# done again on what was gathered, which is exact and saves sending it.


def gather_tokens(graph: Graph, layer: LaidLayer, builder: Builder, way: Via) -> None:
    """Bring tokens instead of rows to the experts of `layer`.

    Args:
      graph: the graph.
      layer: the layer.
      builder: makes the nodes.
      way: whether the results are scattered, or all have the sums.
    """
    over = layer.exchanged
    routed = layer.routed
    before = (*routed.dispatch.results, routed.slots, routed.gates, routed.experts)
    replay = _Replay(graph, layer, builder, over)
    experts, slots, gates = (replay.value(v) for v in (routed.experts, routed.slots, routed.gates))
    x = replay.value(routed.dispatch.operands[0])
    rows = builder.dispatch(x, experts, slots, name=routed.dispatch.results[0].name)
    local_rows = builder.shard(rows, axis="expert", mesh=layer.expert_mesh, name=rows.name)
    local_gates = None
    if routed.gate_dispatch is not None:
        name = routed.gate_dispatch.result.name
        all_gates = builder.dispatch_gates(gates, experts, slots, name=name)
        local_gates = builder.shard(all_gates, axis="expert", mesh=layer.expert_mesh, name=name)
    combine = routed.combine
    tokens, exits = combine.result, combine.operands[0]
    # What follows must not see the types change before the tokens are back where they were.
    away = graph.input(graph.fresh("away"), tokens.type)
    for user, number in uses(tokens):
        user.set_operand(number, away)
    operands = (layer.outputs, experts, slots, gates)
    for number, value in enumerate(operands[: len(combine.operands)]):
        combine.set_operand(number, value)
    erase_unused(exits)
    users: list[Node] = []
    for entries, brought in ((layer.entries, local_rows), (layer.gate_entries, local_gates)):
        for entry in entries:
            assert brought is not None, "gates that are brought were dispatched"
            users += entry.result.users
            entry.result.replace_by(brought)
            erase_unused(entry.result)
    # Rows meet their gates, so that both are replaced before a type is inferred.
    infer_again(graph, users, start=routed.assigner)
    infer_again(graph, [combine], start=combine)
    builder.before = combine._next
    sums = combine.result
    y = emit(builder, sums, sums_back(sums.type, away.type, way))
    away.replace_by(y)
    graph.erase_input(away.name)
    for value in before:
        erase_unused(value)
    replay.take_names()


class _Replay:
    """Does again, on gathered tokens, what the routing of a layer does.

    Attributes:
      over: the mesh axes along which tokens are gathered.
    """

    def __init__(
        self, graph: Graph, layer: LaidLayer, builder: Builder, over: tuple[str, ...]
    ) -> None:
        self.graph = graph
        self.over = over
        self.builder = builder
        self.dispatch = layer.routed.dispatch
        self.x = self.dispatch.operands[0]
        builder.before = self.dispatch
        self.map: dict[Value, Value] = {}
        self.map[self.x] = self._gathered(self.x)
        routed = layer.routed
        for node in _between(graph, self.x, [routed.slots, routed.gates, routed.experts]):
            self._again(node)

    def take_names(self) -> None:
        """Call what was done again as what it stands for, where that is gone."""
        groups = self.graph.attrs.get(ATTRIBUTE, {})
        for old, new in self.map.items():
            if old.name not in self.graph and new.name in self.graph:
                self.graph.rename(new, old.name)
            elif old.name in groups and new.node is not old.node:
                groups[new.name] = groups[old.name]

    def value(self, value: Value) -> Value:
        """Return what stands for `value`: done again, gathered, or itself where it is whole."""
        if value not in self.map:
            self.map[value] = self._gathered(value)
        return self.map[value]

    def _gathered(self, value: Value) -> Value:
        return emit(self.builder, value, gathered(value.type, self.over))

    def _again(self, node: Node) -> None:
        """Do `node` again, unless the gathered operand is sharded as its result already."""
        operands = [self.value(v) for v in node.operands]
        attrs = dict(node.attrs)
        if node.op.collective is CollectiveKind.ANY:
            type = without(node.result.type, self.over)
            if type == operands[0].type:
                self.map[node.result] = operands[0]
                return
            attrs["to"] = format_sharding(type)
        builder = self.builder
        self.graph.copy(node, self.map, attrs, origin=builder.origin, before=builder.before)


def _between(graph: Graph, x: Value, targets: list[Value]) -> list[Node]:
    """Return the nodes, in order, that `targets` need and that depend on `x`, or give slots."""
    needed: set[Node] = set()
    pending = [v.node for v in targets if v.node is not None]
    while pending:
        node = pending.pop()
        if node in needed or node is x.node:
            continue
        needed.add(node)
        pending.extend(v.node for v in node.operands if v.node is not None)
    depends, nodes = {x}, []
    slots = {v.node for v in targets[:1]}
    for node in graph.walk(x.node):
        if node in needed and (node in slots or any(v in depends for v in node.operands)):
            depends.update(node.results)
            nodes.append(node)
    return nodes


NAME = "expert-parallel"
CHUNKED = Preserves("reassociation", "rows are multiplied a chunk at a time")
EXCHANGES = tuple(way.name for way in WAYS if way.exchanges_rows)


@dataclass(frozen=True)
class ExpertParallelPass(Pass):
    """Choose the collectives between the tokens and the experts of every routed layer.

    capacity: an ``all_to_all`` of slots there and back.  ragged: a ``ragged_all_to_all`` of the
    rows that are there.  hierarchical: two mesh axes shard the experts, and rows cross the inner
    one first.  ring: tokens are gathered and routed again, results reduce-scattered; exact, and
    cheaper where tokens have many choices.  replicated: the same with an ``all_reduce``, for
    tokens that are the same along the experts' mesh axis, as when decoding.

    With chunks, experts work on one part of the token groups while the next is on its way.

    A buffer factor bounds what a device receives: what it has no room for gets no slot, so that
    no exchange loses anything, and an output ``dropped.LAYER`` counts it.

    Before, as ``annotate-sharding`` leaves it::

        %r = dispatch %x, %e, %p : f32[group@data=8, expert=8, slot=capacity(%p), embed=16]
        %r1 = reshard %r {to="expert@data"} : f32[group=8, expert@data=8, …]

    After ``expert-parallel{via=capacity slice=model}``, the sequence of ST-MoE::

        %x1 = shard %x {axis=embed, mesh=model} : f32[batch@data=B, seq=S, embed@model=16]
        %r = dispatch %x1, %e, %p : f32[group@data=8, expert=8, slot=capacity(%p), embed@model=16]
        %r1 = all_to_all %r {mesh=data, split=expert, gather=group} : f32[group=8, expert@data=8, …]
        %r2 = all_gather %r1 {axis=embed, mesh=model} : f32[group=8, expert@data=8, …, embed=16]
    """

    name = NAME
    summary = "choose the collectives that bring rows to their experts"
    must_match = True

    via: Annotated[
        Literal["capacity", "ragged", "hierarchical", "ring", "replicated"],
        "the collectives between tokens and experts",
    ]
    slice: Annotated[
        str | None,
        "mesh axis along which replicated devices each send a part of every row (capacity, ragged)",
    ] = None

    buffer_factor: Annotated[
        float | None,
        "size of a device's row buffer, as a multiple of its mean load (ragged, ring, replicated)",
    ] = None

    chunks: Annotated[
        int, "number of chunks of rows that experts process in turn (capacity, hierarchical)"
    ] = 1

    @property
    def preserves(self) -> Preserves:
        """Collectives are the identity on the global value; a bounded buffer may lose rows."""
        if self.buffer_factor is None:
            return EXACT if self.chunks == 1 else CHUNKED
        reason = f"rows beyond {self.buffer_factor:g} times a device's share are dropped"
        return Preserves("approximate", reason)

    def validate(self) -> list[Problem]:
        """Return which options do not go together."""
        problems: list[Problem] = []
        if self.slice is not None and self.via not in EXCHANGES:
            expected = f"one of {', '.join(EXCHANGES)}"
            reason = "rows are sliced where they are exchanged"
            problems.append(Problem(reason, "slice", expected, self.via))
        factor = self.buffer_factor
        if factor is not None and not 0 < factor < inf:
            reason = "a buffer has room for something"
            problems.append(Problem(reason, "buffer-factor", "a positive number", str(factor)))
        if factor is not None and BY_NAME[self.via].is_bounded:
            reason = "a capacity bounds every buffer already"
            problems.append(Problem(reason, "buffer-factor", "another way", "via=capacity"))
        if self.chunks < 1 or (self.chunks > 1 and not BY_NAME[self.via].is_chunked):
            reason = "rows of a fixed number are exchanged in chunks"
            expected = "at least 1, and capacity or hierarchical"
            problems.append(Problem(reason, "chunks", expected, f"{self.chunks}, via={self.via}"))
        return problems

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Insert the collectives.

        Raises:
          InputError: the graph has no mesh, or a layer does not suit the option.
        """
        mesh = required_mesh(graph)
        if self.slice is not None:
            mesh.size((self.slice,))
        layers = laid_layers(graph)
        for layer in layers:
            self._apply(graph, layer)
        # The layers are other nodes now.
        for layer in laid_layers(graph) if self.buffer_factor is not None else []:
            builder = Builder(graph, loc=layer.routed.dispatch.loc, origin=f"{NAME}/buffer")
            bound_rows(graph, layer, builder, mesh, self.buffer_factor or 1.0)
        for layer in laid_layers(graph) if self.chunks > 1 else []:
            builder = Builder(graph, loc=layer.routed.dispatch.loc, origin=f"{NAME}/chunks")
            chunk_rows(graph, layer, builder, mesh, self.chunks)
        if layers:
            where = layers[0].routed.name
            ctx.remark(
                Remark(
                    where,
                    f"{len(layers)} layers: {self.via} over {'*'.join(layers[0].expert_mesh)}",
                )
            )
        misses = [] if layers else [UNSHARDED if any(routed_layers(graph)) else NOTHING_ROUTED]
        return PassResult(bool(layers), len(layers), {"layers": len(layers)}, near_misses=misses)

    def _apply(self, graph: Graph, layer: LaidLayer) -> None:
        builder = Builder(graph, loc=layer.routed.dispatch.loc, origin=f"{NAME}/{self.via}")
        way = BY_NAME[self.via]
        slots: Slots = "ragged" if layer.is_ragged else "fixed"
        for refusal in refusals(way, layer.token_mesh, layer.expert_mesh, slots):
            need(False, layer, refusal.reason, refusal.expected, refusal.hint)
        if way.exchanges_rows:
            exchange(graph, layer, builder, self.slice)
        else:
            gather_tokens(graph, layer, builder, way)


def emit(builder: Builder, value: Value, steps: Iterable[Step]) -> Value:
    """Return what `steps`, one after the other, make of `value`; each has its name."""
    name = value.name
    for op, attrs in steps:
        value = builder.node(op, value, names=(name,), **attrs).result
    return value
