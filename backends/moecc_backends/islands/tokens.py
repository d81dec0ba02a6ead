"""The axes of tokens of a function, as the caller names them, and blocks that are none for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.types import is_name
from moecc_backends.islands.blocks import INNER, OUTER
from moecc_backends.islands.functions import Traced
from moecc_backends.islands.labels import Dims, Label, label_values
from moecc_backends.islands.scopes import Val
from moecc_backends.islands.sites import Survey

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
