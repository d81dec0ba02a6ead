"""Blocks that cannot be converted because something else uses their weights."""

from __future__ import annotations

from collections import defaultdict

from moecc.weights.expr import Box, Expr, sources
from moecc.weights.movement import Index, Permute, Slice
from moecc_backends.islands.scopes import Step
from moecc_backends.islands.sites import Key, Site, Survey
from moecc_backends.islands.uses import Use, overlap, uses

OWN = "give each use a leaf of its own, and leave weight decay to the optimiser"
"""The way out."""


def settle(survey: Survey) -> None:
    """Turn blocks of `survey` whose weights something else uses into near misses."""
    while _refuse_used(survey) or _refuse_shared(survey):
        pass


def steps_of(sites: list[Site]) -> set[Step]:
    """Return the steps of blocks."""
    return {step for site in sites for step in site.island.steps}


def _refuse_used(survey: Survey) -> bool:
    """Refuse blocks whose weights are used outside of blocks; return whether there were any."""
    others: dict[str, list[Use]] = defaultdict(list)
    for use in uses(survey.scope, steps_of(survey.sites)):
        others[use.view.leaf.name].append(use)
    before = len(survey.sites)
    for site in list(survey.sites):
        other = _other_use(site, others)
        if other is not None:
            survey.refuse(site, f"`{other.view.leaf.name}` is also used by {other}: {OWN}")
    return len(survey.sites) < before


def _other_use(site: Site, others: dict[str, list[Use]]) -> Use | None:
    for param in site.block.params:
        for use in others.get(param.view.leaf.name, ()):
            if overlap(param.view, use.view):
                return use
    return None


def _refuse_shared(survey: Survey) -> bool:
    """Refuse blocks that share a weight and differ otherwise; return whether there were any."""
    users: dict[str, dict[Key, list[Box]]] = defaultdict(dict)
    for site in survey.sites:
        for key in site.keys:
            for weight in key[1]:
                (source,) = sources(weight)
                users[source.name].setdefault(key, []).append(_box(weight))
    shared = {k for by_key in users.values() for k in _overlapping(by_key)}
    found = [site for site in survey.sites if not shared.isdisjoint(site.keys)]
    for site in found:
        survey.refuse(site, f"another block uses its weights in another way: {OWN}")
    return bool(found)


def _overlapping(by_key: dict[Key, list[Box]]) -> set[Key]:
    """Return the blocks whose parts of a leaf overlap with those of another."""
    every = [(box, key) for key, boxes in by_key.items() for box in boxes]
    every.sort(key=lambda one: one[0])
    found: set[Key] = set()
    open_: list[tuple[Box, Key]] = []
    for box, key in every:
        start = box[0][0] if box else 0
        open_ = [one for one in open_ if not one[0] or one[0][0][1] > start]
        for other, user in open_:
            if user != key and _meet(box, other):
                found |= {key, user}
        open_.append((box, key))
    return found


def _meet(a: Box, b: Box) -> bool:
    return all(p < s and r < q for (p, q), (r, s) in zip(a, b, strict=True))


def _box(weight: Expr) -> Box:
    """Return the part of its leaf that a weight is of, or a box around it."""
    chain = [weight]
    while chain[-1].operands:
        chain.append(chain[-1].operands[0])
    leaf = chain[-1].type
    ends = dict(zip(leaf.names, ((0, n) for n in leaf.shape), strict=True))
    known = set(ends)
    for step in reversed(chain[:-1]):
        if isinstance(step, Index) and step.axis in known:
            ends[step.axis] = (step.at, step.at + 1)
            known.discard(step.axis)
        elif isinstance(step, Slice) and step.axis in known:
            ends[step.axis] = (step.start, step.stop)
            known.discard(step.axis)
        elif not isinstance(step, Permute):
            known &= set(step.type.names)
            if not isinstance(step, Index | Slice):
                break
    return tuple(ends.values())
