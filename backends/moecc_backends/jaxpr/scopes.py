"""A traced function as equations on variables: inlined calls, loops with bodies, views of weights.

A scope is a jaxpr at one level: the function, the body of a scan, a branch.  Variables know who
uses them, and which leaf of the parameters they are a view of.  Equations of jax are kept, so that
what is not rewritten runs as the user wrote it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.errors import InputError
from moecc.support.untyped import JsonDict
from moecc.types import dtype_from_numpy
from moecc_backends.jaxpr.views import (
    AnyArray,
    AnyArrays,
    Atom,
    Aval,
    JaxEquation,
    Jaxpr,
    LeafView,
    NotABlock,
    TreeLeaf,
    callee,
    contains,
    float_bits,
    function_line,
    has_inside,
    is_literal,
    line_of,
    opened,
    path_name,
    reshape_groups,
    run_jaxprs,
    scan_sizes,
    trace,
    unique,
    user_line,
)
from moecc_backends.xla.trace.values import Function, PyTree, is_float

UNKNOWN = object()
"""Stands for the value of a variable that is not constant."""

CHECKPOINTS = ("remat2", "checkpoint", "remat")
LOOPS = frozenset(("scan", "while", "cond", *CHECKPOINTS))
"""Loops, branches and checkpoints: equations that may have bodies."""


@dataclass(eq=False, repr=False)
class Variable:
    """A variable of a scope.

    Attributes:
      aval: its shape and type.
      equation: the equation that defines it; None for what comes into the scope.
      const: its value, where it is a constant; else `UNKNOWN`.
      view: the leaf that it is a view of, or None.
      users: the equations that use it, one entry for each operand.
      is_returned: whether the scope returns it.
      same: the first variable that the same equation makes of the same, such as a cast.
      name: of what argument of the function it is; empty for other variables.
    """

    aval: Aval
    equation: Equation | None = None
    const: Any = UNKNOWN
    view: LeafView | None = None
    users: list[Equation] = field(default_factory=list)
    is_returned: bool = False
    same: Variable = field(init=False)
    name: str = ""

    def __post_init__(self) -> None:
        self.same = self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(getattr(self.aval, "shape", ()))


@dataclass(eq=False, repr=False)
class Frame:
    """One inlined jaxpr: its equations use its variables.

    Attributes:
      jaxpr: the jaxpr.
      values: the variables of the scope by those of the jaxpr.
    """

    jaxpr: Jaxpr
    values: dict[Atom, Variable] = field(default_factory=dict)

    def read(self, atom: Atom) -> Variable:
        """Return the variable for one of the jaxpr, or for a number in an equation."""
        return Variable(atom.aval, const=atom.val) if is_literal(atom) else self.values[atom]


@dataclass(eq=False, repr=False)
class Equation:
    """An equation of a scope.

    Attributes:
      eqn: jax's equation.
      frame: the jaxpr that it is of.
      inputs: its operands.
      outputs: the variables that it defines.
      scope: the scope that it is in.
      bodies: the scopes of its jaxprs, where they may hold blocks.
    """

    eqn: JaxEquation
    frame: Frame
    inputs: list[Variable]
    outputs: list[Variable]
    scope: JaxprScope
    bodies: tuple[JaxprScope, ...] = ()
    _inner: dict[int, JaxprScope] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return str(self.eqn.primitive.name)

    @property
    def params(self) -> JsonDict:
        """The parameters of its primitive."""
        params: JsonDict = self.eqn.params
        return params

    @property
    def line(self) -> str:
        """Its line in the user's program, or nothing."""
        return user_line(self.eqn)

    @property
    def weight(self) -> int | None:
        """Which operand is the weight of a product with one; None for any other equation."""
        if self.name != "dot_general":
            return None
        views = [v.view is not None for v in self.inputs]
        return views.index(True) if sum(views) == 1 else None

    def body_operands(self) -> list[list[tuple[int, str]]]:
        """Return for each body of a loop, branch or checkpoint which operands come into it.

        They do so ``fixed``, ``carried`` from iteration to iteration, or ``stacked``: row by row.
        """
        count = len(self.inputs)
        if self.name == "scan":
            consts, carried = scan_sizes(self.params)
            roles = ["fixed"] * consts + ["carried"] * carried
            return [list(enumerate(roles + ["stacked"] * (count - len(roles))))]
        if self.name == "while":
            first, second = self.params["cond_nconsts"], self.params["body_nconsts"]
            state = [(i, "carried") for i in range(first + second, count)]
            fixed = [(i, "fixed") for i in range(first + second)]
            return [[*fixed[:first], *state], [*fixed[first:], *state]]
        if self.name == "cond":
            return [[(i, "fixed") for i in range(1, count)]] * len(self.params["branches"])
        return [[(i, "fixed") for i in range(count)]]

    def bound(self) -> list[list[Variable]]:
        """Return for each operand the variables in bodies that stand for it."""
        inner: list[list[Variable]] = [[] for _ in self.inputs]
        for body, operands in zip(self.bodies, self.body_operands(), strict=True):
            for (i, _), variable in zip(operands, body.inputs, strict=True):
                inner[i].append(variable)
        return inner

    def inner(self, index: int = 0) -> JaxprScope:
        """Return the scope of one of its jaxprs: a body, or a scope for inspection alone.

        The equations of the latter are no users of the operands.
        """
        if self.bodies:
            return self.bodies[index]
        if index not in self._inner:
            jaxpr = run_jaxprs(self.eqn)[index]
            inputs = [Variable(v.aval) for v in opened(jaxpr)[0].invars]
            if self.name not in LOOPS:
                for variable, operand in zip(inputs, self.inputs, strict=False):
                    variable.const, variable.view = operand.const, operand.view
            self._inner[index] = fill(JaxprScope(self.scope, None), jaxpr, inputs)
        return self._inner[index]


