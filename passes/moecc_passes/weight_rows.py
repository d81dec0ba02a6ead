"""The pass ``weight-rows``: rows are weighted at their experts, before the last product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import replace_value
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves
from moecc_passes.routed import NOTHING_ROUTED, RoutedLayer, routed_layers

NAME = "weight-rows"


@dataclass(frozen=True)
class WeightRowsPass(Pass):
    """Send gates with the rows, and weight each row before the last product of its expert.

    The gradient of a gate is the product of a row that its expert made with the gradient of its
    token.  Where rows are weighted at their tokens, a backward pass that did not keep them makes
    them again, and brings them back from other devices once more.  Weighted before the last
    product, which is linear, the gradient of a gate comes of what the product reads and of its own
    gradient: nothing is made again, and a number a row returns.  Where something follows the last
    product, a bias say, what follows is weighted.

    Before::

        %y = contract %m, %down {over=mlp} : f32[group=1, expert=8, slot=…, embed=16]
        %c = combine %y, %e, %s, %g : f32[batch=B, seq=S, embed=16]

    After::

        %w = dispatch_gates %g, %e, %s : f32[group=1, expert=8, slot=…]
        %m1 = weight_rows %m, %w : f32[group=1, expert=8, slot=…, mlp=32]
        %y = contract %m1, %down {over=mlp} : f32[group=1, expert=8, slot=…, embed=16]
        %c = combine_weighted %y, %e, %s : f32[batch=B, seq=S, embed=16]
    """

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "weight rows at their experts, before the last product"
    must_match: ClassVar[bool] = True
    preserves = Preserves("reassociation", "rows are weighted before their last product")

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Weight the rows of every routed layer that has not."""
        layers = [y for y in routed_layers(graph) if y.gates is y.combine.operands[-1]]
        for layer in layers:
            _weight(layer, Builder(graph, loc=layer.combine.loc, origin=NAME))
        missing = [] if layers else [NOTHING_ROUTED]
        stats = {"layers": len(layers)}
        return PassResult(bool(layers), len(layers), stats, near_misses=missing)


def _weight(layer: RoutedLayer, builder: Builder) -> None:
    combine = layer.combine
    rows, experts, slots, gates = combine.operands
    last, number = _read_by_last_product(rows, combine) or (combine, 0)
    builder.before = combine
    row_gates = builder.dispatch_gates(gates, experts, slots)
    weighted = builder.weight_rows(last.operands[number], row_gates)
    rows_out = weighted if last is combine else _again(last, number, weighted, builder)
    together = builder.combine_weighted(rows_out, experts, slots, name=combine.result.name)
    replace_value(combine.result, together)
    combine.erase()
    if last is not combine:
        last.erase()


def _read_by_last_product(rows: Value, combine: Node) -> tuple[Node, int] | None:
    """Return the product that makes `rows` for `combine` alone, and which operand has rows."""
    node = rows.node
    if node is None or not node.op.is_product or set(rows.users) != {combine} or rows.is_output:
        return None
    axes = {"group", "expert", "slot"}
    numbers = [i for i, v in enumerate(node.operands) if axes <= set(v.type.names)]
    return (node, numbers[0]) if len(numbers) == 1 else None


def _again(product: Node, number: int, weighted: Value, builder: Builder) -> Value:
    """Return what `product` makes of weighted rows, in its place behind these."""
    operands = [weighted if i == number else v for i, v in enumerate(product.operands)]
    name = product.result.name
    again = builder.node(product.op.name, *operands, names=(name,), **product.attrs)
    again.loc, again.origin = product.loc, product.origin
    return again.result
