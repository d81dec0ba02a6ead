"""Products with weights that the search for blocks cannot see, and why: reported as near misses."""

from __future__ import annotations

from collections.abc import Iterator

from moecc_backends.islands.elements import is_elementwise
from moecc_backends.islands.find import OPAQUE, Miss
from moecc_backends.islands.jaxprs import contains, inner_jaxprs
from moecc_backends.islands.places import user_line
from moecc_backends.islands.scopes import UNKNOWN, Scope, Step, Val

_PICKS = ("dynamic_slice", "gather")
"""What picks a part of a stack by an index."""

_NO_PRODUCTS = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "custom_call")
"""Work whose products no jaxpr shows."""


def unseen(scope: Scope) -> Iterator[Miss]:
    """Yield what products with weights there are besides those that blocks are made of."""
    for step in scope.every_step():
        reason, weights = _hidden(step)
        if not reason:
            reason, weights = _computed(step)
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
        elif is_elementwise(step.equation) or step.name == "dot_general":
            reason = reason or (
                f"its weight is computed by `{step.name}`: a block has leaves as they are, cast, "
                "sliced, transposed or reshaped"
            )
            stack.extend(step.inputs)
        else:
            return None
    return (reason, weights) if weights and reason else None
