"""Names of the values of a layer that rematerialisation may keep for the gradient.

A backend marks what a node makes with its name here; ``scan {remat=save, save=(…)}`` lists those
that are kept while everything else is computed again.
"""

from __future__ import annotations

from moecc.ir.graph import Node, Value
from moecc.ir.ops import OpDef
from moecc.ir.traits import Collective, RowMove

KEPT = ("router", "rows", "experts", "combine", "attention")
"""A router's logits, dispatched rows, what experts make of them, and what a layer adds."""

DEFAULT = ("combine", "attention")
"""What is kept unless something else is asked for: what the sublayers add to the stream."""

_MOVED = {RowMove.TO_SLOTS: "rows", RowMove.TO_TOKENS: "combine"}

_STEPS_TO_ROUTE = 4
"""How far the choice may be: a residual stream is a chain of sums without end."""

_STEPS_TO_ATTENTION = 3
"""How far a projection may be from the product with the weights: parts are merged between."""


def remat_name(node: Node) -> str | None:
    """Return the name of what `node` makes, by what makes or uses it; None for most nodes.

    What a collective makes of a value that is kept by default has its name, too: it is not sent
    again.
    """
    if node.op.collective is Collective.BRINGS and node.operands[0].node is not None:
        before = remat_name(node.operands[0].node)
        return before if before in DEFAULT else None
    if node.op.moves is not None:
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
    """Whether scores are still scores behind `entry`: a bias, noise, a mask, parts, shares."""
    within = entry.elementwise and (bool(entry.linear) or entry.logical)
    return within or entry.carries or entry.is_distribution


def _projects_attention(node: Node) -> bool:
    """Whether `node` projects the product of values with the weights that a softmax made."""
    source = node.operands[0].node if node.op.is_product else None
    for _ in range(_STEPS_TO_ATTENTION):
        if source is None or source.op.is_product:
            break
        source = source.operands[0].node if source.operands else None
    if source is None or not source.op.is_product:
        return False
    return _softmax_behind(source.operands[0])


def _softmax_behind(weights: Value) -> bool:
    # Dropout may stand between the softmax and its use.
    near = [weights, *(weights.node.operands if weights.node is not None else ())]
    return any(v.node is not None and v.node.op.is_distribution for v in near)
