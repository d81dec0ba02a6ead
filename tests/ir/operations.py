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
from moecc.ir.traits import Domain
from moecc.types import DTYPES, Axis, TensorType

INPUTS = {
    "x": "f32 seq=4 embed=4",
    "y": "f32 seq=4 embed=4",
    "row": "f32 embed=4",
    "other": "f32 embed=4",
    "keep": "pred seq=4 embed=4",
    "part": "f32 seq=2 embed=4",
    "keys": "f32 kv_seq=6 embed=4",
    "values": "f32 kv_seq=6 mlp=2",
    "decay": "f32 kv_seq=6",
    "rate": "f32 kv_seq=6 mlp=2",
    "seen": "pred seq=4 kv_seq=6",
    "at": "i32",
    "w": "f32 mlp=2 embed=4",
    "kernel": "f32 mlp=2 embed=4 tap=3",
    "ids": "i32 seq=4",
    "far": "i32 kv_seq=6",
    "table": "f32 vocab=6 embed=4",
    "cos": "f32 seq=4 half=2",
    "sin": "f32 seq=4 half=2",
    "pairs": "f32 seq=4 half=2",
    "scores": "f32 seq=4 expert=4",
    "gates": "f32 seq=4 choice=2",
    "uniform": "f32 seq=4 choice=2",
    "chosen": "i32 seq=4 choice=2",
    "counts": "f32 group=2 expert=4",
    "key": "key",
    "small": "i32 seq=4 embed=4",
    "few": "i32 embed=4",
}
"""Values by name: element type and axes.  `slots` and `rows` are made of them."""

_SEQ = {"axis": "seq"}
_CAPACITY = {"tokens": ("seq",), "experts": 4, "slots": "capacity", "minimum": 1, "groups": 2}
_MESH = {"mesh": ("data",)}


def _body() -> Graph:
    """Return a body whose carry is multiplied by each part of what is stacked."""
    body = Graph("body")
    type = TensorType(DTYPES["f32"], (Axis("embed", 4),))
    made = Builder(body).mul(body.input("carry", type), body.input("one", type))
    body.set_output("carry", made)
    body.set_output("made", made)
    return body


USES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "scale": ("x", {"by": -1.5}),
    "pointwise": ("x", {"function": "mul(a, tanh(logaddexp(a, 0.0)))"}),
    "cast": ("x", {"dtype": "f64"}),
    "select": ("keep x row", {}),
    "mask": ("x keep", {"fill": -1.0}),
    "equal": ("small few", {}),
    "constant": ("", {"value": 2.0}),
    "rope": ("ids", {"axis": "half", "size": 4, "scaling": "dynamic", "original_context": 1,
                     "factor": 2.0}),
    "rotate": ("pairs cos sin", {"axis": "half"}),
    "causal": ("ids far", {}),
    "same_segment": ("ids far", {}),
    "attention": ("x keys values", {"over": "embed", "along": "kv_seq", "scale": 0.5}),
    "delta_rule": ("x keys values decay rate seen", {"over": "embed", "along": "kv_seq"}),
    "relative_buckets": ("ids far", {"bidirectional": True, "buckets": 8, "max_distance": 6}),
    "signed_buckets": ("ids far", {"buckets": 8, "max_distance": 6}),
    "alibi": ("ids far", {"axis": "head", "size": 3}),
    "rename": ("x", {"axis": "embed", "to": "width"}),
    "split": ("x", {**_SEQ, "into": (("a", 2), ("b", 2))}),
    "merge": ("x", {"axes": ("seq", "embed"), "into": "both"}),
    "broadcast": ("row x", {}),
    "slice": ("x", {**_SEQ, "start": 1, "stop": 3}),
    "update_slice": ("x part at", _SEQ),
    "positions": ("x", _SEQ),
    "embedding": ("table ids", {"axis": "vocab"}),
    "one_hot": ("ids", {"into": (("vocab", 6),)}),
    "within_buffer": ("chosen slots counts", {"tokens": ("seq",), "parts": 4, "factor": 0.4}),
    "chunk": ("x", {**_SEQ, "at": 1, "of": 2}),
    "join": ("x y", _SEQ),
    "contract": ("x w", {"over": ("embed",)}),
    "convolve": ("x kernel", {"over": ("embed",), "along": ("seq",), "taps": ("tap",),
                              "stride": 2, "padding": 1}),
    "assign_slots": ("chosen", {**_CAPACITY, "capacity_factor": 1.0}),
    "expert_choice": ("scores", {**_CAPACITY, "capacity_factor": 1.5}),
    "dispatch": ("x chosen slots", {}),
    "combine": ("rows chosen slots gates", {}),
    "dispatch_gates": ("gates chosen slots", {}),
    "weight_rows": ("rows row_gates", {}),
    "combine_weighted": ("rows chosen slots", {}),
    "group_sum": ("x slots", {}),
    "fold_key": ("key", {"by": 3}),
    "random_uniform": ("key x", {}),
    "random_normal": ("key x", {}),
    "sum": ("x", {"axes": ("embed",)}),
    "mean": ("x", {"axes": ("embed",)}),
    "max": ("x", {"axes": ("embed",)}),
    "logsumexp": ("x", {"axes": ("embed",)}),
    "softmax": ("x", {"axis": "embed"}),
    "rms_norm": ("x row", {"axis": "embed"}),
    "layer_norm": ("x row other", {"axis": "embed"}),
    "stack": ("x y", {"axis": "layer"}),
    "index": ("x", {**_SEQ, "at": 1}),
    "scan": ("row x", {"over": (("seq", 4),), "carries": 1, "stacked": 1, "body": _body()}),
    "route": ("scores", {"top_k": 2}),
    "keep_choices": ("gates uniform", {"policy": "random", "threshold": 0.8}),
    "hash_experts": ("ids", {"experts": 4, "top_k": 2}),
    "reshard": ("x", {"to": "embed@data"}),
    "shard": ("x", {**_SEQ, **_MESH}),
    "all_gather": ("x", {**_SEQ, **_MESH}),
    "all_reduce": ("x", _MESH),
    "reduce_scatter": ("x", {**_SEQ, **_MESH}),
    "all_to_all": ("x", {**_MESH, "split": "embed", "gather": "seq"}),
    "ragged_all_to_all": ("ragged", {**_MESH, "split": "expert", "gather": "group"}),
}  # fmt: skip
"""Operands and attributes; what is not named takes `x`, or `x` and `row`."""

