"""Products with weights that the search for blocks cannot see, and why: reported as near misses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from moecc_backends.islands.find import OPAQUE, Miss
from moecc_backends.islands.jaxprs import contains, inner_jaxprs
from moecc_backends.islands.places import user_line
from moecc_backends.islands.scopes import LOOPS, UNKNOWN, Scope, Step, Val

Made = tuple[str, frozenset[str]]
"""Why the products of weights cannot be seen, and which weights; without a reason, nothing."""

NOTHING: Made = ("", frozenset())

_PICKS = ("dynamic_slice", "gather")
"""What picks a part of a stack by an index."""

_NO_PRODUCTS = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "custom_call")
"""Work whose products no jaxpr shows."""


def unseen(scope: Scope) -> Iterator[Miss]:
    """Yield what products with weights there are besides those that blocks are made of."""
    made: dict[Val, Made] = {}
    for step in scope.every_step():
        _note(step, made)
        reason, weights = _hidden(step)
        for rule in (_computed, _carried):
            if not reason:
                reason, weights = rule(step, made)
        if not reason:
            reason, weights = _convolved(step)
        if reason:
            yield Miss(tuple(sorted(weights)), reason, user_line(step.equation))


def _hidden(step: Step) -> Made:
    """Return why matrices that go into a step cannot be seen there, and which they are."""
    if step.name not in OPAQUE:
        return NOTHING
    weights = frozenset(
        v.view.leaf.name for v in step.inputs if v.view is not None and len(v.shape) > 1
    )
    is_product = step.name in _NO_PRODUCTS or any(
        contains(jaxpr, "dot_general") for jaxpr in inner_jaxprs(step.equation)
    )
    if len(weights) < 2 or not is_product:
        return NOTHING
    what = f"its products are inside {OPAQUE[step.name]}: write the block itself in jax.numpy"
    return what, weights


def _computed(step: Step, made: Mapping[Val, Made]) -> Made:
    """Return why an operand of a product is no view of a weight, though it is made of one."""
    if step.name != "dot_general" or any(v.view is not None for v in step.inputs):
        return NOTHING
    return next((made[v] for v in step.inputs if v in made), NOTHING)


def _carried(step: Step, made: Mapping[Val, Made]) -> Made:
    """Return why nothing is found in a loop or a branch: what it takes is made of weights."""
    if step.bodies or step.name not in LOOPS:
        return NOTHING
    if not any(contains(jaxpr, "dot_general") for jaxpr in inner_jaxprs(step.equation)):
        return NOTHING
    return next((made[v] for v in step.inputs if v in made and len(v.shape) > 1), NOTHING)


def _convolved(step: Step) -> Made:
    """Return why a product of each place by itself is none: it is written as a convolution."""
    if step.name != "conv_general_dilated" or step.inputs[1].view is None:
        return NOTHING
    kernel = step.inputs[1]
    window = step.params["dimension_numbers"].rhs_spec[2:]
    if any(kernel.shape[i] != 1 for i in window) or step.params["feature_group_count"] != 1:
        return NOTHING
    assert kernel.view is not None, "asked for above"
    what = "its product is a convolution over one place: write it as a product, `x @ kernel[0]`"
    return what, frozenset((kernel.view.leaf.name,))


def _note(step: Step, made: dict[Val, Made]) -> None:
    """Note the results of a step that are made of weights alone, and how."""
    weights = frozenset(v.view.leaf.name for v in step.inputs if v.view is not None)
    known = [made[v] for v in step.inputs if v in made]
    weights = weights.union(*(names for _, names in known))
    if not weights:
        return
    if _picks_a_matrix(step):
        reason = "its weight is picked by an index that is only known when it runs: use a scan"
    elif all(v in made or v.view is not None or v.const is not UNKNOWN for v in step.inputs):
        reason = next((why for why, _ in known), "") or (
            f"its weight is computed by `{step.name}`: a block has leaves as they are, cast, "
            "sliced, transposed or reshaped; compute it once, before, and pass the result"
        )
    else:
        return
    for value in step.outputs:
        if value.view is None and value.shape:
            made[value] = (reason, weights)


def _picks_a_matrix(step: Step) -> bool:
    """Whether a step takes one matrix of a stack; rows of a table are no weights of products."""
    if step.name not in _PICKS or step.inputs[0].view is None:
        return False
    stack = step.inputs[0].shape
    return len(stack) > 2 and prod(step.outputs[0].shape) * stack[0] == prod(stack)