@dataclass(eq=False, repr=False)
class JaxprScope:
    """A jaxpr at one level.

    Attributes:
      outer: the scope around it, or None.
      owner: the equation of the outer scope whose body it is.
      inputs: the variables that come in.
      equations: its equations, in order.
      outputs: the variables that it returns.
    """

    outer: JaxprScope | None = None
    owner: Equation | None = None
    inputs: list[Variable] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)
    outputs: list[Variable] = field(default_factory=list)

    def every_equation(self) -> Iterator[Equation]:
        """Yield all equations; the equations of a body follow the equation that has it."""
        for equation in self.equations:
            yield equation
            for body in equation.bodies:
                yield from body.every_equation()

    @property
    def owners(self) -> tuple[Equation, ...]:
        """The equations around it, outermost first."""
        if self.outer is None or self.owner is None:
            return ()
        return (*self.outer.owners, self.owner)


def fill(scope: JaxprScope, jaxpr: Jaxpr, inputs: list[Variable]) -> JaxprScope:
    """Put the equations of `jaxpr` into an empty scope; return it."""
    scope.inputs = inputs
    scope.outputs = _inline(scope, jaxpr, inputs, {})
    for variable in scope.outputs:
        variable.is_returned = True
    return scope


def _inline(
    scope: JaxprScope, jaxpr: Jaxpr, inputs: Sequence[Variable], numbered: dict[object, Variable]
) -> list[Variable]:
    """Append the equations of `jaxpr` to a scope; return its results.

    Args:
      scope: the scope.
      jaxpr: the jaxpr.
      inputs: its arguments.
      numbered: the first result of each structural equation on the same operand.
    """
    inner, consts = opened(jaxpr)
    frame = Frame(inner)
    for variable, const in zip(inner.constvars, consts, strict=True):
        frame.values[variable] = Variable(variable.aval, const=const)
    frame.values.update(zip(inner.invars, inputs, strict=True))
    passed: dict[Atom, Atom] = {}
    for each in _live_equations(inner):
        eqn = _without_passed(each, passed)
        operands = [frame.read(atom) for atom in eqn.invars]
        called = callee(eqn)
        # A call of weights that may hold a product, or only changes their view.
        if (
            called is not None
            and any(v.view is not None for v in operands)
            and (
                contains(called, "dot_general")
                or all(e.primitive.name in STRUCTURAL for e in opened(called)[0].eqns)
            )
        ):
            results = _inline(scope, called, operands, numbered)
        else:
            equation = Equation(eqn, frame, operands, [], scope)
            results = equation.outputs = [Variable(v.aval, equation) for v in eqn.outvars]
            _connect(equation, numbered)
            scope.equations.append(equation)
        frame.values.update(zip(eqn.outvars, results, strict=True))
    return [frame.read(_renamed(atom, passed)) for atom in inner.outvars]


