"""A traced function as steps on values: calls inlined where they touch weights, loops with bodies.

A scope is a jaxpr at one level: the function, the body of a scan, a branch.  Values know who uses
them, and which leaf of the parameters they are a view of.  Equations are kept, so that what is not
rewritten runs as the user wrote it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.errors import InputError
from moecc.support.untyped import JsonDict
from moecc_backends.jaxpr.jaxprs import (
    AnyArray,
    Atom,
    Aval,
    Equation,
    Jaxpr,
    callee,
    contains,
    function_line,
    inner_jaxprs,
    is_literal,
    line_of,
    opened,
    path_name,
    scan_sizes,
    trace,
    unique,
)
from moecc_backends.jaxpr.views import STRUCTURAL, Leaf, View, dtype_named, views_through
from moecc_backends.xla.trace.typed_jax import Function, PyTree

UNKNOWN = object()
"""Stands for the value of what is not constant."""


@dataclass(eq=False, repr=False)
class Val:
    """A value of a scope.

    Attributes:
      aval: its shape and type.
      step: the step that defines it; None for what comes into the scope.
      index: which result of it.
      const: its value, where it is a constant; else `UNKNOWN`.
      view: the leaf that it is a view of, or None.
      users: the steps that use it, one entry for each operand.
      same: an earlier value that is equal, or this one.
    """

    aval: Aval
    step: Step | None = None
    index: int = 0
    const: Any = UNKNOWN
    view: View | None = None
    users: list[Step] = field(default_factory=list)
    is_returned: bool = False
    _same: Val | None = None

    @property
    def same(self) -> Val:
        """The first value that is made of the same by the same step, such as a cast."""
        return self if self._same is None else self._same

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(self.aval.shape)


@dataclass(eq=False, repr=False)
class Frame:
    """One inlined jaxpr: its equations use its variables.

    Attributes:
      jaxpr: the jaxpr.
      values: the values of its variables.
    """

    jaxpr: Jaxpr
    values: dict[Atom, Val] = field(default_factory=dict)

    def read(self, atom: Atom) -> Val:
        """Return the value of a variable, or of a number in an equation."""
        return Val(atom.aval, const=atom.val) if is_literal(atom) else self.values[atom]


@dataclass(eq=False, repr=False)
class Step:
    """An equation of a scope.

    Attributes:
      equation: the equation.
      frame: the jaxpr that it is of.
      inputs: the values of its operands.
      outputs: the values that it defines.
      scope: the scope that it is in.
      bodies: the scopes of its jaxprs, where they may hold blocks.
    """

    equation: Equation
    frame: Frame
    inputs: list[Val]
    outputs: list[Val]
    scope: Scope
    bodies: tuple[Scope, ...] = ()
    _inside: Scope | None = None

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return str(self.equation.primitive.name)

    @property
    def params(self) -> JsonDict:
        """The parameters of its equation."""
        found: JsonDict = self.equation.params
        return found

    def inside(self, *, custom: bool = False) -> Scope | None:
        """Return the scope of a plain call; None for every other step.

        It is for looking at: its steps are no users of the operands.

        Args:
          custom: whether a function with a derivative of its own counts as a call.
        """
        jaxpr = callee(self.equation)
        if custom and self.name == "custom_jvp_call":
            jaxpr = self.params["call_jaxpr"]
        if jaxpr is None:
            return None
        if self._inside is None:
            self._inside = Scope(self.scope, None)
            inputs = [Val(v.aval, const=v.const, view=v.view, _same=v) for v in self.inputs]
            fill(self._inside, jaxpr, inputs)
        return self._inside


@dataclass(eq=False, repr=False)
class Scope:
    """A jaxpr at one level.

    Attributes:
      outer: the scope around it, or None.
      owner: the step of the outer scope whose body it is.
      inputs: the values that come in.
      steps: its steps, in order.
      outputs: the values that it returns.
    """

    outer: Scope | None
    owner: Step | None
    inputs: list[Val] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[Val] = field(default_factory=list)

    def every_step(self) -> Iterator[Step]:
        """Yield all steps, those of bodies after the step that has them."""
        for step in self.steps:
            yield step
            for body in step.bodies:
                yield from body.every_step()

    @property
    def owners(self) -> tuple[Step, ...]:
        """The steps around it, outermost first."""
        if self.outer is None or self.owner is None:
            return ()
        return (*self.outer.owners, self.owner)


def function_scope(jaxpr: Jaxpr, leaves: Sequence[Leaf | None]) -> Scope:
    """Return a traced function as a scope; its first arguments are the parameters `leaves`.

    A parameter that is no weight, such as a random key, is None.
    """
    scope = Scope(None, None)
    variables = opened(jaxpr)[0].invars
    views = [None if leaf is None else View.whole(leaf) for leaf in leaves]
    inputs = [Val(v.aval, view=views[i] if i < len(views) else None)
              for i, v in enumerate(variables)]  # fmt: skip
    fill(scope, jaxpr, inputs)
    return scope


def fill(scope: Scope, jaxpr: Jaxpr, inputs: list[Val]) -> None:
    """Put the steps of `jaxpr` into an empty scope."""
    scope.inputs = inputs
    scope.outputs = _Filler(scope).inline(jaxpr, inputs)
    for value in scope.outputs:
        value.is_returned = True


class _Filler:
    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._known: dict[object, Val] = {}

    def inline(self, jaxpr: Jaxpr, inputs: Sequence[Val]) -> list[Val]:
        """Append the equations of `jaxpr`; return the values of its results."""
        inner, consts = opened(jaxpr)
        frame = Frame(inner)
        for variable, const in zip(inner.constvars, consts, strict=True):
            frame.values[variable] = Val(variable.aval, const=const)
        frame.values.update(zip(inner.invars, inputs, strict=True))
        for equation in inner.eqns:
            given = [frame.read(atom) for atom in equation.invars]
            called = callee(equation)
            if called is not None and _is_inlined(called, given):
                made = self.inline(called, given)
            else:
                made = self._append(equation, frame, given)
            frame.values.update(zip(equation.outvars, made, strict=True))
        return [frame.read(atom) for atom in inner.outvars]

    def _append(self, equation: Equation, frame: Frame, given: list[Val]) -> list[Val]:
        step = Step(equation, frame, given, [], self._scope)
        step.outputs = [Val(v.aval, step, i) for i, v in enumerate(equation.outvars)]
        for value in given:
            value.users.append(step)
        seen = views_through(step.name, step.params, given)
        for value, view in zip(step.outputs, seen, strict=False):
            value.view = view
        self._number(step)
        step.bodies = tuple(_bodies(step))
        self._scope.steps.append(step)
        return step.outputs

    def _number(self, step: Step) -> None:
        """Find out whether the same was made before of the same value."""
        if step.name not in STRUCTURAL or len(step.inputs) != 1 or len(step.outputs) != 1:
            return
        (x,) = step.inputs
        key = (step.name, id(x.same), repr(sorted(step.params.items(), key=str)))
        first = self._known.setdefault(key, step.outputs[0])
        if first is not step.outputs[0]:
            step.outputs[0]._same = first


def _is_inlined(called: Jaxpr, given: Sequence[Val]) -> bool:
    """Whether a call may hold a product with a weight, or only changes the view of one."""
    if not any(v.view is not None for v in given):
        return False
    inner, _ = opened(called)
    only_views = all(e.primitive.name in STRUCTURAL for e in inner.eqns)
    return only_views or contains(called, "dot_general")


def _bodies(step: Step) -> Iterator[Scope]:
    """Yield the scopes of a loop, a branch or a checkpoint that a weight comes into."""
    enter = _ENTER.get(step.name)
    if enter is None or not any(v.view is not None for v in step.inputs):
        return
    if not any(contains(j, "dot_general") for j in inner_jaxprs(step.equation)):
        return
    for jaxpr, given, views in enter(step):
        inner, _ = opened(jaxpr)
        inputs = [Val(var.aval, const=v.const, view=view)
                  for var, v, view in zip(inner.invars, given, views, strict=True)]  # fmt: skip
        body = Scope(step.scope, step)
        fill(body, jaxpr, inputs)
        yield body


Entered = Iterator[tuple[Jaxpr, Sequence[Val], list[View | None]]]


def _enter_scan(step: Step) -> Entered:
    consts, carried = scan_sizes(step.params)
    stacked = consts + carried
    views = [v.view for v in step.inputs[:consts]] + [None] * carried
    views += [v.view and v.view.each(0, step) for v in step.inputs[stacked:]]
    # What a scan slices or carries is no constant.
    given = [v if i < consts else Val(v.aval) for i, v in enumerate(step.inputs)]
    yield step.params["jaxpr"], given, views


def _enter_as_it_is(step: Step) -> Entered:
    yield step.params["jaxpr"], step.inputs, [v.view for v in step.inputs]


def _enter_branches(step: Step) -> Entered:
    given = step.inputs[1:]
    for branch in step.params["branches"]:
        yield branch, given, [v.view for v in given]


def _enter_while(step: Step) -> Entered:
    first, second = step.params["cond_nconsts"], step.params["body_nconsts"]
    carried = step.inputs[first + second :]
    loose = [Val(v.aval) for v in carried]
    for name, consts in (
        ("cond_jaxpr", step.inputs[:first]),
        ("body_jaxpr", step.inputs[first : first + second]),
    ):
        views = [*(v.view for v in consts), *(None for _ in carried)]
        yield step.params[name], [*consts, *loose], views


_ENTER = {
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_branches,
    "remat2": _enter_as_it_is,
    "checkpoint": _enter_as_it_is,
    "remat": _enter_as_it_is,
}

LOOPS = frozenset(_ENTER)
"""Loops, branches and checkpoints: steps that may have bodies."""


def bound(step: Step) -> list[list[Val]]:
    """Return for each operand of a step with bodies the values in bodies that stand for it."""
    if step.name == "cond":
        return [[], *([b.inputs[i] for b in step.bodies] for i in range(len(step.inputs) - 1))]
    if step.name == "while":
        first, second = step.params["cond_nconsts"], step.params["body_nconsts"]
        condition, body = step.bodies
        count = len(step.inputs) - first - second
        return [
            *([v] for v in condition.inputs[:first]),
            *([v] for v in body.inputs[:second]),
            *([condition.inputs[first + i], body.inputs[second + i]] for i in range(count)),
        ]
    return [[v] for v in step.bodies[0].inputs]


# Functions of parameters as scopes: traced anew for each call, over the shapes of dense leaves.


@dataclass(frozen=True)
class ParamTree:
    """A tree of dense parameters.

    Attributes:
      treedef: its structure.
      names: the name of each leaf, from its path.
      fixed: leaves that are no arrays, by their position: functions, for example.
    """

    treedef: PyTree
    names: tuple[str, ...]
    fixed: Mapping[int, AnyArray]

    @classmethod
    def of(cls, params: PyTree) -> tuple[ParamTree, dict[str, AnyArray]]:
        """Return a tree and its arrays by name.

        Raises:
          InputError: it has no array.
        """
        pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = tuple(unique(path_name(path) for path, _ in pairs))
        fixed = {i: leaf for i, (_, leaf) in enumerate(pairs) if not is_array(leaf)}
        arrays = {n: leaf for i, (n, (_, leaf)) in enumerate(zip(names, pairs, strict=True))
                  if i not in fixed}  # fmt: skip
        if not arrays:
            raise InputError("the parameters have no array", found=str(treedef)[:80])
        return cls(treedef, names, fixed), arrays

    @property
    def array_names(self) -> list[str]:
        """The names of the leaves that are arrays, in order."""
        return [n for i, n in enumerate(self.names) if i not in self.fixed]

    def unflatten(self, leaves: Mapping[str, AnyArray]) -> AnyArray:
        """Return the tree of the arrays `leaves`; those that are missing are None."""
        every = [self.fixed[i] if i in self.fixed else leaves.get(n)
                 for i, n in enumerate(self.names)]  # fmt: skip
        return jax.tree_util.tree_unflatten(self.treedef, every)

    def flatten(self, tree: PyTree, where: str | None = None) -> dict[str, AnyArray]:
        """Return what stands in the places of leaves, by name.

        Args:
          tree: a tree of the same structure.
          where: the line of the function that takes it.

        Raises:
          InputError: `tree` is another one.
        """
        try:
            leaves = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise InputError(
                "the parameters are another tree than the one that was converted",
                where=where,
                expected=_short(str(self.treedef)),
                found=_short(str(jax.tree_util.tree_structure(tree))),
                hint="pass `moe.params`, or what an optimiser made of it: " + _short(str(error)),
            ) from None
        return {n: leaves[i] for i, n in enumerate(self.names) if i not in self.fixed}


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def is_array(leaf: AnyArray) -> bool:
    """Return whether a leaf has elements and a type."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def leaf_of(name: str, array: AnyArray) -> Leaf | None:
    """Return a leaf as a weight is read from it; None where the type has no name in the IR."""
    dtype = dtype_named(np.dtype(array.dtype)) if not _is_key(array) else None
    return None if dtype is None else Leaf(name, tuple(array.shape), dtype)


