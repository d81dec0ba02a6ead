"""Products with weights that the search for blocks cannot see, and why: reported as near misses."""

from __future__ import annotations

from collections.abc import Iterator

from moecc_backends.islands.find import OPAQUE, Miss
from moecc_backends.islands.jaxprs import contains, inner_jaxprs
from moecc_backends.islands.places import user_line
from moecc_backends.islands.scopes import LOOPS, UNKNOWN, Scope, Step, Val

_PICKS = ("dynamic_slice", "gather")
"""What picks a part of a stack by an index."""

_NO_PRODUCTS = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "custom_call")
"""Work whose products no jaxpr shows."""


def unseen(scope: Scope) -> Iterator[Miss]:
    """Yield what products with weights there are besides those that blocks are made of."""
    for step in scope.every_step():
        reason, weights = _hidden(step)
        for rule in (_computed, _carried, _convolved):
            if not reason:
                reason, weights = rule(step)
        if reason:
            yield Miss(tuple(sorted(weights)), reason, user_line(step.equation))


def _hidden(step: Step) -> tuple[str, set[str]]:
    """Return why matrices that go into a step cannot be seen there, and which they are."""
    if step.name not in OPAQUE:
        return "", set()
    weights = {v.view.leaf.name for v in step.inputs if v.view is not None and len(v.shape) > 1}
    is_product = step.name in _NO_PRODUCTS or any(
        contains(jaxpr, "dot_general") for jaxpr in inner_jaxprs(step.equation)
    )
    if len(weights) < 2 or not is_product:
        return "", set()
    return f"its products are inside {OPAQUE[step.name]}", weights


def _computed(step: Step) -> tuple[str, set[str]]:
    """Return why an operand of a product is no view of a weight, though it is made of one."""
    if step.name != "dot_general" or any(v.view is not None for v in step.inputs):
        return "", set()
    for value in step.inputs:
        found = _made_of(value)
        if found is not None:
            return found
    return "", set()


def _carried(step: Step) -> tuple[str, set[str]]:
    """Return why nothing is found in a loop or a branch: what it takes is made of weights."""
    if step.bodies or step.name not in LOOPS:
        return "", set()
    if not any(contains(jaxpr, "dot_general") for jaxpr in inner_jaxprs(step.equation)):
        return "", set()
    for value in step.inputs:
        found = _made_of(value) if len(value.shape) > 1 else None
        if found is not None:
            return found
    return "", set()


def _convolved(step: Step) -> tuple[str, set[str]]:
    """Return why a product of each place by itself is none: it is written as a convolution."""
    if step.name != "conv_general_dilated" or step.inputs[1].view is None:
        return "", set()
    kernel = step.inputs[1]
    window = step.params["dimension_numbers"].rhs_spec[2:]
    if any(kernel.shape[i] != 1 for i in window) or step.params["feature_group_count"] != 1:
        return "", set()
    assert kernel.view is not None, "asked for above"
    what = "its product is a convolution over one place: write it as a product, `x @ kernel[0]`"
    return what, {kernel.view.leaf.name}


def _made_of(value: Val) -> tuple[str, set[str]] | None:
    """Return how a value is made of weights alone; None where it is made of anything else."""
    weights: set[str] = set()
    reason = ""
    stack = [value]
    while stack:
        one = stack.pop()
        step = one.step
        if one.view is not None:
            weights.add(one.view.leaf.name)
        elif one.const is not UNKNOWN:
            continue
        elif step is None:
            return None
        elif step.name in _PICKS and step.inputs[0].view is not None and len(one.shape) > 1:
            weights.add(step.inputs[0].view.leaf.name)
            reason = "its weight is picked by an index that is only known when it runs: use a scan"
        else:
            reason = reason or (
                f"its weight is computed by `{step.name}`: a block has leaves as they are, cast, "
                "sliced, transposed or reshaped; compute it once, before, and pass the result"
            )
            stack.extend(step.inputs)
    return (reason, weights) if weights and reason else None
