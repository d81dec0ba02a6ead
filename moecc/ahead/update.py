"""The update of a step that is compiled: an optimizer and its settings, as recipes spell them."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.errors import Problem, UsageError
from moecc.train.recipe import OptimizerSection
from moecc.train.recipe_text import parse_update

COMPILED = ("clip", "update_clip", "b1", "b2", "eps", "decay")
"""The keys of ``[optimizer]`` that are constants of a compiled step."""

_SECTION = "optimizer."
_OTHERS = {
    "name": "--optimizer names it",
    "groups": "a recipe has groups: moecc train",
}
_MORE = "a recipe has more: moecc train"
_RATE = "the rate is an argument of the step: the caller has the schedule"


def update_of(optimizer: str, sets: Sequence[str]) -> OptimizerSection:
    """Return the update of a step.

    Args:
      optimizer: its name.
      sets: texts ``optimizer.key=value``, as of ``moecc train``.

    Raises:
      UsageError: a text is no such thing, or has a key that a compiled step does not have.
    """
    problems = [problem for text in sets for problem in _foreign(text)]
    if problems:
        raise UsageError(problems)
    return parse_update(optimizer, sets)


def _foreign(text: str) -> list[Problem]:
    """Return what is wrong with the key of a text."""
    key = text.partition("=")[0].strip()
    name = key.removeprefix(_SECTION).partition(".")[0]
    known = name in OptimizerSection.__dataclass_fields__
    if key.startswith(_SECTION) and (name in COMPILED or not known):
        return []
    hint = _OTHERS.get(name, _RATE) if key.startswith(_SECTION) else _MORE
    what = f"{key!r} is no part of a compiled step"
    expected = ", ".join(f"{_SECTION}{name}" for name in COMPILED)
    return [Problem(what, f"--set {text}", expected, hint=hint)]
