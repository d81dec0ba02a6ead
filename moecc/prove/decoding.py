"""Proofs that a decoding step with caches computes rows of the graph of the full text.

The steps are those of one text.  A step takes the tokens from `start` on and caches with the keys
and values of all positions before; it returns the rows of the full graph from `start` on, and
caches with their keys and values, too.  That is proved of one step, whatever `start` is, and so
holds for all steps by induction.

Nodes of both graphs are matched one by one.  Of each value of the step it is derived how it agrees
with its value w of the full graph, of which the axis of tokens is t and that of keys is k:

* fixed: it is w.
* row: at s it is w at t = start + s.
* new: at s of the axis of keys it is w at k = start + s.
* key: at k it is w at k, for every k below start + S, the end of the new tokens.
* pair: at s and k it is w at t = start + s and k, for every k below the end.
* slots, rows: for every choice of a token, what its slot holds is what it holds in w.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.operation import OPS
from moecc.ir.ops.axes import PositionsOp
from moecc.ir.ops.slots import AssignSlotsOp
from moecc.ir.text import format_attrs
from moecc.ir.unroll import unrolled

Kind = Literal["fixed", "row", "new", "key", "pair", "slots", "rows"]
Hidden = Literal["", "infinite", "zero"]
"""What a pair has, in both graphs, where the key is after the token: anything, −∞, or 0."""

ASSUMPTIONS = (
    "caches hold the keys and values of all positions before `start`, and have room for the new",
    "`positions` are start, start + 1 …, and `key_positions` 0, 1, 2 …",
    "every value is finite, but for what a mask hides",
    "arithmetic is that of real numbers",
    "no integer wraps around",
)

TOKENS, START, POSITIONS, KEY_POSITIONS, CACHE = (
    "tokens", "start", "positions", "key_positions", "cache.",
)  # fmt: skip
_PLACES = frozenset({"positions", "random_uniform", "random_normal"})
"""Operations whose results depend on places alone, of which a step has others."""
ROWS = frozenset({"group", "expert", "slot"})


class Agreement(NamedTuple):
    """The relation of a value of a step to a value of the full graph.

    Attributes:
      full: the class of the value of the full graph.
      kind: how the two agree.
      hidden: the elements of pairs whose key is after the token.
    """

    full: int
    kind: Kind
    hidden: Hidden = ""


class NotContinuedError(Exception):
    """A node of a step has no known agreement with the full graph; the message says why."""


def is_step(before: Graph, after: Graph) -> bool:
    """Return whether the second graph continues texts, and the first does not."""
    is_new = all(n in after.inputs and n not in before.inputs for n in (START, KEY_POSITIONS))
    return is_new and all(TOKENS in graph.inputs for graph in (before, after))


def step_gap(before: Graph, after: Graph) -> tuple[str, tuple[str, str]] | None:
    """Return where a step is not proved to compute rows of the full graph, or None."""
    step = unrolled(after)
    proof = _StepProof(_Classes(unrolled(before)), step)
    for node in step:
        try:
            proof.add(node)
        except NotContinuedError as error:
            return where(node), ("a row of the full graph", str(error))
    return proof.output_gap()


class _Classes:
    """The values of the full graph in classes: equal operations on equal values are one class.

    Attributes:
      of: the class of each value.
      ids: the class of each key of values.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.of: dict[Value, int] = {}
        self.ids: dict[Hashable, int] = {}
        for name, value in graph.inputs.items():
            self.of[value] = self._class(("input", name))
        for value in graph.params.values():
            self.of[value] = self._class(self.parameter_key(value))
        for node in graph:
            operands = [self.of[v] for v in node.operands]
            for value in node.results:
                self.of[value] = self._class(self.key(node, operands, value.index))

    def _class(self, key: Hashable) -> int:
        return self.ids.setdefault(key, len(self.ids))

    def positions(self, axis: str) -> int | None:
        """Return the class of positions along an axis."""
        return self.ids.get(("positions", axis))

    def key_positions(self, axis: str, to: str) -> int | None:
        """Return the class of positions along an axis that is renamed."""
        text = format_attrs(OPS["rename"], {"axis": axis, "to": to})
        return self.ids.get(("rename", text, 0, self.positions(axis)))

    @staticmethod
    def parameter_key(value: Value) -> Hashable:
        """Return the key of a parameter in any graph: its weight, or its name."""
        return "param", value.weight if value.weight is not None else value.name, value.type

    @staticmethod
    def key(node: Node, operands: Collection[int], index: int) -> Hashable:
        """Return the key of a result."""
        if node.op.name == "positions":
            return "positions", PositionsOp.of_node(node).axis
        body = format_attrs(node.op, node.attrs)
        return node.op.name, body, index, *operands