ON_MESH: dict[str, Mapping[str, Any]] = {
    "rope": {"scaling": "default"},
    "chunk": {"parts": 2},
    "join": {"parts": 2},
    "within_buffer": {"blocks": 2},
}
"""Other attributes, with which an operation may run on shards of its first axis."""

LIES: dict[str, TensorType] = {}
"""Where the operand of a collective lies, by the collective."""


def _lies(axes: tuple[Axis, ...], *unreduced: str) -> TensorType:
    return TensorType(DTYPES["f32"], axes, unreduced)


_SPLIT = (Axis("seq", 4, ("data",)), Axis("embed", 4))
LIES["all_gather"] = LIES["all_to_all"] = _lies(_SPLIT)
LIES["all_reduce"] = LIES["reduce_scatter"] = _lies((Axis("seq", 4), Axis("embed", 4)), "data")


def _type(text: str) -> TensorType:
    dtype, *axes = text.split()
    pairs = (axis.split("=") for axis in axes)
    return TensorType(DTYPES[dtype], tuple(Axis(n, int(s)) for n, s in pairs))


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
    names, attrs = USES.get(entry.name, (" ".join(("x", "row")[: len(entry.operands)]), {}))
    if split or on_mesh:
        attrs = {**attrs, **ON_MESH.get(entry.name, {})}
    values = {}
    wanted = set(names.split())
    wanted |= {"x", "chosen"} if wanted & {"slots", "rows", "ragged"} else set()
    wanted |= {"gates"} if "row_gates" in wanted else set()
    for name, text in INPUTS.items():
        if name not in wanted:
            continue
        type = LIES.get(entry.name, _type(text)) if name == "x" else _type(text)
        axes = (Axis(a.name, a.size, ("data",)) if a.name in _together(split) else a for a in type)
        values[name] = graph.input(name, type.with_axes(axes) if split else type)
    b = Builder(graph)
    if wanted & {"slots", "rows"}:
        values["slots"] = b.assign_slots(values["chosen"], **_CAPACITY, capacity_factor=2.0)
        if "rows" in wanted:
            values["rows"] = b.dispatch(values["x"], values["chosen"], values["slots"])
        if "row_gates" in wanted:
            given = (values[n] for n in ("gates", "chosen", "slots"))
            values["row_gates"] = b.dispatch_gates(*given)
    if names == "ragged":
        slots = b.assign_slots(values["chosen"], tokens=("seq",), experts=4, groups=2)
        rows = b.dispatch(values["x"], values["chosen"], slots)
        values["ragged"] = b.shard(rows, axis="group", mesh=("data",))
    return graph.append(entry, [values[n] for n in names.split()], attrs)


@cache
def sample(name: str) -> Node:
    """Return a node of the operation `name` as the table has it."""
    return applied(OPS[name])


@dataclass(frozen=True)
class Function:
    """The meaning of an operation, as a function of the arrays of its operands."""

    node: Node

    @property
    def types(self) -> list[TensorType]:
        """The types of the operands."""
        return [v.type for v in self.node.operands]

    def draw(self, seed: int) -> list[Array]:
        """Draw operands for which the operation has a meaning, far from ties and kinks."""
        graph, given = self.node.graph, self.inputs(seed)
        graph_values = ReferenceBackend().compile(graph).trace({}, given)
        arrays = dict(graph_values)
        return [arrays[v] if v in arrays else self._given(v, given) for v in self.node.operands]

    def inputs(self, seed: int) -> dict[str, Data]:
        """Draw the inputs of its graph."""
        rng = np.random.default_rng(seed)
        return {n: self._data(v, rng) for n, v in self.node.graph.inputs.items()}

    def _given(self, value: Value, given: Mapping[str, Data]) -> Array:
        return Array(given[value.name], value.type.names, value.type.dtype)

    def _data(self, value: Value, rng: np.random.Generator) -> Data:
        shape = tuple(int(str(s)) for s in value.type.sizes)
        if value.type.dtype.kind == "float":
            drawn = rng.uniform(0.4, 2.0, shape)
            if value.name == "counts":
                return rng.integers(1, 4, shape).astype(np.float64)
            positive = OPS[self.node.op.name].domain is Domain.POSITIVE
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
            return list(self.node.op.evaluate(arrays, self.node.attrs))

    def floats(self, arrays: Sequence[Array]) -> Data:
        """Return the elements of all floating-point results, one after the other."""
        pairs = zip(self(arrays), self.node.results, strict=True)
        data = [a.to(v.type.names).ravel() for a, v in pairs if v.type.dtype.is_float]
        return np.concatenate(data) if data else np.zeros(0)