def _live_equations(jaxpr: Jaxpr) -> list[JaxEquation]:
    """Return the equations that results depend on, those with effects, and products, in order.

    haliax takes the first layer of a stack to see its shape, which is no use of its weights.  A
    product without a user says why a block is none, as in a function that returns a gradient; what
    is computed from it stays, too: the bias of a module that a model calls and has no use for.
    """
    unused: set[int] = set()
    for _ in range(2):
        needed = {atom for atom in jaxpr.outvars if not is_literal(atom)}
        live, from_unused = [], set()
        for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
            is_needed = index in unused or any(variable in needed for variable in eqn.outvars)
            is_product = eqn.primitive.name == "dot_general" or has_inside(eqn, "dot_general")
            if eqn.effects or is_product or is_needed:
                needed.update(atom for atom in eqn.invars if not is_literal(atom))
                live.append(eqn)
            if is_product and not is_needed:
                from_unused.update(eqn.outvars)
        for index, eqn in enumerate(jaxpr.eqns):
            if any(not is_literal(atom) and atom in from_unused for atom in eqn.invars):
                unused.add(index)
                from_unused.update(eqn.outvars)
    return live[::-1]


def _renamed(atom: Atom, passed: Mapping[Atom, Atom]) -> Atom:
    return atom if is_literal(atom) else passed.get(atom, atom)


def _without_passed(eqn: JaxEquation, passed: dict[Atom, Atom]) -> JaxEquation:
    """Return an equation that reads operands in place of `passed` results of checkpoints.

    A checkpoint loses the results that are its operands, and they join `passed`: a module whose
    checkpoint returns its parameters (``nnx.remat``) does not use them a second time.
    """
    invars = [_renamed(atom, passed) for atom in eqn.invars]
    if eqn.primitive.name not in CHECKPOINTS:
        return eqn.replace(invars=invars) if invars != eqn.invars else eqn
    jaxpr = eqn.params["jaxpr"]
    operands = dict(zip(jaxpr.invars, invars, strict=True))
    computed = []
    for result, inner in zip(eqn.outvars, jaxpr.outvars, strict=True):
        if not is_literal(inner) and inner in operands:
            passed[result] = operands[inner]
        else:
            computed.append((result, inner))
    short = jaxpr.replace(
        outvars=[inner for _, inner in computed], debug_info=jaxpr.debug_info.with_unknown_names()
    )
    return eqn.replace(
        invars=invars,
        outvars=[out for out, _ in computed],
        params={**eqn.params, "jaxpr": short},
    )


def _connect(equation: Equation, numbered: dict[object, Variable]) -> None:
    """Fill in the users of operands, the views of results, and bodies."""
    inputs, outputs = equation.inputs, equation.outputs
    for operand in inputs:
        operand.users.append(equation)
    for variable, view in zip(outputs, _views_of(equation), strict=False):
        variable.view = view
    if equation.name in STRUCTURAL and len(inputs) == len(outputs) == 1:
        params = repr(sorted(equation.params.items(), key=str))
        key = (equation.name, id(inputs[0].same), params)
        outputs[0].same = numbered.setdefault(key, outputs[0])
    has_weight = any(v.view is not None for v in inputs)
    if equation.name in LOOPS and has_weight and has_inside(equation.eqn, "dot_general"):
        pairs = zip(run_jaxprs(equation.eqn), equation.body_operands(), strict=True)
        equation.bodies = tuple(_body(equation, jaxpr, operands) for jaxpr, operands in pairs)


def _body(equation: Equation, jaxpr: Jaxpr, operands: list[tuple[int, str]]) -> JaxprScope:
    """Return the scope of a body; what a loop slices or carries is no constant there."""
    inputs = [Variable(v.aval) for v in opened(jaxpr)[0].invars]
    for variable, (i, role) in zip(inputs, operands, strict=True):
        operand = equation.inputs[i]
        if role == "fixed":
            variable.const, variable.view = operand.const, operand.view
        elif role == "stacked" and operand.view is not None:
            variable.view = operand.view.each(equation)
    return fill(JaxprScope(equation.scope, equation), jaxpr, inputs)


