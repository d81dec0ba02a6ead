"""Clean-up: one canonical form, common subexpressions, dead code."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import copysign, isfinite
from typing import Annotated
from zlib import crc32

from moecc.analysis import trainable
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import attributes, replace_value
from moecc.rewrite import Match, P, Pattern, Rule, rewrite
from moecc.rewrite.driver import may_rewrite
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves

# Rules for negations, scales, casts and gradients.

_x = P.any("x")


def operand(match: Match, _builder: Builder) -> Value:
    """Build nothing: the root is its operand ``x``."""
    return match.value("x")


def same_type(match: Match) -> str | None:
    """Reject unless the root has the type of ``x``."""
    old, new = match.root.result.type, match.value("x").type
    return None if old == new else f"%{match.root.result.name} is {old}, its operand {new}"


def _product_is_safe(match: Match) -> str | None:
    a, b = match.attr("a"), match.attr("b")
    if isfinite(a * b) and (a * b != 0 or a == 0 or b == 0):
        return None
    return f"the product of {a!r} and {b!r} is out of range"


def _is_not_zero(match: Match) -> str | None:
    # −(x · 0) is −0 where x · 0 is 0, and an attribute cannot be −0.
    return None if match.attr("a") != 0 else "the factor is 0"


ELEMENTWISE_RULES = (
    # −(−x) is x.
    Rule("double-neg", P.neg(P.neg(_x)), operand),
    # x · 1 is x, x · (−1) is −x.
    Rule("scale-by-one", P.scale(_x, by=1.0), operand),
    Rule("scale-by-minus-one", P.scale(_x, by=-1.0), lambda m, b: b.neg(m.value("x"))),
    # (x · a) · b is x · (ab), up to one rounding.
    Rule(
        "scale-of-scale",
        P.scale(P.scale(_x, by=P.attr("a")), by=P.attr("b")),
        lambda m, b: b.scale(m.value("x"), by=m.attr("a") * m.attr("b")),
        _product_is_safe,
        preserves="reassociation",
    ),
    # −(x · a) and (−x) · a are x · (−a).
    Rule(
        "scale-and-neg",
        P.neg(P.scale(_x, by=P.attr("a"))) | P.scale(P.neg(_x), by=P.attr("a")),
        lambda m, b: b.scale(m.value("x"), by=-m.attr("a")),
        _is_not_zero,
    ),
    Rule("cast-to-same", P.cast(_x), operand, same_type),
    Rule(
        "stop-gradient-twice",
        P.stop_gradient(P.stop_gradient(_x).named("stopped")),
        lambda m, _: m.value("stopped"),
    ),
)


# Rules for operations that rename, split, merge, slice and repeat axes.

_axes_x = P.any("x")


def _renames_to_itself(match: Match) -> str | None:
    old, new = match.attr("old"), match.attr("new")
    return None if old == new else f"it renames {old} to {new}"


def _rename_once(match: Match, b: Builder) -> Value:
    return b.rename(match.value("x"), axis=match.attr("old"), to=match.attr("new"))


def _same_parts(match: Match) -> str | None:
    """Reject unless the merged axes are the split ones, in order."""
    split, merged = tuple(n for n, _ in match.attr("into")), match.attr("axes")
    if split != merged:
        return f"({', '.join(split)}) is split, ({', '.join(merged)}) is merged"
    return None


def _whole_again(match: Match) -> str | None:
    if match.attr("old") == match.attr("new"):
        return same_type(match)
    # A split that dropped a mesh axis is not undone by a rename, which keeps it.
    axis = match.value("x").type[match.attr("old")]
    return "the axis is sharded over a mesh" if axis.mesh else None


def _slice_once(match: Match, b: Builder) -> Value:
    offset = match.attr("offset")
    return b.slice(
        match.value("x"),
        axis=match.attr("axis"),
        start=offset + match.attr("start"),
        stop=offset + match.attr("stop"),
    )


def _reduces_nothing(axes: tuple[str, ...]) -> bool:
    return not axes


AXIS_RULES = (
    Rule(
        "rename-to-itself",
        P.rename(_axes_x, axis=P.attr("old"), to=P.attr("new")),
        operand,
        _renames_to_itself,
    ),
    Rule(
        "rename-chain",
        P.rename(
            P.rename(_axes_x, axis=P.attr("old"), to=P.attr("mid")),
            axis=P.attr("mid"),
            to=P.attr("new"),
        ),
        _rename_once,
    ),
    Rule(
        "merge-of-split",
        P.merge(
            P.split(_axes_x, axis=P.attr("old"), into=P.attr("into")),
            axes=P.attr("axes"),
            into=P.attr("new"),
        ),
        _rename_once,
        lambda m: _same_parts(m) or _whole_again(m),
    ),
    # The axes need not have been neighbours, so the order of the type decides.
    Rule(
        "split-of-merge",
        P.split(P.merge(_axes_x, into=P.attr("axis")), axis=P.attr("axis")),
        operand,
        same_type,
    ),
    Rule("slice-of-all", P.slice(_axes_x), operand, same_type),
    Rule(
        "slice-of-slice",
        P.slice(
            P.slice(_axes_x, axis=P.attr("axis"), start=P.attr("offset")),
            axis=P.attr("axis"),
            start=P.attr("start"),
            stop=P.attr("stop"),
        ),
        _slice_once,
    ),
    Rule("broadcast-to-same", P.broadcast(_axes_x, P.any()), operand, same_type),
    Rule(
        "reduce-nothing",
        P.sum(_axes_x, axes=_reduces_nothing)
        | P.mean(_axes_x, axes=_reduces_nothing)
        | P.max(_axes_x, axes=_reduces_nothing),
        operand,
    ),
)


# Rules that fold arithmetic on constants, in float64 as in the reference.

Compute = Callable[[Match], float]
"""Returns the result of an operation on constants."""


def _folding(pattern: Pattern, compute: Compute) -> Rule:
    """Return the rule that replaces an operation on constants by a constant."""

    def check(match: Match) -> str | None:
        if not match.root.result.type.dtype.is_float:
            return "integers may overflow"
        value = float(compute(match))
        # An attribute cannot be −0.
        if isfinite(value) and (value != 0 or copysign(1, value) > 0):
            return None
        return f"the result would be {value}"

    def build(match: Match, b: Builder) -> Value:
        dtype = match.root.result.type.dtype.name
        value: Value = b.constant(value=float(compute(match)), dtype=dtype)
        return value

    return Rule("fold-constants", pattern, build, check)


def _of_both(compute: Callable[[float, float], float]) -> Compute:
    return lambda match: compute(match.attr("a"), match.attr("b"))


def _is_float(match: Match) -> str | None:
    type = match.root.result.type
    return None if type.dtype.is_float else f"%{match.root.result.name} is {type}"


def _scale(match: Match, b: Builder) -> Value:
    value: Value = b.scale(match.value("x"), by=match.attr("value"))
    return value


_a, _b = P.constant(value=P.attr("a")), P.constant(value=P.attr("b"))

CONSTANT_RULES = (
    # Only operations that IEEE 754 rounds correctly: their result is the same everywhere.
    _folding(P.neg(_a), lambda match: -match.attr("a")),
    _folding(P.scale(_a, by=P.attr("b")), _of_both(operator.mul)),
    _folding(P.add(_a, _b), _of_both(operator.add)),
    _folding(P.sub(_a, _b), _of_both(operator.sub)),
    _folding(P.mul(_a, _b), _of_both(operator.mul)),
    _folding(P.maximum(_a, _b), _of_both(max)),
    _folding(P.minimum(_a, _b), _of_both(min)),
    # x · c is a scale, the more specific form.
    Rule(
        "mul-by-constant", P.mul(P.any("x"), P.constant(value=P.attr("value"))), _scale, _is_float
    ),
)


# The canonical order of commutative operands.


def order_operands(graph: Graph) -> int:
    """Put operands of commutative operations in canonical order; return how many were exchanged.

    Each value has a key derived from how it is computed: its operation, its attributes and
    the keys of its operands, or the type of an input or parameter.  Names and locations do not
    count, so two graphs that compute the same in the same way agree.  Operands with equal keys keep
    their order.
    """
    keys: dict[Value, int] = {}
    rows: dict[str, int] = {}
    for value in (*graph.inputs.values(), *graph.params.values()):
        keys[value] = _row(rows, f"{'param' if value.is_param else value.name} {value.type}")
    exchanged = 0
    for node in graph:
        parts = [keys[v] for v in node.operands]
        if node.op.commutative and parts[0] > parts[1] and _exchange(node):
            parts.reverse()
            exchanged += 1
        row = _row(rows, _made_by(node))
        # A hash of integers is the same in every process; a hash of text is not.
        key = hash((row, *parts))
        for value in node.results:
            keys[value] = key + value.index
    return exchanged


def _made_by(node: Node) -> str:
    """Return the operation and its attributes; a body by its structure, not by its identity."""
    if not node.attrs:
        return node.op.name
    return f"{node.op.name} {node.attrs if node.body is None else attributes(node.attrs)}"


def _row(rows: dict[str, int], text: str) -> int:
    number = rows.get(text)
    if number is None:
        number = rows[text] = crc32(text.encode())
    return number


def _exchange(node: Node) -> bool:
    """Exchange the two operands, unless that changes the order of the result's axes."""
    a, b = node.operands
    if not _same_types(node, (b, a)):
        return False
    node.set_operand(0, b)
    node.set_operand(1, a)
    return True