def leaves_of(arrays: Mapping[str, AnyArray]) -> dict[str, Leaf]:
    """Return the leaves that weights can be read from."""
    found = ((n, leaf_of(n, array)) for n, array in arrays.items())
    return {n: leaf for n, leaf in found if leaf is not None}


def _is_key(array: AnyArray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.extended))


@dataclass(frozen=True)
class Traced:
    """A function, traced.

    Attributes:
      scope: its steps; the first inputs are the leaves that are arrays.
      treedef: the structure of its result.
      arguments: the names of the arrays among the other arguments, in order: ``batch.tokens``.
    """

    scope: Scope
    treedef: PyTree
    arguments: tuple[str, ...]

    @property
    def argument_values(self) -> dict[str, Val]:
        """The arrays among the other arguments by name."""
        given = self.scope.inputs[len(self.scope.inputs) - len(self.arguments) :]
        return dict(zip(self.arguments, given, strict=True))


def trace_function(
    function: Function,
    tree: ParamTree,
    avals: Mapping[str, AnyArray],
    weights: Mapping[str, Leaf],
    arguments: tuple[Sequence[AnyArray], Mapping[str, AnyArray]],
) -> tuple[Traced, list[AnyArray]]:
    """Trace ``function(params, *args, **kwargs)``; return it, and the arrays among the arguments.

    Args:
      function: the user's function.
      tree: the structure of the parameters.
      avals: the dense shapes of the leaves, by name.
      weights: the leaves that weights are read from, by name; their types may be others.
      arguments: the other arguments, by position and by name.

    Raises:
      InputError: jax cannot trace it.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tuple(arguments))
    leaves = [leaf for _, leaf in paths]
    is_traced = [is_array(x) or isinstance(x, int | float | complex) for x in leaves]
    given = [x for x, traced in zip(leaves, is_traced, strict=True) if traced]
    names = tree.array_names

    def flat(*arrays: AnyArray) -> AnyArray:
        params = tree.unflatten(dict(zip(names, arrays, strict=False)))
        rest = iter(arrays[len(names) :])
        every = [next(rest) if traced else x for x, traced in zip(leaves, is_traced, strict=True)]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, every)
        return _arrays(function(params, *args, **kwargs), function)

    try:
        jaxpr, result = trace(flat, [*(avals[n] for n in names), *given])
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise InputError(
            "jax cannot trace the function",
            where=line_of(error.__traceback__),
            found=str(error).split("\n", 1)[0],
            hint="it must run under jax.jit with all its arguments traced",
        ) from None
    scope = function_scope(jaxpr, [weights.get(n) for n in names])
    positions = _positions(function)
    called = [_argument_name(path, positions) for path, _ in paths]
    arrays = tuple(n for n, traced in zip(called, is_traced, strict=True) if traced)
    return Traced(scope, jax.tree_util.tree_structure(result), arrays), given


def _arrays(result: PyTree, function: Function) -> PyTree:
    """Return a result. Raises InputError where it has a leaf that is no array."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]:
        if not is_array(leaf) and not isinstance(leaf, int | float | complex):
            raise InputError(
                "the function returns what is no array",
                where=function_line(function),
                expected="a tree of arrays",
                found=f"{type(leaf).__name__} at {path_name(path) if path else 'the top'}",
                hint="return it from another function; jax.jit takes no such function either",
            )
    return result


def _positions(function: Function) -> list[str]:
    """Return the names of the positional arguments of a function after the parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in fixed][1:]


def _argument_name(path: Sequence[AnyArray], positions: Sequence[str]) -> str:
    """Return the name of an array of ``(args, kwargs)``."""
    (kind, first, *rest) = path
    name = path_name([first])
    if kind.idx == 0 and first.idx < len(positions):
        name = positions[first.idx]
    return ".".join([name, path_name(rest)]) if rest else name
