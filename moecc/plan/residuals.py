"""What a backward pass keeps of a layer, and what it computes again under rematerialisation.

Reverse-mode differentiation of an operation needs some of its operands or results.  These are the
residuals.  Values that are another one in other clothes (renamed, split, cast, scaled) are kept
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from moecc.ir.graph import Node, Value
from moecc.ir.traits import RowMove
from moecc.plan.shapes import Shape


@dataclass(frozen=True)
class Flow:
    """What the backward pass does to memory at one node.

    Attributes:
      born: the gradients that there are from here on.
      done: those that nobody needs after it.
      freed: the residuals that nobody needs after it.
      in_place: whether gradients take the place of those that they are made of.
    """

    born: tuple[Shape, ...]
    done: tuple[Shape, ...]
    freed: tuple[Shape, ...]
    in_place: bool


@dataclass(frozen=True)
class Backward:
    """The memory of the backward pass of a layer that is computed again.

    Attributes:
      alive: shapes of what there is when it begins.
      flow: what comes and goes at each node, from last to first.
    """

    alive: tuple[Shape, ...]
    flow: tuple[Flow, ...]


@dataclass(frozen=True)
class Residuals:
    """What the backward pass of one layer needs.

    Attributes:
      kept: shapes of all residuals, by the dtype's kind.
      named: shapes of what the policy ``save`` keeps: the results of attention and of experts.
      again: nodes that full rematerialisation computes again.
      saved_again: nodes that the policy ``save`` computes again.
      onward: nodes that lead to what later layers take.
      saved_onward: those of them that the policy ``save`` computes again for these.
      plain: its backward pass where every residual is an array.
      fused: its backward pass where what is computed entry by entry is a part of its user.
    """

    kept: tuple[Shape, ...]
    named: tuple[Shape, ...]
    again: frozenset[Node]
    saved_again: frozenset[Node]
    onward: frozenset[Node]
    saved_onward: frozenset[Node]
    plain: Backward
    fused: Backward

    @property
    def key(self) -> object:
        """What equal layers share."""
        return self.kept, self.named, self.plain, self.fused


def residuals(nodes: Sequence[Node], shape: Callable[[Value], Shape]) -> Residuals:
    """Find the residuals of the layer made of `nodes`."""
    own = {v for node in nodes for v in node.results}
    uses = {node: [_root(v, own) for v in _needs(node)] for node in nodes}
    fused = {node: list(_arrays(found, own)) for node, found in uses.items()}
    mine = _kept(uses, own)
    named = [v for v in map(_named, nodes) if v is not None]
    inside = set(nodes)
    outputs = [v for v in own if not inside.issuperset(v.users)]
    return Residuals(
        kept=tuple(map(shape, mine)),
        named=tuple(map(shape, named)),
        again=_made_again(mine, own, frozenset()),
        saved_again=_made_again(mine, own, frozenset(named)),
        onward=_made_again(outputs, own, frozenset()),
        saved_onward=_made_again(outputs, own, frozenset(named)),
        plain=Backward(tuple(map(shape, mine)), tuple(_flow(nodes, uses, own, shape, fuses=False))),
        fused=Backward(
            tuple(map(shape, _kept(fused, own))),
            tuple(_flow(nodes, fused, own, shape, fuses=True)),
        ),
    )


def _kept(uses: dict[Node, list[Value]], own: set[Value]) -> list[Value]:
    needed = dict.fromkeys(v for found in uses.values() for v in found)
    return [v for v in needed if v in own and v.type.dtype.is_float]


def _arrays(values: Iterable[Value], own: set[Value]) -> Iterator[Value]:
    """Yield what `values` are made of, entry by entry: each an array that is read anyway."""
    work, seen = list(values), set[Value]()
    while work:
        value = _root(work.pop(), own)
        if value in seen:
            continue
        seen.add(value)
        if value in own and value.node is not None and value.node.op.fusable:
            work += [v for v in value.node.operands if not v.is_param]
        else:
            yield value


def _needs(node: Node) -> list[Value]:
    """Return the values that the derivative of `node` reads, parameters aside."""
    reads = node.op.residual
    found = [node.operands[i] for i in reads.operands]
    if reads.result:
        found.append(node.results[0])
    # Masks and indices are small.
    return [v for v in found if not v.is_param and v.type.dtype.is_float]


def _root(value: Value, own: set[Value]) -> Value:
    while value in own and value.node is not None and _is_view(value.node):
        value = value.node.operands[0]
    return value


def _is_view(node: Node) -> bool:
    """Whether the result is made of the first operand again rather than kept."""
    return node.op.alias or node.op.is_weighting


def root_of(value: Value) -> Value:
    """Return what `value` is by another name."""
    while value.node is not None and value.node.op.name == "rename":
        value = value.node.operands[0]
    return value


def _named(node: Node) -> Value | None:
    """Return the result of attention or of experts: what their layer adds to the hidden state."""
    if node.op.moves is RowMove.TO_TOKENS:
        return node.result
    if not node.op.is_product or "attention" not in node.loc.rpartition(".")[2]:
        return None
    return node.result if any(n.op.is_sum for n in node.result.users) and any(
        v.is_param for v in node.operands
    ) else None  # fmt: skip


def _made_again(
    needed: Iterable[Value], own: set[Value], saved: frozenset[Value]
) -> frozenset[Node]:
    """Return the nodes that must run again so that `needed` are there, given what is saved."""
    found: set[Node] = set()
    work = [v for v in needed if v not in saved]
    while work:
        node = work.pop().node
        if node is None or node in found:
            continue
        found.add(node)
        work += [v for v in node.operands if v in own and v not in saved]
    return frozenset(found)


def _flow(
    nodes: Sequence[Node],
    uses: dict[Node, list[Value]],
    own: set[Value],
    shape: Callable[[Value], Shape],
    *,
    fuses: bool,
) -> Iterable[Flow]:
    """Yield what comes and goes at each node, from the last to the first."""
    last_use: dict[Value, Node] = {}
    for node in reversed(nodes):
        for value in uses[node]:
            last_use[value] = node
    freed_at: dict[Node, list[Value]] = {}
    for value, node in last_use.items():
        freed_at.setdefault(node, []).append(value)
    alive: set[Value] = set()

    def shapes(values: Iterable[Value]) -> tuple[Shape, ...]:
        return tuple(shape(v) for v in values if v.type.dtype.is_float)

    for node in reversed(nodes):
        met = (*node.results, *(v for v in node.operands if not v.is_param))
        born = [v for v in dict.fromkeys(_root(v, own) for v in met) if v not in alive]
        alive.update(born)
        done = [v for v in node.results if v in alive and not _is_view(node)]
        alive.difference_update(done)
        freed = [v for v in freed_at.get(node, ()) if v in own]
        yield Flow(shapes(born), shapes(done), shapes(freed), fuses and node.op.gradient_in_place)
