"""Functions of parameters as scopes: traced anew for each call, over the shapes of dense leaves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moecc.errors import InputError
from moecc_backends.islands.jaxprs import AnyArray, trace
from moecc_backends.islands.naming import path_name, unique
from moecc_backends.islands.places import function_line, line_of
from moecc_backends.islands.scopes import Scope, Val, function_scope
from moecc_backends.islands.views import Leaf, dtype_named
from moecc_backends.xla.trace.typed_jax import Function, PyTree


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