def _same_types(node: Node, operands: Sequence[Value]) -> bool:
    return node.op.result_types(operands, node.attrs) == tuple(v.type for v in node.results)


RULES: tuple[Rule, ...] = (*ELEMENTWISE_RULES, *AXIS_RULES, *CONSTANT_RULES)


@dataclass(frozen=True)
class CanonicalizePass(Pass):
    """Bring a graph into the canonical form that other passes expect.

    Identities disappear (a scale by 1, a cast to the same type, a whole slice, a broadcast that
    adds no axis), inverses cancel (negations, splits and merges), chains become one operation
    (renames, scales, slices), arithmetic on constants is done, and operands of commutative
    operations are put in an order that depends on how they are computed, not on their names.

    Before::

        %a = neg %x : f32[batch=B, embed=4]
        %b = neg %a : f32[batch=B, embed=4]
        %c = scale %b {by=2.0} : f32[batch=B, embed=4]
        %d = scale %c {by=0.5} : f32[batch=B, embed=4]
        %e = silu %d : f32[batch=B, embed=4]

    After::

        %e = silu %x : f32[batch=B, embed=4]
    """

    name = "canonicalize"
    summary = "bring a graph into the canonical form that other passes expect"
    takes_rolled = True

    exact: Annotated[bool, "leave out rewrites that are equal only in real arithmetic"] = False

    @property
    def preserves(self) -> Preserves:
        """Exact, unless scales are merged, which rounds once instead of twice."""
        if self.exact:
            return EXACT
        return Preserves("reassociation", "a chain of scales is rounded once")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that these options enable."""
        return tuple(r for r in RULES if r.preserves == "exact" or not self.exact)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Apply the rules until none matches, then put operands in order."""
        result = PassResult.of(rewrite(graph, self.rules, origin=self.name))
        ordered = order_operands(graph)
        if all(r.preserves == "exact" or not result.rules[r.name].hits for r in self.rules):
            result.preserves = EXACT
        result.changed |= ordered > 0
        result.matched += ordered
        if ordered:
            result.stats["operands-ordered"] = ordered
        return result


