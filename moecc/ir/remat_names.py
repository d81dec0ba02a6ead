"""Names of the values of a layer that rematerialisation may save for the gradient.

A backend tags the result of a node with its name here; ``scan {remat=save, save=(…)}`` lists the
names that are saved while everything else is recomputed.
"""

from __future__ import annotations

from moecc.ir.graph import Node, Value
from moecc.ir.operation import OpDef
from moecc.ir.traits import CollectiveKind, RowMove

KEPT = ("router", "rows", "experts", "combine", "attention")
"""A router's logits, dispatched rows, the experts' results, and the outputs of sublayers."""

DEFAULT = KEPT[-2:]
"""The names saved by default: what the sublayers add to the residual stream."""

_MOVED = {RowMove.TO_SLOTS: "rows", RowMove.TO_TOKENS: "combine"}

_STEPS_TO_ROUTE = 4
"""How many nodes to look ahead for the choice: a residual stream is an endless chain of sums."""

_STEPS_TO_ATTENTION = 3
"""How many nodes a projection may be away from the product with the attention weights."""


def remat_name(node: Node) -> str | None:
    """Return the name of the result of `node`, by its producer or users; None for most nodes.

    The result of a collective on a value that is saved by default has the same name, so that it is
    not sent again.
    """
    if node.op.collective is CollectiveKind.BRINGS and node.operands[0].node is not None:
        before = remat_name(node.operands[0].node)
        return before if before in DEFAULT else None
    if node.op.moves in _MOVED:
        return _MOVED[node.op.moves]
    if any(
        user.op.moves is RowMove.TO_TOKENS and user.operands[0] is value
        for value in node.results
        for user in value.users
    ):
        return "experts"
    if _feeds_route(node):
        return "router"
    return "attention" if _projects_attention(node) else None


def _feeds_route(node: Node) -> bool:
    """Whether `node` makes the logits of a router, bare or after a few steps.

    This names a value; its precision is an attribute of ``contract``.
    """
    if not node.op.is_product:
        return False
    users = list(node.result.users)
    for _ in range(_STEPS_TO_ROUTE):
        if any(user.op.chooses for user in users):
            return True
        between = [user for user in users if _passes_scores(user.op)]
        users = [later for user in between for later in user.result.users]
    return False


def _passes_scores(entry: OpDef) -> bool:
    """Whether scores remain scores after `entry`: a bias, noise, a mask, slices, shares."""
    within = entry.elementwise and (bool(entry.linear) or entry.logical)
    return within or entry.carries or entry.is_distribution


def _projects_attention(node: Node) -> bool:
    """Whether `node` projects the product of the values with the attention weights."""
    source = node.operands[0].node if node.op.is_product else None
    for _ in range(_STEPS_TO_ATTENTION):
        if source is None or source.op.is_product or source.op.attends:
            break
        source = source.operands[0].node if source.operands else None
    if source is None or not source.op.is_product:
        return source is not None and source.op.attends
    return _is_softmax(source.operands[0])


def _is_softmax(weights: Value) -> bool:
    # Dropout may be applied between the softmax and its use.
    near = [weights, *(weights.node.operands if weights.node is not None else ())]
    return any(v.node is not None and v.node.op.is_distribution for v in near)
