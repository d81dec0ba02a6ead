"""Which dimensions of the values of a function are axes of tokens, as its inputs say.

A label goes with a dimension through the program: forward only, and lost where nothing is known.
It names the axes of a block's tokens, and shows a product that sums over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.support.untyped import Json
from moecc.types import is_name
from moecc_backends.jaxpr.blocks import INNER, OUTER
from moecc_backends.jaxpr.jaxprs import (
    Atom,
    Equation,
    Jaxpr,
    callee,
    is_literal,
    opened,
    scan_sizes,
)
from moecc_backends.jaxpr.scopes import Scope, Step, Traced, Val
from moecc_backends.jaxpr.survey import Survey
from moecc_backends.jaxpr.symbols import function_of
from moecc_backends.jaxpr.views import groups

Label = tuple[tuple[str, int], ...]
"""Names and sizes of the axes of tokens that a dimension runs over, outermost first."""

Dims = tuple[Label, ...]
"""The label of each dimension; empty where it is no axis of tokens."""

Inner = Callable[[int, Sequence[Dims]], list[Dims]]
"""Runs jaxpr number i of an equation on labels."""


@dataclass(frozen=True)
class _Site:
    """An equation on labels."""

    params: Json
    given: Sequence[Dims]
    shapes: Sequence[tuple[int, ...]]
    made: Sequence[tuple[int, ...]]
    inner: Inner


def label_values(scope: Scope, given: Mapping[Val, Dims]) -> dict[Val, Dims]:
    """Return the labels of all values of a function from those of its inputs."""
    found: dict[Val, Dims] = dict(given)
    _run_scope(scope, [found.get(v, unlabelled(v.shape)) for v in scope.inputs], found)
    return found


def unlabelled(shape: Sequence[int]) -> Dims:
    """Return the labels of a value without axes of tokens."""
    return ((),) * len(shape)


def _run_scope(scope: Scope, given: Sequence[Dims], found: dict[Val, Dims]) -> list[Dims]:
    found.update(zip(scope.inputs, given, strict=True))
    for step in scope.steps:
        labels = [found.get(v, unlabelled(v.shape)) for v in step.inputs]
        shapes = [v.shape for v in step.inputs]
        made = [v.shape for v in step.outputs]

        def inner(i: int, dims: Sequence[Dims], step: Step = step) -> list[Dims]:
            if step.bodies:
                return _run_scope(step.bodies[i], dims, found)
            return _run_jaxpr(_jaxprs(step.equation)[i], dims)

        site = _Site(step.params, labels, shapes, made, inner)
        found.update(zip(step.outputs, _apply(step.equation, site), strict=True))
    return [found.get(v, unlabelled(v.shape)) for v in scope.outputs]


def _run_jaxpr(jaxpr: Jaxpr, given: Sequence[Dims]) -> list[Dims]:
    inner, _ = opened(jaxpr)
    known: dict[Atom, Dims] = dict(zip(inner.invars, given, strict=True))

    def read(atom: Atom) -> Dims:
        return unlabelled(atom.aval.shape) if is_literal(atom) else known.get(
            atom, unlabelled(atom.aval.shape)
        )  # fmt: skip

    for equation in inner.eqns:
        jaxprs = _jaxprs(equation)

        def run(i: int, dims: Sequence[Dims], jaxprs: list[Jaxpr] = jaxprs) -> list[Dims]:
            return _run_jaxpr(jaxprs[i], dims)

        site = _Site(
            equation.params,
            [read(a) for a in equation.invars],
            [tuple(getattr(a.aval, "shape", ())) for a in equation.invars],
            [tuple(getattr(v.aval, "shape", ())) for v in equation.outvars],
            run,
        )
        known.update(zip(equation.outvars, _apply(equation, site), strict=True))
    return [read(a) for a in inner.outvars]


def _jaxprs(equation: Equation) -> list[Jaxpr]:
    params = equation.params
    if "branches" in params:
        return list(params["branches"])
    names = ("jaxpr", "call_jaxpr", "cond_jaxpr", "body_jaxpr")
    return [params[n] for n in names if n in params]


def _apply(equation: Equation, site: _Site) -> list[Dims]:
    name = str(equation.primitive.name)
    rule = _RULES.get(name)
    if callee(equation) is not None or name in ("custom_jvp_call", "custom_vjp_call"):
        rule = _called
    if rule is None:
        rule = _reduced if name.startswith(("reduce_", "arg")) else _by_shape
    if function_of(equation) is not None:
        rule = _by_place
    try:
        made = rule(site)
    except (IndexError, KeyError, TypeError, ValueError):
        # A form of the primitive that is not known here: its labels are lost, not wrong.
        made = []
    shapes = zip(made, site.made, strict=False)
    if len(made) != len(site.made) or any(len(d) != len(s) for d, s in shapes):
        return [unlabelled(s) for s in site.made]
    return made


def _by_place(site: _Site) -> list[Dims]:
    """A dimension of a result is that of the operands of the same rank."""
    made = []
    for shape in site.made:
        alike = [d for d in site.given if len(d) == len(shape)]
        made.append(_joined(alike, len(shape)))
    return made


def _by_shape(site: _Site) -> list[Dims]:
    """A dimension of a result is that of the operands of the same shape."""
    made = []
    for shape in site.made:
        pairs = zip(site.given, site.shapes, strict=True)
        made.append(_joined([d for d, s in pairs if s == shape], len(shape)))
    return made


def _joined(every: Sequence[Dims], rank: int) -> Dims:
    return tuple(next((d[i] for d in every if d[i]), ()) for i in range(rank))


def _called(site: _Site) -> list[Dims]:
    return site.inner(0, site.given)


def _reduced(site: _Site) -> list[Dims]:
    gone = site.params["axes"]
    left = tuple(d for i, d in enumerate(site.given[0]) if i not in gone)
    return [left for _ in site.made]


def _transposed(site: _Site) -> list[Dims]:
    return [tuple(site.given[0][i] for i in site.params["permutation"])]


def _squeezed(site: _Site) -> list[Dims]:
    gone = site.params["dimensions"]
    return [tuple(d for i, d in enumerate(site.given[0]) if i not in gone)]


def _broadcast(site: _Site) -> list[Dims]:
    made: list[Label] = [()] * len(site.made[0])
    for old, new in enumerate(site.params["broadcast_dimensions"]):
        if site.shapes[0][old] == site.made[0][new]:
            made[new] = site.given[0][old]
    return [tuple(made)]


def _reshaped(site: _Site) -> list[Dims]:
    old, new, given = site.shapes[0], site.made[0], site.given[0]
    made: list[Label] = [()] * len(new)
    for before, after in groups(old, new):
        if [old[i] for i in before] == [new[j] for j in after]:
            for i, j in zip(before, after, strict=True):
                made[j] = given[i]
            continue
        if any(not given[i] for i in before if old[i] != 1):
            continue
        parts = [one for i in before for one in given[i]]
        for j in after:
            made[j] = _taken(parts, new[j])
    return [tuple(made)]


def _taken(parts: list[tuple[str, int]], size: int) -> Label:
    """Take as many of `parts`, in order, as make up `size`."""
    taken: list[tuple[str, int]] = []
    product = 1
    while parts and product < size:
        taken.append(parts.pop(0))
        product *= taken[-1][1]
    return tuple(taken) if product == size else ()


def _product(site: _Site) -> list[Dims]:
    (summed, batch) = site.params["dimension_numbers"]
    made = [site.given[0][i] or site.given[1][j] for i, j in zip(*batch, strict=True)]
    for dims, over, shared in zip(site.given, summed, batch, strict=True):
        made += [d for i, d in enumerate(dims) if i not in over and i not in shared]
    return [tuple(made)]


def _gathered(site: _Site) -> list[Dims]:
    numbers = site.params["dimension_numbers"]
    operand, indices = site.given
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    window = iter([d for i, d in enumerate(operand) if i not in gone])
    places = iter(indices[:-1])
    rank = len(site.made[0])
    return [tuple(next(window) if i in numbers.offset_dims else next(places) for i in range(rank))]


def _scanned(site: _Site) -> list[Dims]:
    consts, carried = scan_sizes(site.params)
    fixed, stacked = list(site.given[:consts]), [d[1:] for d in site.given[consts + carried :]]
    carry = list(site.given[consts : consts + carried])
    made = site.inner(0, [*fixed, *carry, *stacked])
    again = [_joined((a, b), len(a)) for a, b in zip(carry, made[:carried], strict=True)]
    if again != carry:
        made = site.inner(0, [*fixed, *again, *stacked])
    return [*made[:carried], *(((), *d) for d in made[carried:])]


def _looped(site: _Site) -> list[Dims]:
    first, second = site.params["cond_nconsts"], site.params["body_nconsts"]
    carry = list(site.given[first + second :])
    site.inner(0, [*site.given[:first], *carry])
    return site.inner(1, [*site.given[first : first + second], *carry])


def _branched(site: _Site) -> list[Dims]:
    every = [site.inner(i, site.given[1:]) for i in range(len(site.params["branches"]))]
    return [_joined(dims, len(dims[0])) for dims in zip(*every, strict=True)]


def _convolved(site: _Site) -> list[Dims]:
    numbers = site.params["dimension_numbers"]
    made: list[Label] = [()] * len(site.made[0])
    for old, new in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
        if old != numbers.lhs_spec[1]:
            made[new] = site.given[0][old]
    return [tuple(made)]


def _none(site: _Site) -> list[Dims]:
    return [unlabelled(s) for s in site.made]


_RULES: dict[str, Callable[[_Site], list[Dims]]] = {
    "transpose": _transposed,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "dot_general": _product,
    "gather": _gathered,
    "scan": _scanned,
    "while": _looped,
    "cond": _branched,
    "conv_general_dilated": _convolved,
    "iota": _none,
    **dict.fromkeys(
        (
            "slice",
            "dynamic_slice",
            "dynamic_update_slice",
            "pad",
            "concatenate",
            "rev",
            "split",
            "convert_element_type",
            "copy",
            "cumsum",
            "sort",
        ),
        _by_place,
    ),
    "random_bits": _none,
    "remat2": _called,
    "checkpoint": _called,
    "remat": _called,
}


# The axes of tokens of a function, as the caller names them, and blocks that are none for that.

RESERVED = (OUTER, INNER, "group", "expert", "slot", "choice")
"""Names that blocks and routings give to axes."""


def token_labels(
    traced: Traced, tokens: Mapping[str, Sequence[str]], where: str
) -> dict[Val, Dims]:
    """Return which dimensions of the values of a function are axes of tokens.

    Args:
      traced: the function.
      tokens: names of the axes by argument; fewer names than dimensions name the first ones.
      where: the line of the function.

    Raises:
      UsageError: `tokens` is no mapping.
      InputError: there is no such argument, or it has fewer dimensions than names.
    """
    if not isinstance(tokens, Mapping):
        raise UsageError(
            "`tokens` is no mapping of arguments to names of axes",
            expected='{"batch.tokens": ("batch", "seq")}', found=repr(tokens),
        )  # fmt: skip
    given = traced.argument_values
    found = (_misfit(name, axes, given) for name, axes in tokens.items())
    problems = [replace(p, where=f"{where}, {p.where}") for p in found if p is not None]
    if problems:
        raise InputError(problems)
    labels = {}
    for name, axes in tokens.items():
        value = given[name]
        dims: list[Label] = [((axis, n),) for axis, n in zip(axes, value.shape, strict=False)]
        labels[value] = (*dims, *((),) * (len(value.shape) - len(dims)))
    return label_values(traced.scope, labels)


def _misfit(name: str, axes: Sequence[str], given: Mapping[str, Val]) -> Problem | None:
    if name not in given:
        hint = nearest(str(name), given) or f"arrays: {', '.join(given) or 'none'}"
        return Problem("the function has no such argument", f"tokens[{name!r}]", hint=hint)
    shape = given[name].shape
    if isinstance(axes, str):
        return Problem(
            "the names of axes are one word", f"tokens[{name!r}]", f"a tuple, ({axes!r},)", axes
        )
    if not isinstance(axes, Sequence) or not all(isinstance(a, str) for a in axes):
        return Problem(
            "not names of axes", f"tokens[{name!r}]", 'words, ("batch", "seq")', repr(axes)
        )
    if len(axes) > len(shape):
        return Problem(
            "the argument has fewer dimensions than axes are named", f"tokens[{name!r}]",
            ", ".join(axes), str(list(shape)),
        )  # fmt: skip
    wrong = [a for a in axes if not is_name(a) or a in RESERVED]
    if wrong or len(set(axes)) < len(axes):
        return Problem(
            "not names of axes of tokens", f"tokens[{name!r}]",
            f"different words, none of {', '.join(RESERVED)}", ", ".join(axes),
        )  # fmt: skip
    return None


def refuse_mixing(survey: Survey, labels: Mapping[Val, Dims]) -> None:
    """Turn blocks that sum over tokens, or have none, into near misses."""
    if not labels:
        return
    for site in list(survey.sites):
        island = site.island
        dims = labels.get(island.x, ())
        mixed = dims[island.outer] if dims else ()
        if mixed:
            axis = " and ".join(name for name, _ in mixed)
            survey.refuse(
                site,
                f"its products sum over {axis}, an axis of tokens: it mixes them, and routes none",
            )
        elif not any(dims):
            survey.refuse(site, "its input has no axis of tokens: name it in `tokens`")
