"""Every operation of the table, applied to something, so that its traits can be evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from moecc_backends.reference import ReferenceBackend

from moecc.ir import Builder, Graph, Node, Value
from moecc.ir.arrays import Array, Data
from moecc.ir.operation import OPS, OpDef
from moecc.ir.text import parse_attrs
from moecc.ir.traits import Domain
from moecc.types import F32, Axis, TensorType, parse_type, tensor

INPUTS = {
    "x": "f32[seq=4, embed=4]",
    "y": "f32[seq=4, embed=4]",
    "row": "f32[embed=4]",
    "other": "f32[embed=4]",
    "keep": "pred[seq=4, embed=4]",
    "part": "f32[seq=2, embed=4]",
    "keys": "f32[kv_seq=6, embed=4]",
    "values": "f32[kv_seq=6, mlp=2]",
    "decay": "f32[kv_seq=6]",
    "rate": "f32[kv_seq=6, mlp=2]",
    "seen": "pred[seq=4, kv_seq=6]",
    "at": "i32[]",
    "w": "f32[mlp=2, embed=4]",
    "kernel": "f32[mlp=2, embed=4, tap=3]",
    "ids": "i32[seq=4]",
    "far": "i32[kv_seq=6]",
    "table": "f32[vocab=6, embed=4]",
    "cos": "f32[seq=4, half=2]",
    "sin": "f32[seq=4, half=2]",
    "pairs": "f32[seq=4, half=2]",
    "scores": "f32[seq=4, expert=4]",
    "gates": "f32[seq=4, choice=2]",
    "uniform": "f32[seq=4, choice=2]",
    "chosen": "i32[seq=4, choice=2]",
    "counts": "f32[group=2, expert=4]",
    "key": "key[]",
    "small": "i32[seq=4, embed=4]",
    "few": "i32[embed=4]",
}
"""Values by name: element type and axes.  `slots` and `rows` are made of them."""

_CAPACITY = "tokens=seq, experts=4, slots=capacity, minimum=1, groups=2"

USES = {line.partition(" ")[0]: line for line in (
    "scale %x {by=-1.5}",
    'pointwise %x {function="mul(a, tanh(logaddexp(a, 0.0)))"}',
    "cast %x {dtype=f64}",
    "select %keep, %x, %row",
    "mask %x, %keep {fill=-1.0}",
    "equal %small, %few",
    "constant {value=2.0}",
    "rope %ids {axis=half, size=4, scaling=dynamic, original_context=1, factor=2.0}",
    "rotate %pairs, %cos, %sin {axis=half}",
    "causal %ids, %far",
    "same_segment %ids, %far",
    "attention %x, %keys, %values {over=embed, along=kv_seq, scale=0.5}",
    "delta_rule %x, %keys, %values, %decay, %rate, %seen {over=embed, along=kv_seq}",
    "relative_buckets %ids, %far {bidirectional=true, buckets=8, max_distance=6}",
    "signed_buckets %ids, %far {buckets=8, max_distance=6}",
    "alibi %ids, %far {axis=head, size=3}",
    "rename %x {axis=embed, to=width}",
    "split %x {axis=seq, into=(a=2, b=2)}",
    "merge %x {axes=(seq, embed), into=both}",
    "broadcast %row, %x",
    "slice %x {axis=seq, start=1, stop=3}",
    "update_slice %x, %part, %at {axis=seq}",
    "positions %x {axis=seq}",
    "embedding %table, %ids {axis=vocab}",
    "one_hot %ids {into=(vocab=6)}",
    "within_buffer %chosen, %slots, %counts {tokens=seq, parts=4, factor=0.4}",
    "chunk %x {axis=seq, at=1, of=2}",
    "join %x, %y {axis=seq}",
    "contract %x, %w {over=embed}",
    "convolve %x, %kernel {over=embed, along=seq, taps=tap, stride=2, padding=1}",
    f"assign_slots %chosen {{{_CAPACITY}, capacity_factor=1.0}}",
    f"expert_choice %scores {{{_CAPACITY}, capacity_factor=1.5}}",
    "dispatch %x, %chosen, %slots",
    "combine %rows, %chosen, %slots, %gates",
    "dispatch_gates %gates, %chosen, %slots",
    "weight_rows %rows, %row_gates",
    "combine_weighted %rows, %chosen, %slots",
    "group_sum %x, %slots",
    "fold_key %key {by=3}",
    "random_uniform %key, %x",
    "random_normal %key, %x",
    "sum %x {axes=embed}",
    "mean %x {axes=embed}",
    "max %x {axes=embed}",
    "logsumexp %x {axes=embed}",
    "softmax %x {axis=embed}",
    "rms_norm %x, %row {axis=embed}",
    "layer_norm %x, %row, %other {axis=embed}",
    "stack %x, %y {axis=layer}",
    "index %x {axis=seq, at=1}",
    "scan %row, %x {over=(seq=4), carries=1, stacked=1}",
    "route %scores {top_k=2}",
    "keep_choices %gates, %uniform {policy=random, threshold=0.8}",
    "hash_experts %ids {experts=4, top_k=2}",
    'reshard %x {to="embed@data"}',
    "shard %x {axis=seq, mesh=data}",
    "all_gather %x {axis=seq, mesh=data}",
    "all_reduce %x {mesh=data}",
    "reduce_scatter %x {axis=seq, mesh=data}",
    "all_to_all %x {mesh=data, split=embed, gather=seq}",
    "ragged_all_to_all %ragged {mesh=data, split=expert, gather=group}",
)}  # fmt: skip
"""Operands and attributes; what is not named takes `x`, or `x` and `row`."""

ON_MESH: dict[str, Mapping[str, Any]] = {
    "rope": {"scaling": "default"},
    "chunk": {"parts": 2},
    "join": {"parts": 2},
    "within_buffer": {"blocks": 2},
}
"""Other attributes, with which an operation may run on shards of its first axis."""

_SPLIT = "f32[seq@data=4, embed=4]"
_UNREDUCED = "f32[seq=4, embed=4] unreduced(data)"
LIES = {
    "all_gather": _SPLIT,
    "all_to_all": _SPLIT,
    "all_reduce": _UNREDUCED,
    "reduce_scatter": _UNREDUCED,
}
"""The type of the operand of a collective."""


def read_line(line: str) -> tuple[str, list[str], dict[str, Any]]:
    """Return operation, operands and attributes of a line such as ``softmax %x {axis=seq}``."""
    head, brace, attrs = line.partition("{")
    op, *operands = (word.strip("%,") for word in head.split())
    return op, operands, parse_attrs(OPS[op], brace + attrs)


def _body() -> Graph:
    """Return a body whose carry is multiplied by each part of what is stacked."""
    body = Graph("body")
    type = tensor(F32, embed=4)
    made = Builder(body).mul(body.input("carry", type), body.input("one", type))
    body.set_output("carry", made)
    body.set_output("made", made)
    return body


def _together(split: str) -> tuple[str, ...]:
    """Return the axes that lie split where `split` does: a device counts what it exchanges."""
    return ("seq", "group") if split == "seq" else (split,)


def applied(entry: OpDef, split: str = "", *, on_mesh: bool = False) -> Node:
    """Return a node of `entry` in a graph of its own.

    Args:
      entry: the row, of an operation that has a meaning.
      split: the axis of its operands that lies on a mesh of two devices; empty for none.
      on_mesh: whether it is the whole of what is split elsewhere.

    Raises:
      InputError: the operation does not take operands that lie so.
    """
    graph = Graph(attrs={"mesh": {"data": 2 if split else 1}})
    plain = " ".join((entry.name, "%x", "%row")[: 1 + len(entry.operands)])
    _, names, attrs = read_line(USES.get(entry.name, plain))
    if entry.name == "scan":
        attrs["body"] = _body()
    if split or on_mesh:
        attrs |= ON_MESH.get(entry.name, {})
    values, wanted = {}, set(names)
    wanted |= {"x", "chosen"} if wanted & {"slots", "rows", "ragged"} else set()
    wanted |= {"gates"} if "row_gates" in wanted else set()
    for name, text in INPUTS.items():
        if name not in wanted:
            continue
        type = parse_type(LIES.get(entry.name, text) if name == "x" else text, graph.value)
        axes = (Axis(a.name, a.size, ("data",)) if a.name in _together(split) else a for a in type)
        values[name] = graph.input(name, type.with_axes(axes) if split else type)
    b = Builder(graph)
    if wanted & {"slots", "rows"}:
        _, _, bounds = read_line(USES["assign_slots"])
        values["slots"] = b.assign_slots(values["chosen"], **bounds | {"capacity_factor": 2.0})
        if "rows" in wanted:
            values["rows"] = b.dispatch(values["x"], values["chosen"], values["slots"])
        if "row_gates" in wanted:
            values["row_gates"] = b.dispatch_gates(
                values["gates"], values["chosen"], values["slots"]
            )
    if names == ["ragged"]:
        slots = b.assign_slots(values["chosen"], tokens=("seq",), experts=4, groups=2)
        rows = b.dispatch(values["x"], values["chosen"], slots)
        values["ragged"] = b.shard(rows, axis="group", mesh=("data",))
    return graph.append(entry, [values[n] for n in names], attrs)


@dataclass(frozen=True)
class Function:
    """The meaning of an operation, as a function of the arrays of its operands."""

    node: Node

    @property
    def op(self) -> OpDef:
        """The row of the operation."""
        return self.node.op

    @property
    def types(self) -> list[TensorType]:
        """The types of the operands."""
        return [v.type for v in self.node.operands]

    def draw(self, seed: int) -> list[Array]:
        """Draw operands for which the operation has a meaning, far from ties and kinks."""
        program = ReferenceBackend().compile(self.node.graph)
        arrays = dict(program.trace({}, self.inputs(seed)))
        return [arrays[v] for v in self.node.operands]

    def inputs(self, seed: int) -> dict[str, Data]:
        """Draw the inputs of its graph."""
        rng = np.random.default_rng(seed)
        return {n: self._data(v, rng) for n, v in self.node.graph.inputs.items()}

    def _data(self, value: Value, rng: np.random.Generator) -> Data:
        shape = value.type.shape
        if value.type.dtype.kind == "float":
            drawn = rng.uniform(0.4, 2.0, shape)
            if value.name == "counts":
                return rng.integers(1, 4, shape).astype(np.float64)
            positive = OPS[self.op.name].domain is Domain.POSITIVE
            return drawn if positive else drawn * rng.choice([-1.0, 1.0], shape)
        if value.type.dtype.kind == "bool":
            return rng.random(shape) < 0.5
        if value.type.dtype.kind == "key":
            return rng.integers(0, 2**60, shape, dtype=np.uint64)
        if value.name == "chosen":
            return np.argsort(rng.random((4, 4)), axis=1)[:, :2].astype(np.int64)
        return rng.integers(0, 2 if "embed" in value.type else 5, shape).astype(np.int64)

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the results."""
        with np.errstate(all="ignore"):
            return list(self.op.evaluate(arrays, self.node.attrs))

    def floats(self, arrays: Sequence[Array]) -> Data:
        """Return the elements of all floating-point results, one after the other."""
        pairs = zip(self(arrays), self.node.results, strict=True)
        data = [a.to(v.type.names).ravel() for a, v in pairs if v.type.dtype.is_float]
        return np.concatenate(data) if data else np.zeros(0)


@cache
def meaning(name: str) -> Function:
    """Return the meaning of the operation `name` as the table has it."""
    return Function(applied(OPS[name]))


def sample(name: str) -> Node:
    """Return a node of the operation `name` as the table has it."""
    return meaning(name).node