@dataclass
class _StepProof:
    """The agreements of a step, value by value.

    Attributes:
      classes: the values of the full graph.
      step: the step, its layers written out.
      agreements: of each value with one of the full graph.
      caches: what each cache becomes, and the class that it holds.
    """

    classes: _Classes
    step: Graph
    agreements: dict[Value, Agreement] = field(default_factory=dict)
    caches: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens: str = self.step.inputs[TOKENS].type.names[-1]
        self.keys: str = self.step.inputs[KEY_POSITIONS].type.names[-1]
        full_classes: dict[str, tuple[int | None, Kind]] = {
            TOKENS: (self.classes.ids.get(("input", TOKENS)), "row"),
            POSITIONS: (self.classes.positions(self.tokens), "row"),
            KEY_POSITIONS: (self.classes.key_positions(self.tokens, self.keys), "key"),
        }
        for name, (full, kind) in full_classes.items():
            if name in self.step.inputs and full is not None:
                self.agreements[self.step.inputs[name]] = Agreement(full, kind)
        for value in self.step.params.values():
            full = self.classes.ids.get(self.classes.parameter_key(value))
            if full is not None:
                self.agreements[value] = Agreement(full, "fixed")

    def add(self, node: Node) -> None:
        """Derive how the results of a node agree.

        Raises:
          NotContinuedError: it is not known that they do.
        """
        if node.op.name == "update_slice":
            self._add_cache(node)
            return
        missing = [v for v in node.operands if v not in self.agreements]
        if missing:
            raise NotContinuedError(f"nothing is known of %{missing[0].name}")
        operands = [self.agreements[v] for v in node.operands]
        kind, hidden = self._kind(node, operands)
        for value in node.results:
            key = self.classes.key(node, [a.full for a in operands], value.index)
            full = self.classes.ids.get(key)
            if full is None:
                raise NotContinuedError(f"the full graph has no such {node.op.name}")
            self.agreements[value] = Agreement(full, kind, hidden)

    def _add_cache(self, node: Node) -> None:
        """Keys before `start`, and the new ones from there on, are all keys before the end."""
        cache, new, start = node.operands
        agreement = self.agreements.get(new)
        inputs = {v: n for n, v in self.step.inputs.items()}
        name = inputs.get(cache, "")
        is_cache = name.startswith(CACHE) and name not in self.caches and len(cache.users) == 1
        if not is_cache or inputs.get(start) != START or agreement is None:
            raise NotContinuedError("no cache of new keys")
        if agreement.kind != "new" or node.attrs["axis"] != self.keys:
            raise NotContinuedError("what is written into the cache is no new key")
        self.caches[name] = node.result
        self.agreements[node.result] = Agreement(agreement.full, "key")

    def output_gap(self) -> tuple[str, tuple[str, str]] | None:
        """Return an output that is no row of the full graph, and no cache; None if all are."""
        for name, value in self.step.outputs.items():
            if name.startswith(CACHE):
                if self.caches.get(name) is not value:
                    return f"output {name}", ("what the cache becomes", f"%{value.name}")
                continue
            full = self.classes.graph.outputs.get(name)
            expected = None if full is None else self.classes.of[full]
            agreement = self.agreements.get(value)
            if agreement is None or agreement[:2] != (expected, "row"):
                return f"output {name}", ("rows of the full output", f"%{value.name}")
        if not self.step.outputs.keys() & self.classes.graph.outputs.keys():
            return "outputs", ("a row of an output of the full graph", "caches alone")
        missing = self.caches.keys() - self.step.outputs.keys()
        unused = {n for n in self.step.inputs if n.startswith(CACHE)} - self.caches.keys()
        for name in sorted(missing | unused):
            return f"output {name}", ("a cache that is continued", "none")
        return None

    # How results agree.

    def _kind(self, node: Node, operands: list[Agreement]) -> tuple[Kind, Hidden]:
        kinds = {a.kind for a in operands}
        mixed = set(node.mixes)
        if node.body is not None or node.op.opaque or node.op.name in _PLACES:
            raise NotContinuedError(f"{node.op.name} is no operation on rows")
        if node.op.source is not None and not node.op.elementwise:
            # Which axes it mixes is its author's word.
            raise NotContinuedError(
                f"{node.op.name} is an operation of the user's own, and not elementwise"
            )
        if kinds <= {"fixed"}:
            return "fixed", ""
        if node.op.assigns_slots or node.op.moves is not None:
            return self._kind_of_slots(node, operands)
        if "slots" in kinds:
            raise NotContinuedError(f"{node.op.name} of slots")
        if "rows" in kinds:
            if not kinds <= {"fixed", "rows"} or mixed & ROWS:
                raise NotContinuedError(f"{node.op.name} mixes rows")
            return "rows", ""
        if self.keys in mixed:
            return self._reduced(node, operands)
        if node.op.name == "rename" and self.tokens in mixed | {node.attrs["axis"]}:
            is_key = kinds == {"row"} and node.attrs["to"] == self.keys
            if not is_key:
                raise NotContinuedError("tokens are renamed, and not to keys")
            return "new", ""
        if self.tokens in mixed or not self._keeps_axes(node, operands):
            raise NotContinuedError(f"{node.op.name} mixes tokens, or keys")
        names = {n for v in node.results for n in v.type.names}
        if "new" in kinds:
            if not kinds <= {"fixed", "new"}:
                raise NotContinuedError("new keys meet others before they are in the cache")
            return "new", ""
        if self.keys not in names:
            return "row", ""
        if self.tokens not in names:
            return "key", ""
        return "pair", self._hidden(node, operands)

    def _keeps_axes(self, node: Node, operands: list[Agreement]) -> bool:
        """Return whether every result has the axes of tokens and of keys that operands have."""
        axes = {n for v in node.operands for n in v.type.names} & {self.tokens, self.keys}
        return all(axes <= set(v.type.names) for v in node.results)

    def _hidden(self, node: Node, operands: list[Agreement]) -> Hidden:
        """Return the elements of a result whose key is after the token."""
        states, name = [a.hidden for a in operands], node.op.name
        if name == "causal":
            query, key = (a.full for a in operands)
            is_causal = query == self.classes.positions(self.tokens)
            is_of_keys = key == self.classes.key_positions(self.tokens, self.keys)
            return "zero" if is_causal and is_of_keys else ""
        if name == "mask" and node.attrs["fill"] == -inf:
            return "infinite" if states[1] == "zero" or states[0] == "infinite" else ""
        if node.op.carries and node.op.source is None:
            if states[0] != "infinite" or node.op.keeps_hidden(node.attrs):
                return states[0]
        elif name == "mul" and "zero" in states and "infinite" not in states:
            return "zero"
        if "infinite" in states:
            # It may be ∞, or no number, of which nothing below is so.
            raise NotContinuedError(f"{name} of what a mask hides")
        return ""

    def _reduced(self, node: Node, operands: list[Agreement]) -> tuple[Kind, Hidden]:
        """Return the kind of a value that has read all keys, hidden ones included."""
        states, name = [a.hidden for a in operands], node.op.name
        if name == "softmax" and states == ["infinite"]:
            return "pair", "zero"
        is_whole = self.tokens in node.result.type.names and self.tokens not in node.mixes
        if name in ("max", "logsumexp") and states == ["infinite"] and is_whole:
            return "row", ""
        if node.op.recurs and states[-1] == "zero" and is_whole:
            # A state that no hidden key changes; the keys are in the order of the full graph.
            query, *keys, seen = (a.kind for a in operands)
            if query == "row" and set(keys) == {"key"} and seen == "pair":
                return "row", ""
        is_of_keys = {a.kind for a in operands} <= {"pair", "key"}
        is_hidden = "zero" in states and "infinite" not in states
        if name == "contract" and is_hidden and is_of_keys and is_whole:
            return "row", ""
        raise NotContinuedError(f"{name} reads keys that come after a token")

    def _kind_of_slots(self, node: Node, operands: list[Agreement]) -> tuple[Kind, Hidden]:
        """Return the kind of slots and rows, where every choice has a slot of its own."""
        kinds, name = [a.kind for a in operands], node.op.name
        match name:
            case "assign_slots":
                slots = AssignSlotsOp.of_node(node)
                is_dropless = slots.slots == "ragged" and not slots.using
                if is_dropless and kinds == ["row"] and self.tokens in slots.tokens:
                    return "slots", ""
            case "dispatch" | "dispatch_gates":
                if kinds == ["row", "row", "slots"]:
                    return "rows", ""
            case "combine" | "combine_weighted":
                if kinds[:3] == ["rows", "row", "slots"] and set(kinds[3:]) <= {"row"}:
                    return "row", ""
        raise NotContinuedError(f"{name} of slots that may be dropped")
