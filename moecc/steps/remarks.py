"""What a reader of a run should know of its model before it begins."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.attributes import RouteAttrs
from moecc.ir.gates import convention
from moecc.ir.graph import Graph, Node


def training_remarks(graph: Graph) -> Iterator[str]:
    """Yield remarks on training the model whose graph is `graph`."""
    fixed = [node.loc for node in graph.every_node() if node.op.routes and _is_constant(node)]
    if fixed:
        rest = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        yield (
            f"{', '.join(fixed[:3])}{rest}: the gates of a token are the same whatever the router "
            "says, so that only the router's own losses train it; top-k=2, or gates=switch for one "
            "expert a token, trains it by the model's loss"
        )


def _is_constant(node: Node) -> bool:
    """Whether the gates of a ``route`` do not depend on the logits of what is chosen."""
    made = RouteAttrs.of_node(node)
    how = convention(made.gates)
    if made.top_k == 1:
        return not how.learns_at_top_1
    return how.constant_sum and not how.renormalised
