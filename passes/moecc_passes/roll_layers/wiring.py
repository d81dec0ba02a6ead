"""The dataflow into and out of repeated layers: carries, stacks, captured values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.table.slots import is_slots
from moecc.types.ranges import joined

Each = tuple[Value, ...]
"""A value of every repetition, in order."""


class CannotRoll(InputError):
    """Why equal layers cannot be repeated."""


@dataclass
class Wiring:
    """Equal layers, block by block, and their dataflow.

    Attributes:
      blocks: the nodes of each repetition.
      carries: values from the previous block; for the first, from outside.
      params: parameters, one for each block, that nothing else uses.
      stacked: other values from outside, another one for each block.
      operands: for each node of a block, its operands in every block.
      captured: a value from outside that all blocks use, as often as there are blocks.
      returned: the blocks whose value is used outside, by its number among their results.
    """

    blocks: list[list[Node]]
    carries: dict[Each, int] = field(default_factory=dict)
    params: list[Each] = field(default_factory=list)
    stacked: list[Each] = field(default_factory=list)
    captured: list[Each] = field(default_factory=list)
    operands: list[list[Each]] = field(default_factory=list)
    returned: dict[int, list[int]] = field(default_factory=dict)

    def results(self, block: int) -> list[Value]:
        """Return the values that a block makes, by number."""
        return [v for node in self.blocks[block] for v in node.results]

    @cached_property
    def inside(self) -> dict[Node, int]:
        """The block of each node."""
        return {node: i for i, block in enumerate(self.blocks) for node in block}

    @cached_property
    def collected(self) -> list[int]:
        """The values that must be stacked over all blocks, not only taken from the last."""
        last, carried = len(self.blocks) - 1, set(self.carries.values())
        return [n for n, blocks in self.returned.items() if n not in carried or blocks != [last]]


Home = dict[Value, tuple[int, int]]
"""The block of a value, and its number among the results of that block."""


def wire(blocks: list[list[Node]]) -> Wiring:
    """Return the dataflow into and out of `blocks`, which are equal.

    Raises:
      CannotRoll: a value comes from elsewhere than the previous block or the outside.
    """
    wiring = Wiring(blocks)
    home = {v: (i, n) for i in range(len(blocks)) for n, v in enumerate(wiring.results(i))}
    slots: dict[Each, None] = {}
    wiring.operands = [slots_of(nodes, home) for nodes in zip(*blocks, strict=True)]
    for node in wiring.operands:
        for each in node:
            if each[0] not in home or home[each[0]][0] != 0:
                slots[each] = None
    for each in slots:
        _enter(wiring, each, home, slots)
    _leave(wiring, home)
    return wiring


def slots_of(nodes: Sequence[Node], home: Home) -> list[Each]:
    """Return the operands of a node in every block, exchangeable ones in a consistent order."""
    rows = [node.operands for node in nodes]
    if nodes[0].op.commutative:
        # The first block alone takes the stream from outside, so the second is the one to follow.
        rows = [_turned(row, rows[1], i, home) for i, row in enumerate(rows)]
    return list(zip(*rows, strict=True))


def _turned(row: list[Value], like: list[Value], block: int, home: Home) -> list[Value]:
    """Return two operands in the order that best matches those of the second block."""
    as_is, turned = (
        sum(_fit(v, w, block, home) for v, w in zip(some, like, strict=True))
        for some in (row, row[::-1])
    )
    return row[::-1] if turned > as_is else row


def _fit(value: Value, like: Value, block: int, home: Home) -> int:
    if value is like:
        return 2
    if value in home and like in home:
        steps = (home[value][0] - block, home[like][0] - 1)
        return 2 if steps[0] == steps[1] and home[value][1] == home[like][1] else 0
    return 1 if value.is_param and like.is_param else 0


def _enter(wiring: Wiring, each: Each, home: Home, slots: dict[Each, None]) -> None:
    if each[0].type.extents:
        raise CannotRoll(f"%{each[0].name} has sizes that are set outside the layers")
    if any(v in home for v in each):
        wiring.carries[each] = _carried(each, home)
    elif len(set(each)) == 1:
        wiring.captured.append(each)
    elif _is_own(wiring, each, slots):
        wiring.params.append(each)
    else:
        wiring.stacked.append(each)


def _carried(each: Each, home: Home) -> int:
    """Return the number of the value that is carried from each block to the next."""
    first, *later = (home.get(v) for v in each)
    numbers = {place[1] for place in later if place is not None}
    steps = [place[0] if place is not None else -1 for place in later]
    if first is not None or len(numbers) != 1 or steps != list(range(len(later))):
        wrong = next(v for v in each if v in home)
        raise CannotRoll(f"%{wrong.name} is used farther away than in the layer after its own")
    if each[0].type != each[1].type:
        what = "what goes from layer to layer changes its type"
        raise CannotRoll(what, expected=repr(each[0]), found=repr(each[1]))
    return numbers.pop()


def _is_own(wiring: Wiring, each: Each, slots: dict[Each, None]) -> bool:
    """Whether a parameter of each block becomes one for all of them."""
    if not all(
        v.is_param and v.users.keys() <= set(b) for v, b in zip(each, wiring.blocks, strict=True)
    ):
        return False
    if len({v.weight and v.weight.type for v in each}) != 1:
        return False
    if any(value in other for other in slots if other is not each for value in each):
        return False
    name = joined([v.name for v in each])
    return name is not None and name not in each[0].graph


def _leave(wiring: Wiring, home: Home) -> None:
    for value, (block, number) in home.items():
        outside = [user for user in value.users if user not in wiring.inside]
        if not outside:
            continue
        wiring.returned.setdefault(number, []).append(block)
        if value.type.extents:
            raise CannotRoll(f"%{value.name} has sizes that its layer sets, and is used outside")
        if is_slots(value) and any(user.results for user in outside):
            raise CannotRoll(f"the slots %{value.name} are used outside their layer")