# Common-subexpression elimination.


@dataclass(frozen=True)
class CsePass(Pass):
    """Keep the first of nodes that compute the same from the same operands.

    Attributes must be equal too, and types; operands of a commutative operation may be in
    either order.  Randomness is an operand, a key, so two draws are one only if their keys are.
    Parameters whose weight expressions are equal are merged on demand, for inference: apart they
    may diverge in training.

    Before::

        %a = silu %x : f32[batch=B, embed=4]
        %b = silu %x : f32[batch=B, embed=4]
        %c = mul %a, %b : f32[batch=B, embed=4]

    After::

        %a = silu %x : f32[batch=B, embed=4]
        %c = mul %a, %a : f32[batch=B, embed=4]
    """

    name = "cse"
    summary = "merge nodes that compute the same value"
    takes_rolled = True
    preserves = EXACT

    parameters: Annotated[bool, "also merge parameters of equal weight expressions"] = False

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Walk the graph once, in order, so that operands are merged before their users."""
        params = _merge_parameters(graph) if self.parameters else 0
        first: dict[Hashable, Node] = {}
        merged = 0
        for node in graph:
            same = first.setdefault(_key(node), node)
            # The order of operands may determine the order of the result's axes, so types count.
            if same is node or any(
                a.type != b.type for a, b in zip(same.results, node.results, strict=True)
            ):
                continue
            if not may_rewrite(self.name, node):
                break
            for old, new in zip(node.results, same.results, strict=True):
                replace_value(old, new)
            node.erase()
            merged += 1
        stats = {"nodes-merged": merged, "params-merged": params}
        return PassResult(merged + params > 0, merged + params, stats)


def _merge_parameters(graph: Graph) -> int:
    """Keep the first of parameters with one weight expression; return how many were erased.

    One that is trained stays apart from one that is frozen.
    """
    trained, first = trainable(graph), dict[Hashable, Value]()
    merged = 0
    for name, value in list(graph.params.items()):
        if value.weight is None:
            continue
        same = first.setdefault((value.weight, value.type, trained[name]), value)
        if same is value:
            continue
        replace_value(value, same)
        graph.erase_param(name)
        merged += 1
    return merged


def _key(node: Node) -> Hashable:
    if node.op.opaque:
        return node  # what it computes is not in the graph
    operands = tuple(map(id, node.operands))
    if node.op.commutative:
        operands = tuple(sorted(operands))
    # repr distinguishes −0.0 from 0.0, and a float from an equal int; a NaN equals itself.
    return (node.op, operands, repr(node.attrs) if node.attrs else "")


# Dead-code elimination.


@dataclass(frozen=True)
class DcePass(Pass):
    """Erase the nodes and parameters that no output depends on.

    Inputs stay: they are how the graph is called.

    Before::

        param %w : f32[embed=4, mlp=8]
        %a = silu %x : f32[batch=B, embed=4]
        %b = contract %x, %w {over=embed} : f32[batch=B, mlp=8]
        output y = %a

    After::

        %a = silu %x : f32[batch=B, embed=4]
        output y = %a
    """

    name = "dce"
    summary = "erase nodes and parameters that no output depends on"
    takes_rolled = True
    preserves = EXACT

    keep_params: Annotated[bool, "keep unused parameters"] = False

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Erase dead nodes, users before their operands."""
        nodes = graph.erase_dead()
        params = 0 if self.keep_params else graph.erase_unused_params()
        stats = {"nodes-erased": nodes, "params-erased": params}
        return PassResult(nodes + params > 0, nodes + params, stats)
