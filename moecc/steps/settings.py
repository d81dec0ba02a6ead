"""How each parameter is trained: its rate, its decay, whether it is at all, which axes are blocks.

All of it is said of the parameters of the model; where equal layers are rolled into one parameter,
they must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from moecc.analysis.groups import GROUPS, parameter_groups, trainable
from moecc.errors import InputError, Problem, nearest
from moecc.ir.attributes import ProductAttrs
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.traits import Role
from moecc.train.recipe import OptimizerSection, ParameterGroup
from moecc.types.ranges import element, lengths

_REPEATED = ("layer", "expert")
"""The axes along which a parameter is one of many: layers that are rolled, and experts."""


@dataclass(frozen=True)
class ParamSettings:
    """How one parameter is trained.

    Attributes:
      trained: whether it is; else it has no gradient and no moments.
      rate: a factor on the learning rate.
      decay: the weight decay.
      blocks: the dimensions along which each slice is a parameter by itself: layers, experts.
      over: the other dimensions that products sum over; empty for what is no matrix.
      is_table: whether it is a table of tokens, or makes logits.
      first_step: how many steps are done before it is trained.
    """

    trained: bool
    rate: float
    decay: float
    blocks: tuple[int, ...]
    over: tuple[int, ...]
    is_table: bool
    first_step: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether products read it."""
        return bool(self.over)


def parameter_settings(graph: Graph, section: OptimizerSection) -> dict[str, ParamSettings]:
    """Return how each parameter of `graph` is trained.

    The first group that matches a parameter holds.  Without one, matrices decay as the optimiser
    says, and nothing else does: by what reads a parameter, never by the number of its axes, which
    rolled norms and vectors of experts have two of.

    Raises:
      InputError: a group matches nothing, all is frozen, or parts of a rolled parameter differ.
    """
    free, groups = trainable(graph), parameter_groups(graph)
    chosen = _Chosen(section.groups)
    made, problems = {}, []
    for name, value in graph.params.items():
        if not value.users or not value.type.dtype.is_float:
            continue
        found = chosen.group_of(name, groups[name])
        problems += found[1]
        made[name] = _settings(value, free[name], found[0], section)
    problems += chosen.unmatched()
    if made and not any(settings.trained for settings in made.values()):
        hint = "moecc evaluate measures a model as it is"
        problems.append(Problem("no parameter is trained", "optimizer.groups", hint=hint))
    if problems:
        raise InputError(problems)
    return made


def _settings(
    value: Value, free: bool, group: ParameterGroup | None, section: OptimizerSection
) -> ParamSettings:
    names = value.type.names
    over = tuple(n for n in names if _is_summed(value, n))
    blocks = tuple(n for n in _REPEATED if n in names and n not in over)
    if set(names) == {*over, *blocks}:
        # The rows of a router are those of one matrix.
        blocks = tuple(n for n in blocks if n != "expert")
    is_matrix = bool(over) and len(names) > len(over) + len(blocks)
    own = group is not None and group.decay >= 0
    decay = group.decay if group is not None and own else section.decay * is_matrix
    return ParamSettings(
        free and not (group is not None and group.freeze),
        1.0 if group is None else group.rate,
        decay,
        tuple(names.index(n) for n in blocks),
        tuple(names.index(n) for n in over) if is_matrix else (),
        "vocab" in names,
        0 if group is None else group.from_step,
    )


def _is_summed(value: Value, name: str) -> bool:
    """Return whether a product that reads `value` sums over its axis `name`."""
    return any(name in ProductAttrs.of_node(node).over for node in _products(value))


def _products(param: Value) -> Iterator[Node]:
    """Yield the nodes that read `param` as a matrix, through what passes it on and into scans."""
    left, seen = [param], {param}
    while left:
        value = left.pop()
        for node in value.users:
            made: list[Value] = []
            if node.body is not None:
                inner = zip(node.operands, node.body.inputs.values(), strict=True)
                made = [i for v, i in inner if v is value]
            elif node.op.carries or node.op.collective is not None:
                made = list(node.results)
            elif node.op.role(node.operands.index(value)) is Role.MATRIX:
                yield node
            left += [v for v in made if v not in seen]
            seen.update(made)


@dataclass
class _Chosen:
    """The groups of a recipe, and which of them matched.

    Attributes:
      groups: in order; the first that matches holds.
    """

    groups: tuple[ParameterGroup, ...]

    def __post_init__(self) -> None:
        self._matched: set[int] = set()

    def group_of(
        self, name: str, kinds: frozenset[str]
    ) -> tuple[ParameterGroup | None, list[Problem]]:
        """Return the group of a parameter, and what is wrong with it."""
        members = _members(name)
        found = [self._first(m, kinds) for m in members]
        self._matched.update(i for i in found if i is not None)
        if len(set(found)) > 1:
            odd = next(m for m, i in zip(members, found, strict=True) if i != found[0])
            return None, [
                Problem("equal layers that are rolled belong to different groups", name,
                        f"the group of {members[0]}", f"{odd} is in another",
                        "run.rolled = false keeps layers apart")
            ]  # fmt: skip
        return (None if found[0] is None else self.groups[found[0]]), []

    def _first(self, name: str, kinds: frozenset[str]) -> int | None:
        fits = (
            i
            for i, group in enumerate(self.groups)
            if group.match in kinds or fnmatchcase(name, group.match)
        )
        return next(fits, None)

    def unmatched(self) -> Iterator[Problem]:
        """Yield the groups that no parameter is in, for which one is looked in vain."""
        for number, group in enumerate(self.groups):
            hidden = any(group.match == other.match for other in self.groups[:number])
            if number not in self._matched and not hidden:
                is_known = group.match in GROUPS
                yield Problem(
                    "a group of parameters matches none", f"optimizer.groups[{number}].match",
                    f"a glob over names, or one of {', '.join(GROUPS)}", group.match,
                    "the model has none of them" if is_known else nearest(group.match, GROUPS),
                )  # fmt: skip


def _members(name: str) -> list[str]:
    """Return the parameters of the model that a rolled parameter holds, or its own name."""
    count = next(iter(lengths(name)), 0)
    return [element(name, at) for at in range(count)] if count else [name]
