"""Fold equal layers into one scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.structure import copied
from moecc.ir.table.repetition import stacked
from moecc.rewrite import P, fits
from moecc.types.ranges import joined
from moecc.types.tensor import Axis
from moecc.weights.movement import Stack
from moecc_passes.roll_layers.cuts import Cuts
from moecc_passes.roll_layers.wiring import CannotRoll, Each, Wiring

ORIGIN = "roll-layers/fold"

AXIS = "layer"
"""The name of the axis of repetitions, with a number if a value has an axis of that name."""


@dataclass(frozen=True)
class Keeping:
    """What a scan keeps of a layer for the gradient.

    Attributes:
      remat: as of the ``scan``.
      save: as of the ``scan``.
      split: a mesh axis along which the values carried between iterations are sharded, or None.
    """

    remat: str = "none"
    save: tuple[str, ...] = ()
    split: str | None = None


@dataclass
class Fold:
    """Folds layers into a scan.

    Attributes:
      graph: their graph.
      wiring: the layers, and what flows in and out.
      name: the location of the scan.
      axis: the axis along which parameters and results are stacked.
      merged: the new parameters, by the parameters that they replace.
    """

    graph: Graph
    wiring: Wiring
    name: str
    axis: Axis = field(init=False)
    merged: dict[Each, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = [v for b in self.wiring.blocks for n in b for v in (*n.operands, *n.results)]
        taken = {name for v in values for name in v.type.names}
        free = (n for n in (AXIS, *(f"{AXIS}{i}" for i in range(2, 99))) if n not in taken)
        self.axis = Axis(next(free), len(self.wiring.blocks))

    def run(self, keeping: Keeping) -> Node:
        """Replace the layers by a scan, and return it.

        Raises:
          InputError: the locations of the layers are not a range, or a node is not allowed
            in a body; nothing is changed.
        """
        wiring, first = self.wiring, self.wiring.blocks[0][0]
        cuts = Cuts(self.graph, keeping.split, self.name)
        body = self.body(self.locations(), cuts)
        along = [*map(self.param, wiring.params), *(self.stack(e, first) for e in wiring.stacked)]
        scan = self.graph.append(
            "scan",
            [
                *(cuts.cut(e[0], self.graph, first) for e in wiring.carries),
                *along,
                *(e[0] for e in wiring.captured),
            ],
            {
                "over": ((self.axis.name, self.axis.size),),
                "carries": len(wiring.carries),
                "stacked": len(along),
                "remat": keeping.remat,
                "save": keeping.save,
                "body": body,
            },
            names=body.output_names,
            loc=self.name,
            origin=ORIGIN,
            before=first,
        )
        self.connect(self.whole(scan, cuts, first), first)
        for block in reversed(wiring.blocks):
            for node in reversed(block):
                node.erase()
        self.order()
        return scan

    def locations(self) -> list[str]:
        """Return the location of each node of the body, which stands for that of every layer."""
        found = []
        for nodes in zip(*self.wiring.blocks, strict=True):
            loc = joined([node.loc for node in nodes])
            if loc is None:
                raise CannotRoll(
                    "the numbers of the layers do not rise in equal steps",
                    found=", ".join(node.loc for node in nodes),
                )
            found.append(loc)
        return found

    def body(self, locs: Sequence[str], cuts: Cuts) -> Graph:
        """Return the body: the computation of a block, from the values that flow into it."""
        wiring, graph = self.wiring, Graph("body")
        if MESH in self.graph.attrs:
            graph.attrs[MESH] = self.graph.attrs[MESH]
        entered = (*wiring.carries, *wiring.params, *wiring.stacked, *wiring.captured)
        types = {e: cuts.type(e[0].type) if e in wiring.carries else e[0].type for e in entered}
        given = {e: graph.input(graph.fresh(_hint(e)), types[e]) for e in entered}
        inputs = dict(given)
        for each in wiring.carries:
            inputs[each] = cuts.joined(given[each], each[0].type, graph)
        values: dict[Value, Value] = {}
        for first, slots, loc in zip(wiring.blocks[0], wiring.operands, locs, strict=True):
            made = graph.append(
                first.op,
                [inputs[e] if e in inputs else values[e[0]] for e in slots],
                copied(first.attrs),
                names=[v.name for v in first.results],
                loc=loc,
                origin=first.origin,
            )
            values.update(zip(first.results, made.results, strict=True))
        results = wiring.results(0)
        for at, number in enumerate((*wiring.carries.values(), *wiring.collected)):
            value = values[results[number]]
            kept = cuts.cut(value, graph) if at < len(wiring.carries) else value
            graph.set_output(_free(value.name, graph.output_names), kept)
        return graph

    def whole(self, scan: Node, cuts: Cuts, before: Node) -> list[Value]:
        """Return the results of the scan, gathered if anything uses them."""
        made = list(scan.results)
        for at, (each, number) in enumerate(self.wiring.carries.items()):
            if number in self.wiring.returned:
                made[at] = cuts.joined(made[at], each[0].type, self.graph, before)
        return made

    def param(self, each: Each) -> Value:
        """Return the stacked parameter for one parameter of each block."""
        weights = [v.weight for v in each if v.weight is not None]
        name = joined([v.name for v in each])
        assert name is not None, "its names are those of a range"
        made = self.graph.param(
            name,
            stacked(each[0].type, self.axis),
            Stack(tuple(weights), self.axis.name) if weights else None,
            loc=joined([v.loc for v in each]) or "",
        )
        self.merged[each] = made
        return made

    def stack(self, each: Each, before: Node) -> Value:
        """Return values of all blocks, stacked."""
        node = self.graph.append(
            "stack", each, {"axis": self.axis.name}, loc=self.name, origin=ORIGIN, before=before
        )
        return node.result

    def connect(self, made: Sequence[Value], before: Node) -> None:
        """Replace the uses of values of the layers by results of the scan."""
        wiring, last = self.wiring, len(self.wiring.blocks) - 1
        every = [wiring.results(block) for block in range(last + 1)]
        numbers = list(wiring.carries.values())
        for value, number in zip(made[len(numbers) :], wiring.collected, strict=True):
            self.join(value, [results[number] for results in every])
        for number, blocks in wiring.returned.items():
            for block in blocks:
                old = every[block][number]
                if block == last and number in numbers:
                    old.replace_by(made[numbers.index(number)])
                elif self.is_needed(old):
                    whole = made[len(numbers) + wiring.collected.index(number)]
                    old.replace_by(self.pick(whole, block, before))

    def join(self, whole: Value, parts: list[Value]) -> None:
        """Replace what was stacked of all blocks by the stacked result of the scan."""
        along = P.stack(P.any(), ..., axis=self.axis.name)
        for user in list(parts[0].users):
            if fits(along, user) and user.operands == parts:
                user.replace_by(whole)

    def is_needed(self, value: Value) -> bool:
        """Return whether a value of the layers is used outside them."""
        return any(user not in self.wiring.inside for user in value.users)

    def pick(self, whole: Value, at: int, before: Node) -> Value:
        """Return one block's value of a stacked result."""
        attrs = {"axis": self.axis.name, "at": at}
        node = self.graph.append(
            "index", [whole], attrs, loc=self.name, origin=ORIGIN, before=before
        )
        return node.result

    def order(self) -> None:
        """Put each merged parameter at the position of its first part, and erase the parts."""
        graph = self.graph
        place = {each[0]: made for each, made in self.merged.items()}
        gone = {v for each in self.merged for v in each} | set(self.merged.values())
        order = [place.get(v, v) for v in graph.params.values() if v in place or v not in gone]
        for each in self.merged:
            for value in each:
                graph.erase_param(value.name)
        graph.order_params(order)


def _hint(each: Each) -> str:
    name = joined([v.name for v in each]) if each[0].is_param else None
    return name or each[0].name


def _free(name: str, taken: Sequence[str]) -> str:
    return name if name not in taken else _free(f"{name}_", taken)
