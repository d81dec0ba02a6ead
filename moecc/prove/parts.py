"""Proofs that the graph of a micro-batch computes its part of the results of the batch.

A batch in p parts is a batch on a mesh of p devices, each with one part: it is proved, as for any
mesh, that devices compute rows of the results of the batch, and summands of its losses.  Then the
program of a device is matched, node by node, with the graph of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.mesh import Mesh, mesh_of, set_mesh
from moecc.ir.ops.contraction import MeanOp
from moecc.ir.structure import clone, local_attrs
from moecc.ir.text import format_attrs
from moecc.ir.unroll import unrolled
from moecc.prove.evaluation import Evaluation
from moecc.prove.mesh import Devices, Parting
from moecc.prove.rules import Lemmas
from moecc.terms.term import Algebra

PARTS = "parts"

ASSUMPTIONS = (
    "the micro-batches are equal parts of the batch",
    "outputs of micro-batches are joined along the batch, their losses and metrics added",
)


def part_count(before: Graph, after: Graph) -> int:
    """Return the number of micro-batches of which the second graph computes one; 1 for all."""
    losses = [graph.attrs.get("losses") for graph in (before, after)]
    counts = [x.get(PARTS, 1) if isinstance(x, dict) else 0 for x in losses]
    on_mesh = mesh_of(before) is not None or mesh_of(after) is not None
    is_part = counts[0] in (0, 1) and None not in losses and not on_mesh
    return counts[1] if is_part and isinstance(counts[1], int) else 1


def part_gap(before: Graph, after: Graph, parts: int) -> Parting | None:
    """Return the node of a micro-batch that is not proved to compute its part, or None.

    Args:
      before: the graph of a batch.
      after: the graph of a micro-batch.
      parts: how many micro-batches there are.
    """
    part = unrolled(after)
    names = [n for n in after.outputs if n in before.outputs]
    batch = clone(unrolled(before))
    for name in [n for n in batch.output_names if n not in names]:
        batch.drop_output(name)
    for node in reversed(list(batch)):
        if not any(v.users for v in node.results):
            node.erase()
    try:
        on_devices = _cut(batch, parts)
    except InputError as error:
        return "the batch", (f"a batch in {parts} parts", str(error.problems[0].what))
    terms = Evaluation(Algebra(Lemmas())).evaluate(before)
    infinite = {n for n, v in before.params.items() if v in terms and not terms[v].finite}
    parting = Devices().parting(on_devices, {on_devices.params[n] for n in infinite})
    if parting is not None:
        return parting
    for name in names:
        type = on_devices.outputs[name].type
        is_part = any(a.mesh for a in type.axes)
        if is_part == bool(type.unreduced):
            return f"output {name}", ("a part of the batch, or of a sum", str(type))
    return _matched(on_devices, part, names)


def _cut(batch: Graph, parts: int) -> Graph:
    """Return a graph with its inputs split over as many devices as there are parts."""
    set_mesh(batch, Mesh(((PARTS, parts),)))
    for value in batch.inputs.values():
        first, *others = value.type.axes or (None,)
        if first is None or not isinstance(first.size, str):
            raise InputError("an input is no batch", found=str(value))
        value.type = value.type.with_axes((replace(first, mesh=(PARTS,)), *others))
    for node in batch:
        sums = {v.type.unreduced for v in node.operands}
        if node.op.name == "stack" and sums == {(PARTS,)}:
            # No rule of the table, which is of collectives; whether it is right is proved.
            node.result.type = replace(node.result.type, unreduced=(PARTS,))
            continue
        types = node.op.result_types(node.operands, node.attrs)
        for value, type in zip(node.results, types, strict=True):
            value.type = type
    return batch


def _matched(batch: Graph, part: Graph, names: list[str]) -> Parting | None:
    """Return the first node of a micro-batch that no device runs, or None."""
    mesh = mesh_of(batch)
    assert mesh is not None
    classes: dict[Hashable, int] = {}
    of_batch, of_part = dict[Value, int](), dict[Value, int]()
    means: set[int] = set()
    for graph, of in ((batch, of_batch), (part, of_part)):
        for name, value in graph.inputs.items():
            of[value] = classes.setdefault(("input", name, value.type.bare), len(classes))
        for value in graph.params.values():
            weight = value.name if value.weight is None else value.weight
            of[value] = classes.setdefault(("param", weight, value.type.bare), len(classes))
    for node in batch:
        attrs = format_attrs(node.op, local_attrs(node, mesh))
        if _knows_its_place(node):
            attrs += " on a device"
        for value in node.results:
            key = (node.op.name, attrs, value.index, *(of_batch[v] for v in node.operands))
            of_batch[value] = classes.setdefault(key, len(classes))
            if _is_cut_mean(node):
                means.add(of_batch[value])
    raw: dict[Value, int] = {}
    for node in part:
        attrs = format_attrs(node.op, node.attrs)
        share = raw.get(node.operands[0]) if node.operands else None
        if share is not None and node.op.name == "scale" and node.attrs["by"] == 1 / mesh.devices:
            of_part[node.result] = share
            continue
        for value in node.results:
            # The mean over a part, of which a device takes its share, is nothing of the batch.
            operands = [of_part.get(v, -1) for v in node.operands]
            number = classes.get((node.op.name, attrs, value.index, *operands))
            if number is not None and -1 not in operands:
                (raw if number in means else of_part)[value] = number
    for name in names:
        if of_part.get(part.outputs[name]) != of_batch[batch.outputs[name]]:
            return _first_stranger(part.outputs[name], of_part, raw)
    return None


def _is_cut_mean(node: Node) -> bool:
    if node.op.name != "mean":
        return False
    type = node.operands[0].type
    return any(type[name].mesh for name in MeanOp.of_node(node).axes)


def _knows_its_place(node: Node) -> bool:
    """Return whether a device computes otherwise than a graph on its part would."""
    is_cut = any(a.mesh for v in node.results for a in v.type.axes)
    return is_cut and node.op.name in ("join", "positions", "random_uniform", "random_normal")


def _first_stranger(output: Value, of_part: dict[Value, int], raw: dict[Value, int]) -> Parting:
    """Return the first node on the way to an output that stands for nothing of the batch."""
    value = output
    while value.node is not None:
        strange = [v for v in value.node.operands if v not in of_part]
        means = [v.node for v in strange if v in raw and v.node is not None]
        if means:
            return where(means[0]), ("its share of a mean over the batch", "a mean over the part")
        if not strange:
            return where(value.node), ("what a device runs for its part", value.node.op.name)
        value = strange[0]
    return f"%{value.name}", ("an input of the batch", str(value.type))