# Equations that only rearrange an array.

IDENTITY = frozenset(("copy", "copy_p", "name", "sharding_constraint", "pvary", "pcast"))
"""Equations whose result has the elements of the operand, in their places."""

REARRANGING = frozenset(
    ("transpose", "squeeze", "slice", "dynamic_slice", "split", "broadcast_in_dim", "reshape")
)
"""Equations that `rearranged` understands."""

STRUCTURAL = IDENTITY | REARRANGING | {"convert_element_type", "reduce_precision"}
"""Primitives through which a weight stays a view of its leaf."""


def rearranged(
    moves: Any, array: Any, dims: Sequence[Any], equation: Equation
) -> list[tuple[Any, list[Any]]]:
    """Return the results of an equation of `REARRANGING`, each with the axes of its dimensions.

    Args:
      moves: changes an array along axes: ``sliced(array, axis, start, stop)`` returns a part and
        its axis; ``indexed(array, axis, index)`` one element; ``regrouped(array, axes, sizes)``
        neighbouring axes joined and cut again, and the new ones.
      array: a view of a leaf, a term of a block, or nothing, where axes are labels of tokens.
      dims: the axis of each dimension; None where the array does not vary along it.
      equation: the equation.

    Raises:
      NotABlock: the array cannot be rearranged so.
    """
    params, shape = equation.params, equation.inputs[0].shape
    axes: list[Any] = []
    if equation.name == "transpose":
        return [(array, [dims[i] for i in params["permutation"]])]
    if equation.name == "squeeze":
        for axis in (dims[i] for i in params["dimensions"]):
            array = array if axis is None else moves.indexed(array, axis, 0)
        return [(array, [d for i, d in enumerate(dims) if i not in params["dimensions"]])]
    if equation.name == "broadcast_in_dim":
        axes = [None] * len(params["shape"])
        for axis, size, j in zip(dims, shape, params["broadcast_dimensions"], strict=True):
            if size == params["shape"][j]:
                axes[j] = axis
            elif axis is not None:
                array = moves.indexed(array, axis, 0)
        return [(array, axes)]
    if equation.name == "reshape":
        for before, after in reshape_groups(shape, params["new_sizes"]):
            sizes, parts = [shape[i] for i in before], [params["new_sizes"][j] for j in after]
            group: Sequence[Any] = [dims[i] for i in before]
            if sizes == parts:
                axes += group
                continue
            for axis, size in zip(group, sizes, strict=True):
                if size == 1 and axis is not None:
                    array = moves.indexed(array, axis, 0)
            group = [axis for axis, size in zip(group, sizes, strict=True) if size != 1]
            wide = [n for n in parts if n != 1]
            if wide != [n for n in sizes if n != 1]:
                array, group = moves.regrouped(array, group, wide)
            remaining = iter(group)
            axes += [next(remaining) if n != 1 else None for n in parts]
        return [(array, axes)]
    results = []
    for ranges in _ranges(equation, shape):
        part, axes = array, list(dims)
        for i, ((start, stop, stride), size) in enumerate(zip(ranges, shape, strict=True)):
            if axes[i] is None or (start, stop, stride) == (0, size, 1):
                continue
            if stride == 1:
                part, axes[i] = moves.sliced(part, axes[i], start, stop)
                continue
            if size % stride or start >= stride or stop <= size - stride + start:
                raise NotABlock("a slice with strides inside takes no part of equal parts")
            part, (axes[i], phase) = moves.regrouped(part, [axes[i]], (size // stride, stride))
            part = moves.indexed(part, phase, start)
        results.append((part, axes))
    return results


def _ranges(equation: Equation, shape: tuple[int, ...]) -> list[list[tuple[int, int, int]]]:
    """Return start, stop and stride of each dimension, for each result of a slice or split."""
    params = equation.params
    if equation.name == "slice":
        starts, stops = params["start_indices"], params["limit_indices"]
        return [list(zip(starts, stops, params["strides"] or [1] * len(shape), strict=True))]
    if equation.name == "split":
        ranges, start = [], 0
        for size in params["sizes"]:
            ranges.append([(0, n, 1) for n in shape])
            ranges[-1][params["axis"]] = (start, start + int(size), 1)
            start += int(size)
        return ranges
    if any(v.const is UNKNOWN for v in equation.inputs[1:]):
        raise NotABlock("a slice from a place that is only known when it runs is inside")
    pairs = zip(equation.inputs[1:], params["slice_sizes"], shape, strict=True)
    starts = [(min(max(int(v.const), 0), n - size), size) for v, size, n in pairs]
    return [[(start, start + size, 1) for start, size in starts]]


def _views_of(equation: Equation) -> list[LeafView]:
    """Return the views that an equation makes of a view; nothing where they are none."""
    name, inputs, params = equation.name, equation.inputs, equation.params
    view = inputs[0].view if inputs else None
    if name in ("mul", "div"):
        return _view_of_product(name, inputs)
    if view is None or name not in STRUCTURAL or not is_float(inputs[0].aval.dtype):
        return []
    if name == "convert_element_type":
        dtype = params["new_dtype"]
        casts = (*view.casts, str(jnp.dtype(dtype)))
        return [replace(view, casts=casts)] if is_float(dtype) else []
    if name == "reduce_precision":
        fraction, exponent = float_bits(inputs[0].aval.dtype)
        is_exact = params["mantissa_bits"] >= fraction and params["exponent_bits"] >= exponent
        return [view] if is_exact else []
    if name in IDENTITY:
        return [view]
    try:
        return [v.with_dims(dims) for v, dims in rearranged(LeafView, view, view.dims, equation)]
    except NotABlock:
        return []


def _view_of_product(name: str, inputs: Sequence[Variable]) -> list[LeafView]:
    """Return the view of a weight that is multiplied with, or divided by, the number 1."""
    weights = [v for v in (inputs if name == "mul" else inputs[:1]) if v.view is not None]
    numbers = [v.const for v in inputs if v.view is None and v.const is not UNKNOWN]
    if len(weights) != 1 or len(numbers) != 1 or np.size(numbers[0]) != 1:
        return []
    view = weights[0].view
    return [view] if view is not None and bool(np.all(np.asarray(numbers[0]) == 1)) else []


# Functions of a tree of parameters, traced anew for each call over the shapes of dense leaves.


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
        if len(fixed) == len(pairs):
            is_penzai = any(type(leaf).__module__.startswith("penzai") for leaf in fixed.values())
            raise InputError(
                "the parameters have no array",
                found=str(treedef)[:80] if pairs else "no parameters",
                hint="a penzai model holds variables: pass the values of pz.unbind_params(model), "
                "and bind them in the function with pz.bind_variables" if is_penzai else None,
            )  # fmt: skip
        arrays = {n: leaf for n, (_, leaf) in zip(names, pairs, strict=True) if is_array(leaf)}
        return cls(treedef, names, fixed), arrays

    @property
    def array_names(self) -> list[str]:
        """The names of the leaves that are arrays, in order."""
        return [n for i, n in enumerate(self.names) if i not in self.fixed]

    def unflatten(self, leaves: AnyArrays) -> AnyArray:
        """Return the tree of the arrays `leaves`; a missing leaf is None."""
        filled = [self.fixed.get(i, leaves.get(n)) for i, n in enumerate(self.names)]
        return jax.tree_util.tree_unflatten(self.treedef, filled)

    def flatten(self, tree: PyTree, where: str | None = None) -> dict[str, AnyArray]:
        """Return what stands in the places of leaves, by name.

        Args:
          tree: a tree of the same structure.
          where: the line of the function that takes it.

        Raises:
          InputError: `tree` is another one.
        """

        def short(words: object) -> str:
            text = str(words)
            return text if len(text) <= 200 else f"{text[:200]}…"

        try:
            leaves = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise InputError(
                "the parameters are another tree than the one that was converted",
                where=where,
                expected=short(self.treedef),
                found=short(jax.tree_util.tree_structure(tree)),
                hint="pass `moe.params`, or what an optimiser made of it: " + short(error),
            ) from None
        return {n: leaves[i] for i, n in enumerate(self.names) if i not in self.fixed}


def is_array(leaf: AnyArray) -> bool:
    """Return whether a leaf has elements and a type."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_key(dtype: Any) -> bool:
    """Return whether a type is of random keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.extended))


