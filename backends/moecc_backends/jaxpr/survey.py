"""Products with weights that the search for blocks cannot see, and why: reported as near misses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod

from moecc.weights.expr import Box, Expr, Source, sources
from moecc.weights.movement import Index, Permute, Slice
from moecc.weights.simplify import simplify
from moecc_backends.jaxpr.blocks import (
    OPAQUE,
    Block,
    Island,
    Miss,
    block_of,
    find_islands,
    identity,
)
from moecc_backends.jaxpr.jaxprs import contains, indexed, inner_jaxprs, location, unique, user_line
from moecc_backends.jaxpr.scopes import LOOPS, UNKNOWN, Scope, Step, Val, bound
from moecc_backends.jaxpr.symbols import Misfit
from moecc_backends.jaxpr.views import View

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


# Where blocks run, and which they are: a block in the body of a scan is one for each iteration.

Key = tuple[str, tuple[Expr, ...]]
"""What identifies a block: its text, and what its parameters are of the leaves."""


@dataclass(frozen=True)
class Site:
    """A block where it runs.

    Attributes:
      island: its steps.
      block: its operations; its parameters as the iterations of loops see them.
    """

    island: Island
    block: Block

    @cached_property
    def loops(self) -> tuple[Step, ...]:
        """The loops that pick a part of a parameter, outermost first."""
        used = {loop for p in self.block.params for loop in p.view.loops}
        return tuple(s for s in self.island.scope.owners if s in used)

    @cached_property
    def identity(self) -> str:
        """What it computes in any element type."""
        return identity(self.island)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How often each of the loops runs."""
        return tuple(int(loop.params["length"]) for loop in self.loops)

    @property
    def count(self) -> int:
        """How many blocks it is."""
        return prod(self.lengths)

    @cached_property
    def keys(self) -> list[Key]:
        """The blocks that it is, the last loop fastest."""
        return [(self.block.text, self.expressions(at)) for at in self.iterations()]

    def iterations(self) -> list[dict[Hashable, int]]:
        """Return the iterations of the loops, in order."""
        every = product(*map(range, self.lengths))
        return [dict(zip(self.loops, at, strict=True)) for at in every]

    def expressions(self, at: Mapping[Hashable, int]) -> tuple[Expr, ...]:
        """Return the weights of the parameters in one iteration."""
        return tuple(simplify(p.expression(at)) for p in self.block.params)


@dataclass(frozen=True)
class Instance:
    """A block of the model.

    Attributes:
      loc: its location, ``layers.0.mlp``.
      params: the names of its parameters.
      weights: what they are of the leaves.
      summary: the names of its operations.
      line: where it is in the user's program.
      identity: what it computes in any element type.
    """

    loc: str
    params: tuple[str, ...]
    weights: tuple[Expr, ...]
    summary: str
    line: str
    identity: str


@dataclass
class Survey:
    """The blocks of a function: where they run, and why others are none.

    Attributes:
      scope: the function.
      sites: where blocks run, in order.
      misses: what is nearly a block.
    """

    scope: Scope
    sites: list[Site] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves that weights are read from, in order."""
        return tuple(v.view.leaf.name for v in self.scope.inputs if v.view is not None)

    @property
    def unused(self) -> tuple[str, ...]:
        """The names of those that the function does not use."""
        idle = (v.view for v in self.scope.inputs if not v.users and not v.is_returned)
        return tuple(view.leaf.name for view in idle if view is not None)

    def refuse(self, site: Site, reason: str) -> None:
        """Note that `site` is no block after all, and why."""
        leaves = tuple(sorted({p.view.leaf.name for p in site.block.params}))
        self.sites = [s for s in self.sites if s is not site]
        self.misses.append(Miss(leaves, reason, site.island.line))

    def instances(self) -> dict[Key, Instance]:
        """Return the blocks of the model, each once, in order."""
        found = self.first_sites()
        names = _param_names(found)
        locations = unique(location(names[key]) for key in found)
        return {
            key: Instance(
                loc, names[key], key[1], site.block.summary, site.island.line, site.identity
            )
            for (key, site), loc in zip(found.items(), locations, strict=True)
        }

    def first_sites(self) -> dict[Key, Site]:
        """Return where each block runs first, in order."""
        found: dict[Key, Site] = {}
        for site in self.sites:
            for key in site.keys:
                found.setdefault(key, site)
        return found


def survey(scope: Scope) -> Survey:
    """Return the blocks of a traced function."""
    search = find_islands(scope)
    made = Survey(scope, misses=list(search.misses))
    for island in search.islands:
        try:
            made.sites.append(Site(island, block_of(island)))
        except Misfit as misfit:
            made.misses.append(Miss(island.leaves, str(misfit), island.line))
    made.misses += unseen(scope)
    return made


def _param_names(found: Iterable[Key]) -> dict[Key, tuple[str, ...]]:
    """Return the names of the parameters of each block; one weight has one name."""
    weights = dict.fromkeys(w for _, ws in found for w in ws)
    single = dict(zip(weights, unique(map(_weight_name, weights)), strict=True))
    return {key: tuple(single[w] for w in key[1]) for key in found}


def _weight_name(weight: Expr) -> str:
    """Return a name for a part of a leaf."""
    if isinstance(weight, Source):
        return weight.name
    name = _weight_name(weight.operands[0])
    if isinstance(weight, Index):
        return indexed(name, weight.at)
    if isinstance(weight, Slice):
        return f"{name}.{weight.start}_{weight.stop}"
    return name


# Who uses the leaves of the parameters, and which part of them.


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


# Blocks that cannot be converted because something else uses their weights.

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
