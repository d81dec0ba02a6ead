"""Which dimensions of the values of a function are axes of tokens, as its caller names them.

A label goes with a dimension through the program: forward only, and lost where nothing is known.
It names the axes of a block's tokens, and shows a product that sums over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.types import is_name
from moecc_backends.jaxpr.blocks import INNER, OUTER
from moecc_backends.jaxpr.jaxprs import callee
from moecc_backends.jaxpr.scopes import (
    CHECKPOINTS,
    Equation,
    Scope,
    TracedFunction,
    Variable,
    rearranged,
)
from moecc_backends.jaxpr.survey import Survey
from moecc_backends.jaxpr.symbols import function_of
from moecc_backends.jaxpr.views import NotABlock

Label = tuple[tuple[str, int], ...]
"""Names and sizes of the axes of tokens that a dimension runs over, outermost first."""

Labels = tuple[Label, ...]
"""The label of each dimension; empty where it is no axis of tokens."""

RESERVED = (OUTER, INNER, "group", "expert", "slot", "choice")
"""Names that blocks and routings give to axes."""

_BY_PLACE = frozenset(
    ("slice", "dynamic_slice", "dynamic_update_slice", "pad", "concatenate", "rev", "split")
) | {"convert_element_type", "copy", "cumsum", "sort", "reduce_precision"}  # fmt: skip
"""Equations whose results have the dimensions of operands of their rank."""


def token_labels(
    traced: TracedFunction, tokens: Mapping[str, Sequence[str]], where: str
) -> dict[Variable, Labels]:
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
    problems = [_misfit(name, axes, traced.arguments) for name, axes in tokens.items()]
    if any(problems):
        raise InputError(replace(p, where=f"{where}, {p.where}") for p in problems if p)
    labels: dict[Variable, Labels] = {}
    for name, axes in tokens.items():
        variable = traced.arguments[name]
        named: list[Label] = [((axis, n),) for axis, n in zip(axes, variable.shape, strict=False)]
        labels[variable] = (*named, *((),) * (len(variable.shape) - len(named)))
    _run(traced.scope, [_label(v, labels) for v in traced.scope.inputs], labels)
    return labels


def _misfit(name: str, axes: Sequence[str], arguments: Mapping[str, Variable]) -> Problem | None:
    where = f"tokens[{name!r}]"
    if name not in arguments:
        hint = nearest(str(name), arguments) or f"arrays: {', '.join(arguments) or 'none'}"
        return Problem("the function has no such argument", where, hint=hint)
    shape = arguments[name].shape
    if isinstance(axes, str):
        return Problem("the names of axes are one word", where, f"a tuple, ({axes!r},)", axes)
    if not isinstance(axes, Sequence) or not all(isinstance(a, str) for a in axes):
        return Problem("not names of axes", where, 'words, ("batch", "seq")', repr(axes))
    if len(axes) > len(shape):
        words = "the argument has fewer dimensions than axes are named"
        return Problem(words, where, ", ".join(axes), str(list(shape)))
    if not all(is_name(a) and a not in RESERVED for a in axes) or len(set(axes)) < len(axes):
        expected = f"different words, none of {', '.join(RESERVED)}"
        return Problem("not names of axes of tokens", where, expected, ", ".join(axes))
    return None


def refuse_mixing(survey: Survey, labels: Mapping[Variable, Labels]) -> None:
    """Turn blocks that sum over tokens, or have none, into near misses."""
    for site in list(survey.sites) if labels else []:
        x_labels = labels.get(site.slice.x, ())
        summed = x_labels[site.slice.outer] if x_labels else ()
        if summed:
            axis = " and ".join(name for name, _ in summed)
            words = f"its products sum over {axis}, an axis of tokens: it mixes them"
            survey.refuse(site, f"{words}, and routes none")
        elif not any(x_labels):
            survey.refuse(site, "its input has no axis of tokens: name it in `tokens`")


def _label(variable: Variable, labels: Mapping[Variable, Labels]) -> Labels:
    return labels.get(variable, ((),) * len(variable.shape))


def _run(scope: Scope, inputs: Sequence[Labels], labels: dict[Variable, Labels]) -> list[Labels]:
    """Label all values of a scope from those of its inputs; return those of its results."""
    labels.update(zip(scope.inputs, inputs, strict=True))
    for equation in scope.equations:
        operands = [_label(v, labels) for v in equation.inputs]
        shapes = [v.shape for v in equation.outputs]
        try:
            results = _results(equation, operands, labels)
        except (IndexError, KeyError, TypeError, ValueError, NotABlock):
            # A form of the primitive that is not known here: its labels are lost, not wrong.
            results = []
        if list(map(len, results)) == list(map(len, shapes)):
            labels.update(zip(equation.outputs, results, strict=True))
    return [_label(v, labels) for v in scope.outputs]


def _results(
    equation: Equation, operands: list[Labels], labels: dict[Variable, Labels]
) -> Sequence[Labels]:
    """Return the labels of the results of an equation from those of its operands."""
    name, params, outputs = equation.name, equation.params, equation.outputs
    if function_of(equation.eqn) is not None or name in _BY_PLACE:
        ranks = [len(v.shape) for v in outputs]
        return [_joined([d for d in operands if len(d) == rank], rank) for rank in ranks]
    if name in ("transpose", "squeeze", "broadcast_in_dim", "reshape"):
        ((_, axes),) = rearranged(_LabelMoves(), (None, operands[0]), equation)
        return [tuple(axis or () for axis in axes)]
    if name == "dot_general":
        (summed, batch) = params["dimension_numbers"]
        dims = [operands[0][i] or operands[1][j] for i, j in zip(*batch, strict=True)]
        for operand, over, shared in zip(operands, summed, batch, strict=True):
            dims += [d for i, d in enumerate(operand) if i not in over and i not in shared]
        return [tuple(dims)]
    if name == "gather":
        numbers = params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        window = iter([d for i, d in enumerate(operands[0]) if i not in gone])
        places = iter(operands[1][:-1])
        rank = range(len(outputs[0].shape))
        return [tuple(next(window if i in numbers.offset_dims else places) for i in rank)]
    if name == "conv_general_dilated":
        spec = params["dimension_numbers"]
        order = [spec.lhs_spec[spec.out_spec.index(i)] for i in range(len(spec.out_spec))]
        return [tuple(operands[0][i] if i != spec.lhs_spec[1] else () for i in order)]
    if name in ("scan", "while", "cond"):
        return _looped(equation, operands, labels)
    if callee(equation.eqn) is not None or name in (*CHECKPOINTS, *_CUSTOM):
        return _run(equation.inner(), operands, labels)
    if name.startswith(("reduce_", "arg")):
        remaining = tuple(d for i, d in enumerate(operands[0]) if i not in params["axes"])
        return [remaining for _ in outputs]
    if name in ("iota", "random_bits"):
        return []
    pairs = list(zip(equation.inputs, operands, strict=True))
    shapes = [v.shape for v in outputs]
    return [_joined([d for v, d in pairs if v.shape == shape], len(shape)) for shape in shapes]


_CUSTOM = ("custom_jvp_call", "custom_vjp_call")


def _looped(
    equation: Equation, operands: list[Labels], labels: dict[Variable, Labels]
) -> Sequence[Labels]:
    """Return the labels of the results of a loop or a branch, after labelling its bodies."""
    current = list(operands)
    bodies = equation.body_operands()
    carried = [at for at, role in bodies[-1] if role == "carried"]
    # What a scan carries may gain labels in its first iteration.
    for _ in range(2):
        results = [
            _run(
                equation.inner(i),
                [current[at][1:] if role == "stacked" else current[at] for at, role in roles],
                labels,
            )
            for i, roles in enumerate(bodies)
        ]
        before = list(current)
        for at, result in zip(carried, results[-1], strict=False):
            current[at] = _joined((current[at], result), len(result))
        if equation.name != "scan" or current == before:
            break
    if equation.name == "scan":
        stacked = [((), *result) for result in results[0][len(carried) :]]
        return [*results[0][: len(carried)], *stacked]
    if equation.name == "while":
        return results[1]
    return [_joined(branches, len(branches[0])) for branches in zip(*results, strict=True)]


def _joined(labels: Sequence[Labels], rank: int) -> Labels:
    return tuple(next((d[i] for d in labels if d[i]), ()) for i in range(rank))


class _LabelMoves:
    """How labels change with the axes of an array (`scopes.AxisMoves`)."""

    def sliced(self, content: None, axis: Label, start: int, stop: int) -> tuple[None, Label]:
        return None, axis

    def indexed(self, content: None, axis: Label, index: int) -> None:
        return None

    def regrouped(
        self, content: None, axes: Sequence[Label | None], parts: Sequence[int]
    ) -> tuple[None, list[Label | None]]:
        """Cut the axes of tokens of all dimensions again, where they make up the new sizes."""
        if not all(axes):
            return None, [None for _ in parts]
        tokens = [token for axis in axes if axis for token in axis]
        labels: list[Label | None] = []
        for size in parts:
            product, label = 1, list[tuple[str, int]]()
            while tokens and product < size:
                label.append(tokens.pop(0))
                product *= label[-1][1]
            labels.append(tuple(label) if product == size else None)
        return None, labels
