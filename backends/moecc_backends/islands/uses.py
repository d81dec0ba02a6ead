"""Who uses the leaves of the parameters, and which part of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from moecc_backends.islands.places import user_line
from moecc_backends.islands.scopes import Scope, Step, Val, bound
from moecc_backends.islands.views import View


@dataclass(frozen=True)
class Use:
    """A use of a leaf that is no view of it.

    Attributes:
      view: the part of the leaf.
      step: what uses it; None for the function that returns it.
    """

    view: View
    step: Step | None

    def __str__(self) -> str:
        if self.step is None:
            return "the function returns it"
        line = user_line(self.step.equation)
        return f"`{self.step.name}`" + (f" at {line}" if line else "")


def uses(scope: Scope, besides: Collection[Step]) -> Iterator[Use]:
    """Yield the uses of leaves in a scope and its bodies by other steps than `besides`."""
    for step in scope.steps:
        if step in besides:
            continue
        passed = _passes(step)
        for value, handed_on in zip(step.inputs, passed, strict=True):
            if value.view is not None and not handed_on:
                yield Use(value.view, step)
        for body in step.bodies:
            yield from uses(body, besides)
    for value in scope.outputs:
        if value.view is not None:
            yield Use(value.view, scope.owner)


def _passes(step: Step) -> list[bool]:
    """Return for each operand whether it is only seen in another way, or handed to a body."""
    if step.bodies:
        return [_all_views(values) for values in bound(step)]
    is_view = bool(step.outputs) and _all_views(step.outputs)
    return [is_view and i == 0 for i in range(len(step.inputs))]


def _all_views(values: list[Val]) -> bool:
    return bool(values) and all(v.view is not None for v in values)


def rows(view: View) -> tuple[int, int]:
    """Return the range of the first axis of the leaf that a view sees, or a range around it."""
    if not view.leaf.shape:
        return 0, 1
    start, stop = 0, view.leaf.shape[0]
    for step in view.steps:
        if step.axis != view.leaf.axes[0]:
            continue
        if step.kind == "slice":
            first, last = (int(str(a)) for a in step.args)
            start, stop = start + first, start + last
        elif step.kind == "index":
            start += int(str(step.args[0]))
            stop = start + 1
        return_early = step.kind in ("split", "each")
        if return_early:
            break
    return start, stop


def overlap(a: View, b: View) -> bool:
    """Return whether two views may see the same part of a leaf."""
    if a.leaf.name != b.leaf.name:
        return False
    (first, last), (start, stop) = rows(a), rows(b)
    return first < stop and start < last


def skipped(scope: Scope, inside: Collection[Step]) -> set[Step]:
    """Return the steps of a scope and its bodies that nothing needs if `inside` are replaced.

    These are the steps of `inside`, and views of weights for them alone.
    """
    gone = set(inside)
    _skip(scope, gone, {owner for step in inside for owner in step.scope.owners})
    return gone


def _skip(scope: Scope, gone: set[Step], holders: Collection[Step]) -> None:
    for step in reversed(scope.steps):
        if step in holders:
            for body in step.bodies:
                _skip(body, gone, holders)
        if step in gone or step.bodies or not step.outputs or not _all_views(step.outputs):
            continue
        if not any(_is_needed(v, gone, holders) for v in step.outputs):
            gone.add(step)


def _is_needed(value: Val, gone: Collection[Step], holders: Collection[Step]) -> bool:
    """Return whether a view of a weight is still used where the steps `gone` are not run.

    A loop that holds nothing that is replaced runs as it stands: it needs what it takes.
    """
    if value.is_returned:
        return True
    for user in value.users:
        if user in gone:
            continue
        if user not in holders:
            return True
        places = [i for i, v in enumerate(user.inputs) if v is value]
        inner = [bound(user)[i] for i in places]
        if any(not vs or any(_is_needed(v, gone, holders) for v in vs) for vs in inner):
            return True
    return False
