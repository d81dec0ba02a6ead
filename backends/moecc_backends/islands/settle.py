"""Blocks that cannot be converted because something else uses their weights."""

from __future__ import annotations

from collections import defaultdict

from moecc.weights.expr import Expr, sources
from moecc.weights.movement import Index, Permute, Slice
from moecc_backends.islands.scopes import Step
from moecc_backends.islands.sites import Key, Site, Survey
from moecc_backends.islands.uses import Use, overlap, uses


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
            survey.refuse(site, f"`{other.view.leaf.name}` is also used by {other}")
    return len(survey.sites) < before


def _other_use(site: Site, others: dict[str, list[Use]]) -> Use | None:
    for param in site.block.params:
        for use in others.get(param.view.leaf.name, ()):
            if overlap(param.view, use.view):
                return use
    return None


def _refuse_shared(survey: Survey) -> bool:
    """Refuse blocks that share a weight and differ otherwise; return whether there were any."""
    users: dict[str, dict[Key, list[tuple[int, int]]]] = defaultdict(dict)
    for site in survey.sites:
        for key in site.keys:
            for weight in key[1]:
                (source,) = sources(weight)
                users[source.name].setdefault(key, []).append(_rows(weight))
    shared = {k for by_key in users.values() for k in _overlapping(by_key)}
    found = [site for site in survey.sites if not shared.isdisjoint(site.keys)]
    for site in found:
        survey.refuse(site, "another block uses its weights in another way")
    return bool(found)


def _overlapping(by_key: dict[Key, list[tuple[int, int]]]) -> set[Key]:
    ends = sorted((start, stop, i, key) for i, (key, parts) in enumerate(by_key.items())
                  for start, stop in parts)  # fmt: skip
    found: set[Key] = set()
    last: tuple[int, Key] | None = None
    for start, stop, _, key in ends:
        if last is not None and start < last[0] and key != last[1]:
            found |= {key, last[1]}
        if last is None or stop > last[0]:
            last = (stop, key)
    return found


def _rows(weight: Expr) -> tuple[int, int]:
    """Return the range of the first axis of its leaf that a weight is of, or a range around it."""
    chain = [weight]
    while chain[-1].operands:
        chain.append(chain[-1].operands[0])
    leaf = chain[-1]
    if not leaf.type.axes:
        return 0, 1
    first = leaf.type.names[0]
    for step in reversed(chain[:-1]):
        if isinstance(step, Index) and step.axis == first:
            return step.at, step.at + 1
        if isinstance(step, Slice) and step.axis == first:
            return step.start, step.stop
        if not isinstance(step, Index | Slice | Permute):
            break
    return 0, leaf.type.shape[0]
