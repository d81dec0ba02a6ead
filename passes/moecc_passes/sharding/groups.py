"""Token groups on a mesh: dropless layers may be cut into any number of them."""

from __future__ import annotations

from moecc.ir.attributes import SlotAttrs
from moecc.ir.graph import Graph, Node
from moecc.ir.mesh import nearest_multiple
from moecc.ir.replace import infer_again
from moecc.pipeline.passes import EXACT, Preserves, Remark
from moecc.sharding.assign import Assigner

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
        was = SlotAttrs.of_node(node).groups if parts is not None else 0
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
    attrs = SlotAttrs.of_node(node)
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