def leaves_of(arrays: AnyArrays) -> dict[str, TreeLeaf]:
    """Return the leaves that weights can be read from: those whose types have names in the IR."""
    typed = {n: a for n, a in arrays.items() if not is_key(a.dtype)}
    dtypes = {n: dtype_from_numpy(np.dtype(a.dtype)) for n, a in typed.items()}
    return {n: TreeLeaf(n, tuple(typed[n].shape), d) for n, d in dtypes.items() if d is not None}


@dataclass(frozen=True)
class TracedFunction:
    """A function, traced.

    Attributes:
      scope: its equations; the first inputs are the leaves that are arrays.
      treedef: the structure of its result.
      arguments: its other inputs by name, in order: ``batch.tokens``.
      arrays: what was passed for them.
    """

    scope: JaxprScope
    treedef: PyTree
    arguments: Mapping[str, Variable]
    arrays: Sequence[AnyArray]


def trace_function(
    function: Function,
    tree: ParamTree,
    avals: AnyArrays,
    weights: Mapping[str, TreeLeaf],
    arguments: tuple[Sequence[AnyArray], AnyArrays],
) -> TracedFunction:
    """Trace ``function(params, *args, **kwargs)``.

    Args:
      function: the user's function.
      tree: the structure of the parameters.
      avals: the dense shapes of the leaves, by name.
      weights: the leaves that weights are read from, by name; their types may be others.
      arguments: the other arguments, by position and by name.

    Raises:
      InputError: jax cannot trace it.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tuple(arguments))
    passed = {i: leaf for i, (_, leaf) in enumerate(pairs) if _is_value(leaf)}
    names = tree.array_names

    def flat(*arrays: AnyArray) -> AnyArray:
        params = tree.unflatten(dict(zip(names, arrays, strict=False)))
        traced = dict(zip(passed, arrays[len(names) :], strict=True))
        leaves = [traced.get(i, leaf) for i, (_, leaf) in enumerate(pairs)]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, leaves)
        result = function(params, *args, **kwargs)
        for path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]:
            if not _is_value(leaf):
                raise InputError(
                    "the function returns what is no array",
                    where=function_line(function),
                    expected="a tree of arrays",
                    found=f"{type(leaf).__name__} at {path_name(path) if path else 'the top'}",
                    hint="return it from another function; jax.jit takes no such function either",
                )
        return result

    try:
        jaxpr, result = trace(flat, [*(avals[n] for n in names), *passed.values()])
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise InputError(
            "jax cannot trace the function",
            where=line_of(error.__traceback__),
            found=str(error).split("\n", 1)[0],
            hint="it must run under jax.jit with all its arguments traced",
        ) from None
    inputs = [Variable(v.aval) for v in opened(jaxpr)[0].invars]
    for variable, name in zip(inputs, names, strict=False):
        variable.view = LeafView.of(weights[name]) if name in weights else None
    positions = _positions(function)
    labels = [_argument_name(pairs[i][0], positions) for i in passed]
    for variable, label in zip(inputs[len(names) :], labels, strict=True):
        variable.name = label
    scope = fill(JaxprScope(), jaxpr, inputs)
    return TracedFunction(
        scope,
        jax.tree_util.tree_structure(result),
        dict(zip(labels, scope.inputs[len(names) :], strict=True)),
        list(passed.values()),
    )


def _is_value(leaf: AnyArray) -> bool:
    return is_array(leaf) or isinstance(leaf, int | float | complex)


def _positions(function: Function) -> list[str]:
    """Return the names of the positional arguments of a function after the parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional][1:]


def _argument_name(path: Sequence[AnyArray], positions: Sequence[str]) -> str:
    """Return the name of an array of ``(args, kwargs)``."""
    (kind, first, *inner) = path
    name = path_name([first])
    if kind.idx == 0 and first.idx < len(positions):
        name = positions[first.idx]
    return ".".join([name, path_name(inner)]) if inner else name
