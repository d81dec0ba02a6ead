"""Equations run on symbols: what a block computes, on named axes instead of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moecc_backends.islands.dag import (
    MATRICES,
    ONE_VALUE,
    Apply,
    Axes,
    Misfit,
    Node,
    Product,
    Sym,
    Weight,
    axes_of,
    indexed,
    reweighted,
    sliced,
    split,
)
from moecc_backends.islands.elements import folded, function_of
from moecc_backends.islands.jaxprs import callee, float_bits
from moecc_backends.islands.scopes import UNKNOWN, Scope, Step, Val
from moecc_backends.islands.structural import groups
from moecc_backends.islands.views import View

Custom = Callable[[Step], str | None]
"""Names the function with a derivative of its own that a step calls, where it is known."""

IDENTITY = frozenset(("copy", "copy_p", "name", "sharding_constraint", "pvary", "pcast"))
"""Equations whose result has the elements of the operand, in their places."""


class Symbols:
    """Runs steps on symbols.

    Args:
      axes: the axes found so far.
      dtype: the type that the block computes in.
      custom: names functions with derivatives of their own; None runs what they call instead.
    """

    def __init__(self, axes: Axes, dtype: Any, custom: Custom | None) -> None:
        self.axes = axes
        self.values: dict[Val, Sym] = {}
        self._dtype = jnp.dtype(dtype)
        self._itemsize = self._dtype.itemsize
        self._custom = custom

    def read(self, value: Val) -> Sym:
        """Return the symbol of a value.

        Raises:
          Misfit: it is neither known, nor a weight, nor a number.
        """
        found = self.values.get(value) or self.values.get(value.same)
        if found is None:
            found = self._outside(value)
            self.values[value] = found
        return found

    def _outside(self, value: Val) -> Sym:
        if value.view is not None:
            return self._weight(value)
        if value.const is not UNKNOWN:
            return _number(value)
        step = value.step
        if step is None or not all(_is_constant(v) for v in step.inputs):
            raise Misfit(f"it takes another value from outside: {ONE_VALUE}")
        self.run(step)
        return self.values[value]

    def _weight(self, value: Val) -> Sym:
        view = value.view
        assert view is not None, "asked for because it has one"
        self._check_casts(view)
        numbers = {name: self.axes.new(size) for name, size in view.sizes}
        self.axes.note(tuple(numbers.values()))
        return Sym(Weight(view, numbers), tuple(n if n is None else numbers[n] for n in view.dims))

    def _check_casts(self, view: View) -> None:
        """Raise Misfit where a weight is rounded to less than the block computes in."""
        for dtype in view.casts:
            wanted = (float_bits(self._dtype), float_bits(view.leaf.dtype.numpy))
            pairs = zip(float_bits(dtype), *wanted, strict=True)
            if any(kept < min(needed) for kept, *needed in pairs):
                raise Misfit(
                    f"its weight {view.leaf.name} is rounded to {dtype} first: a block has leaves "
                    f"as they are; cast its input to {dtype}, too, or the leaf"
                )

    def run(self, step: Step) -> None:
        """Find the symbols of what `step` defines.

        Raises:
          Misfit: it is no step of a block.
        """
        if step.outputs and step.outputs[0].view is not None:
            return
        inside = step.inside(custom=self._custom is None)
        if inside is not None:
            self._call(step, inside)
            return
        for value, made in zip(step.outputs, self._made(step), strict=True):
            self.values[value] = made

    def _call(self, step: Step, inside: Scope) -> None:
        for outer, inner in zip(step.inputs, inside.inputs, strict=True):
            self.values[inner] = self.read(outer)
        for one in inside.steps:
            self.run(one)
        for outer, inner in zip(step.outputs, inside.outputs, strict=True):
            self.values[outer] = self.read(inner)

    def _made(self, step: Step) -> list[Sym]:
        rule = _RULES.get(step.name)
        if rule is not None:
            return rule(self, step)
        if step.name == "custom_jvp_call" and self._custom is not None:
            name = self._custom(step)
            if name is None:
                raise Misfit("a function with a gradient of its own is inside")
        else:
            name = function_of(step.equation)
        if name is None:
            raise Misfit(f"`{step.name}` inside it does not work element by element")
        return [self.apply(name, step)]

    def apply(self, function: str, step: Step) -> Sym:
        """Return a function of the operands of a step, element by element."""
        given = [self.read(v) for v in step.inputs]
        if function == "where":
            given = [given[0], given[2], given[1]]
        _check_numbers(step)
        operands: list[Node | float] = [s.node for s in given]
        if step.name == "integer_pow":
            operands.append(float(step.params["y"]))
        numbers = tuple(x for x in operands if isinstance(x, float))
        if len(numbers) == len(operands):
            return Sym(folded(function, numbers))
        return Sym(Apply(function, tuple(operands)), self._together(given))

    def _together(self, given: Sequence[Sym]) -> tuple[int | None, ...]:
        rank = max(len(s.dims) for s in given)
        dims: list[int | None] = [None] * rank
        for symbol in given:
            for i, axis in enumerate(symbol.dims):
                if axis is None:
                    continue
                before = dims[i]
                dims[i] = axis if before is None else self.axes.unite(before, axis)
        found = tuple(d if d is None else self.axes.find(d) for d in dims)
        named = tuple(d for d in found if d is not None)
        if len(set(named)) < len(named):
            raise Misfit("two axes of one value would have to be the same")
        return found

    # --- steps that are not element by element

    def converted(self, step: Step) -> list[Sym]:
        """A cast: to a wider type and back, or of truth values to numbers."""
        x = self.read(step.inputs[0])
        old, new = step.inputs[0].aval.dtype, jnp.dtype(step.params["new_dtype"])
        if isinstance(x.node, float):
            return [x]
        if old == np.dtype(bool) and jnp.issubdtype(new, jnp.floating):
            return [Sym(Apply("where", (x.node, 1.0, 0.0)), x.dims)]
        if not (jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)):
            raise Misfit(f"a cast from {old} to {new} is inside")
        if new.itemsize < self._itemsize:
            raise Misfit(f"a cast to {new} is inside, narrower than its input: cast that, too")
        if new.itemsize == old.itemsize or isinstance(x.node, Weight | Product):
            return [x]
        wide = new.itemsize > old.itemsize
        return [Sym(Apply("wide" if wide else "narrow", (x.node,)), x.dims)]

    def same(self, step: Step) -> list[Sym]:
        """The operand as it is."""
        return [self.read(step.inputs[0])]

    def transposed(self, step: Step) -> list[Sym]:
        """The dimensions in another order."""
        x = self.read(step.inputs[0])
        return [Sym(x.node, tuple(x.dims[i] for i in step.params["permutation"]))]

    def broadcast(self, step: Step) -> list[Sym]:
        """More dimensions, along which nothing varies."""
        x = self.read(step.inputs[0])
        shape = step.params["shape"]
        if isinstance(x.node, float):
            return [Sym(x.node)]
        dims: list[int | None] = [None] * len(shape)
        for old, new in enumerate(step.params["broadcast_dimensions"]):
            if step.inputs[0].shape[old] == shape[new]:
                dims[new] = x.dims[old]
            elif x.dims[old] is not None:
                raise Misfit("an axis of size one is repeated inside")
        return [Sym(x.node, tuple(dims))]

    def reshaped(self, step: Step) -> list[Sym]:
        """Dimensions of size one come or go; an axis of weights is cut into several."""
        x = self.read(step.inputs[0])
        old, new = step.inputs[0].shape, step.outputs[0].shape
        if isinstance(x.node, float):
            return [Sym(x.node)]
        node, dims = x.node, list[int | None]()
        for before, after in groups(old, new):
            axes = [x.dims[i] for i in before if old[i] != 1]
            wide = [new[j] for j in after if new[j] != 1]
            if axes and len(axes) == 1 and len(wide) > 1 and axes[0] is not None:
                node, axes = self._parted(node, axes[0], tuple(wide))
            if len(axes) != len(wide):
                raise Misfit("a reshape inside joins axes")
            left = iter(axes)
            dims += [next(left) if new[j] != 1 else None for j in after]
        return [Sym(node, tuple(dims))]

    def _parted(
        self, node: Node, axis: int, parts: tuple[int, ...]
    ) -> tuple[Node, list[int | None]]:
        numbers = tuple(map(self.axes.new, parts))

        def change(weight: Weight, name: str) -> Weight:
            return split(weight, name, parts, numbers)

        return reweighted(node, self.axes.find(axis), change, self.axes), list(numbers)

    def squeezed(self, step: Step) -> list[Sym]:
        """Dimensions of size one go; an axis along which there is one element goes with them."""
        x = self.read(step.inputs[0])
        gone = step.params["dimensions"]
        node = x.node
        for i in gone:
            axis = x.dims[i] if x.dims else None
            if axis is not None and not isinstance(node, float):
                node = self._at(node, axis, 0)
        return [Sym(node, tuple(d for i, d in enumerate(x.dims) if i not in gone))]

    def _at(self, node: Node, axis: int, at: int) -> Node:
        def change(weight: Weight, name: str) -> Weight:
            return indexed(weight, name, at)

        return reweighted(node, self.axes.find(axis), change, self.axes)

    def cut(self, step: Step) -> list[Sym]:
        """A part of an axis that only weights have, or every n-th of its elements."""
        starts, stops = step.params["start_indices"], step.params["limit_indices"]
        strides = step.params["strides"] or [1] * len(starts)
        x = self.read(step.inputs[0])
        for dimension, ends in enumerate(zip(starts, stops, strides, strict=True)):
            start, stop, stride = map(int, ends)
            size = step.inputs[0].shape[dimension]
            if stride == 1:
                x = self._part(x, dimension, start, stop, size)
            else:
                x = self._every(x, dimension, start, stop, (stride, size))
        return [x]

    def split(self, step: Step) -> list[Sym]:
        """All parts of an axis that only weights have."""
        x, at, made = self.read(step.inputs[0]), 0, []
        whole = step.inputs[0].shape[step.params["axis"]]
        for size in step.params["sizes"]:
            made.append(self._part(x, step.params["axis"], at, at + int(size), whole))
            at += int(size)
        return made

    def _part(self, x: Sym, dimension: int, start: int, stop: int, size: int) -> Sym:
        axis = x.dims[dimension] if x.dims else None
        if axis is None or isinstance(x.node, float) or (start, stop) == (0, size):
            return x
        new = self.axes.new(stop - start)

        def change(weight: Weight, name: str) -> Weight:
            return sliced(weight, name, (start, stop), new)

        node = reweighted(x.node, self.axes.find(axis), change, self.axes)
        return Sym(node, tuple(new if i == dimension else d for i, d in enumerate(x.dims)))

    def _every(self, x: Sym, dimension: int, start: int, stop: int, steps: tuple[int, int]) -> Sym:
        stride, size = steps
        axis = x.dims[dimension] if x.dims else None
        if axis is None or isinstance(x.node, float):
            return x
        if size % stride or start >= stride or stop <= size - stride + start:
            raise Misfit("a slice with strides inside takes no part of equal parts")
        node, parts = self._parted(x.node, axis, (size // stride, stride))
        assert parts[1] is not None
        dims = tuple(parts[0] if i == dimension else d for i, d in enumerate(x.dims))
        return Sym(self._at(node, parts[1], start), dims)

    def product(self, step: Step) -> list[Sym]:
        """A contraction with a weight over one axis."""
        (contracted, batch) = step.params["dimension_numbers"]
        given = [self.read(v) for v in step.inputs]
        at = next((i for i, v in enumerate(step.inputs) if v.view is not None), None)
        if at is None or isinstance(given[1 - at].node, Weight | float):
            raise Misfit("a product without a weight is inside")
        if batch[0]:
            raise Misfit(
                "its weights have a matrix for each of several heads or groups: convert the "
                "function of one, and vmap the converted one"
            )
        if len(contracted[0]) != 1:
            raise Misfit(f"a product inside sums over more than one axis, or none: {MATRICES}")
        over = [s.dims[c[0]] for s, c in zip(given, contracted, strict=True)]
        if over[0] is None or over[1] is None:
            raise Misfit("a product inside sums what is repeated")
        axis = self.axes.unite(over[0], over[1])
        free = [[d for i, d in enumerate(s.dims) if i != c[0]]
                for s, c in zip(given, contracted, strict=True)]  # fmt: skip
        x, weight = given[1 - at].node, given[at].node
        assert isinstance(weight, Weight)
        assert not isinstance(x, float)
        made = Product(x, weight, axis)
        self.axes.note(tuple(axes_of(made, self.axes)))
        is_wide = step.outputs[0].aval.dtype.itemsize > self._itemsize
        node: Node = Apply("wide", (made,)) if is_wide else made
        return [Sym(node, (*free[0], *free[1]))]


def _number(value: Val) -> Sym:
    data = np.asarray(value.const)
    if data.size != 1:
        raise Misfit("it takes an array of constants: make it a parameter")
    if not (jnp.issubdtype(data.dtype, jnp.number) or data.dtype == bool):
        raise Misfit("it takes a constant that is no number")
    return Sym(float(data.reshape(()).astype(np.float64)))


def _is_constant(value: Val) -> bool:
    if value.const is not UNKNOWN:
        return True
    step = value.step
    if value.view is not None or step is None or callee(step.equation) is not None:
        return False
    known = function_of(step.equation) is not None or step.name in _RULES
    return known and bool(step.inputs) and all(map(_is_constant, step.inputs))


def _check_numbers(step: Step) -> None:
    for value in step.inputs:
        dtype = value.aval.dtype
        fits = jnp.issubdtype(dtype, jnp.floating) or dtype == np.dtype(bool)
        if not fits and value.const is UNKNOWN:
            raise Misfit(f"values of the type {dtype} are inside")


Rule = Callable[[Symbols, Step], list[Sym]]

_RULES: dict[str, Rule] = {
    **dict.fromkeys(IDENTITY, Symbols.same),
    "convert_element_type": Symbols.converted,
    "transpose": Symbols.transposed,
    "broadcast_in_dim": Symbols.broadcast,
    "reshape": Symbols.reshaped,
    "squeeze": Symbols.squeezed,
    "slice": Symbols.cut,
    "split": Symbols.split,
    "dot_general": Symbols.product,
}
