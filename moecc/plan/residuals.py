"""What a backward pass keeps of a layer, and what it computes again under rematerialisation.

Reverse-mode differentiation of an operation needs some of its operands or results.  These are the
residuals.  Values that are another one in other clothes (renamed, split, cast, scaled) are kept
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moecc.ir.graph import Node, Value
from moecc.ir.kept import ALIASES
from moecc.plan.shapes import Shape

_OPERAND = frozenset(
    {"silu", "gelu", "gelu_tanh", "relu", "square", "log", "normal_cdf", "rms_norm", "layer_norm"}
)
_RESULT = frozenset({"softmax", "sigmoid", "tanh", "exp", "rsqrt", "logsumexp"})
_PAIRS = frozenset({"contract", "mul", "div", "maximum", "minimum"})


@dataclass(frozen=True)
class Flow:
    """What the backward pass does to memory at one node.

    Attributes:
      born: the gradients that there are from here on.
      done: those that nobody needs after it.
      freed: the residuals that nobody needs after it.
    """

    born: tuple[Shape, ...]
    done: tuple[Shape, ...]
    freed: tuple[Shape, ...]


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
      flow: what comes and goes at each node, from last to first.
    """

    kept: tuple[Shape, ...]
    named: tuple[Shape, ...]
    again: frozenset[Node]
    saved_again: frozenset[Node]
    onward: frozenset[Node]
    saved_onward: frozenset[Node]
    flow: tuple[Flow, ...]

    @property
    def key(self) -> object:
        """What equal layers share."""
        return self.kept, self.named, self.flow


def residuals(nodes: Sequence[Node], shape: Callable[[Value], Shape]) -> Residuals:
    """Find the residuals of the layer made of `nodes`."""
    own = {v for node in nodes for v in node.results}
    uses = {node: _needs(node) for node in nodes}
    kept = dict.fromkeys(_root(v, own) for node in nodes for v in uses[node])
    mine = [v for v in kept if v in own and v.type.dtype.is_float]
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
        flow=tuple(_flow(nodes, uses, own, shape)),
    )


def _needs(node: Node) -> list[Value]:
    """Return the values that the derivative of `node` reads, parameters aside."""
    name = node.op.name
    if name in _OPERAND:
        found = [node.operands[0]]
    elif name in _RESULT:
        found = [node.results[0]]
    elif name in _PAIRS:
        found = list(node.operands)
    elif name == "combine":
        found = [node.operands[0], node.operands[-1]]
    elif name == "route":
        found = [node.operands[0]]
    else:
        found = []
    return [v for v in found if not v.is_param]


def _root(value: Value, own: set[Value]) -> Value:
    while value in own and value.node is not None and value.node.op.name in ALIASES:
        value = value.node.operands[0]
    return value


def root_of(value: Value) -> Value:
    """Return what `value` is by another name."""
    while value.node is not None and value.node.op.name == "rename":
        value = value.node.operands[0]
    return value


def _named(node: Node) -> Value | None:
    """Return the result of attention or of experts: what their layer adds to the hidden state."""
    if node.op.name == "combine":
        return node.result
    if node.op.name != "contract" or "attention" not in node.loc.rpartition(".")[2]:
        return None
    return node.result if any(n.op.name == "add" for n in node.result.users) and any(
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
) -> Iterable[Flow]:
    """Yield what comes and goes at each node, from the last to the first."""
    last_use: dict[Value, Node] = {}
    for node in reversed(nodes):
        for value in uses[node]:
            last_use[_root(value, own)] = node
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
        done = [v for v in node.results if v in alive and node.op.name not in ALIASES]
        alive.difference_update(done)
        freed = [v for v in freed_at.get(node, ()) if v in own]
        yield Flow(shapes(born), shapes(done), shapes(freed))
