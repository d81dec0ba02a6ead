"""Proofs that the graph of a micro-batch computes its part of the results of the batch.

A batch in p parts is a batch on a mesh of p devices, each with one part: it is proved, as for any
mesh, that devices compute rows of the results of the batch, and summands of its losses.  Then the
graph of a micro-batch is proved to compute what a device does, for any values of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.mesh import Mesh, mesh_of, set_mesh
from moecc.ir.structure import clone
from moecc.ir.unroll import unrolled
from moecc.prove.evaluation import Evaluation
from moecc.prove.localisation import first_difference
from moecc.prove.mesh import Devices, MisplacedError, Parting, of_device
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
    return max(counts[1], 1) if is_part and isinstance(counts[1], int) else 1


@dataclass
class PartProof:
    """A proof that a graph computes a part of the results of a batch.

    Attributes:
      batch: the graph of the batch, laid on as many devices as there are parts.
      outputs: the names of the outputs that are compared.
      parting: where the proof fails, or None.
      lemmas: those of the values of both graphs, with a record of their uses.
      evaluation: of both graphs.
      devices: the proof that devices compute the values of the batch.
    """

    batch: Graph
    outputs: tuple[str, ...]
    parting: Parting | None = None
    lemmas: Lemmas = field(default_factory=Lemmas)
    devices: Devices = field(default_factory=Devices)

    def __post_init__(self) -> None:
        self.evaluation = Evaluation(Algebra(self.lemmas))


def prove_part(before: Graph, after: Graph, parts: int) -> PartProof:
    """Prove that the graph of a micro-batch computes its part of a batch, or say where it does not.

    Args:
      before: the graph of a batch.
      after: the graph of a micro-batch.
      parts: how many micro-batches there are.
    """
    names = tuple(n for n in after.outputs if n in before.outputs)
    batch = clone(unrolled(before))
    for name in [n for n in batch.output_names if n not in names]:
        batch.drop_output(name)
    for node in reversed(list(batch)):
        if not any(v.users for v in node.results):
            node.erase()
    proof = PartProof(batch, names)
    try:
        proof.parting = _parting(proof, before, after, parts)
    except MisplacedError as error:
        proof.parting = "the batch", (f"a batch in {parts} parts", str(error))
    return proof


def _parting(proof: PartProof, before: Graph, after: Graph, parts: int) -> Parting | None:
    batch, evaluation = proof.batch, proof.evaluation
    if not proof.outputs:
        return "outputs", (", ".join(before.outputs), ", ".join(after.outputs))
    try:
        _cut(batch, parts)
    except InputError as error:
        return "the batch", (f"a batch in {parts} parts", str(error.problems[0].message))
    values = evaluation.evaluate(before)
    infinite = {n for n, v in before.params.items() if v in values and not values[v].finite}
    parting = proof.devices.parting(batch, {batch.params[n] for n in infinite})
    if parting is not None:
        return parting
    for name in proof.outputs:
        type = batch.outputs[name].type
        is_part = any(a.mesh for a in type.axes)
        if is_part == bool(type.unreduced):
            return f"output {name}", ("a part of the batch, or of a sum", str(type))
    inputs = [", ".join(f"{n}: {v.type.bare}" for n, v in g.inputs.items()) for g in (batch, after)]
    if inputs[0] != inputs[1]:
        return "inputs", (inputs[0], inputs[1])
    shards = of_device(evaluation, batch)
    part = unrolled(after)
    terms = evaluation.evaluate(part)
    for name in proof.outputs:
        ends = batch.outputs[name], part.outputs[name]
        shard, tensor = shards[ends[0]], terms[ends[1]]
        if shard.axes != tensor.axes or shard.body is not tensor.body:
            return first_difference(name, ends, shards, terms)
    return None


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
