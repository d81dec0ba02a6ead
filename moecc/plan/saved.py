"""A plan in a file: what `moecc plan --save` writes, and `compile` and `train` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from moecc.errors import InputError, Problem, nearest
from moecc.formats.files import read_json_object
from moecc.plan.report import Report
from moecc.plan.strategy import DENSE_WEIGHTS, OPTIMIZERS, REMATS, STEPS
from moecc.sharding.vias import LOCAL, VIAS
from moecc.support.problems import Problems, describe
from moecc.support.text import json_text
from moecc.support.untyped import JsonDict

SCHEMA = "moecc.plan/1"

MAX_BYTES = 64 << 20

_Kinds = Mapping[str, tuple[type, ...]]

_REQUEST: _Kinds = {
    "model": (str,), "machine": (str,), "pipeline": (str,), "step": (str,),
    "batch_tokens": (int, NoneType), "sequence": (str, NoneType), "optimizer": (str,),
    "dtype": (str,), "weight_dtype": (str, NoneType), "micro_batches": (int, NoneType),
    "reduce_dtype": (str, NoneType),
}  # fmt: skip
_STRATEGY: _Kinds = {
    "mesh": (dict,), "rules": (list,), "dense_weights": (str,), "via": (str,), "remat": (str,),
    "sliced": (bool,),
}  # fmt: skip
_WORDS = {
    "step": STEPS, "optimizer": OPTIMIZERS, "via": (*VIAS, LOCAL), "remat": REMATS,
    "dense_weights": DENSE_WEIGHTS,
}  # fmt: skip


@dataclass(frozen=True)
class SavedPlan:
    """What of a plan decides a program.

    Attributes:
      model: as the plan was asked.
      machine: the machine.
      pipeline: the passes before the step's.
      step: ``train`` or ``forward``.
      batch_tokens: tokens of a step; None for the default.
      sequence: lengths, separated by commas; None for the default.
      optimizer: of a training step.
      dtype: of the computation.
      weight_dtype: of the parameters; None for the default.
      micro_batches: parts of a batch; None for one.
      reduce_dtype: in which gradients are added and reduced; None for that of the computation.
      mesh: axes and sizes.
      rules: layouts.
      dense_weights: how parameters of no expert lie along the experts' axis.
      via: how tokens reach experts.
      remat: what the backward pass computes again.
      sliced: whether devices along ``model`` send slices of rows.
      parameters: of the model, with its passes; None where a plan does not say it.
      tokens_per_second: that are predicted, of all devices; None where a plan does not say it.
    """

    model: str
    machine: str
    pipeline: str
    step: str
    batch_tokens: int | None
    sequence: str | None
    optimizer: str
    dtype: str
    weight_dtype: str | None
    micro_batches: int | None
    reduce_dtype: str | None
    mesh: Mapping[str, int]
    rules: tuple[str, ...]
    dense_weights: str
    via: str
    remat: str
    sliced: bool
    parameters: int | None = None
    tokens_per_second: float | None = None

    @property
    def mesh_text(self) -> str:
        """The mesh as options take it: ``fsdp=8,expert=8``."""
        return ",".join(f"{name}={size}" for name, size in self.mesh.items())

    def recipe_values(self, *, is_new: bool = True) -> list[str]:
        """Return what the plan decides of a recipe, as ``--set`` takes it.

        Args:
          is_new: whether the run begins; that of one that goes on keeps what its recipe hashes.
        """
        found = [f"mesh.mesh={self.mesh_text}"] if self.mesh else []
        if self.mesh and self.rules:
            found.append(f"mesh.rules={json_text(list(self.rules))}")
        if self.mesh and self.via != LOCAL:
            found.append(f"mesh.via={self.via}")
        if not is_new:
            return found
        asked = {
            "micro_batches": self.micro_batches if self.micro_batches != 1 else None,
            "weight_dtype": self.weight_dtype, "reduce_dtype": self.reduce_dtype,
        }  # fmt: skip
        found += [f"run.{name}={value}" for name, value in asked.items() if value is not None]
        return [*found, f"run.remat={self.remat}"]


def saved_text(report: Report, request: Mapping[str, object]) -> str:
    """Return the text of a saved plan: the report, and what was asked.

    Args:
      report: what ``plan_json`` returned.
      request: the options, of which `SavedPlan` reads those that decide a program.
    """
    return json_text({"schema": SCHEMA, "request": dict(request), **report}, indent=2) + "\n"


def read_plan(path: str) -> SavedPlan:
    """Read a saved plan.

    Raises:
      InputError: it is missing or no plan, or its values have other types; all at once.
    """
    data = read_json_object(Path(path), limit_bytes=MAX_BYTES)
    if data.get("schema") != SCHEMA:
        raise InputError(
            "not a plan that this version reads", where=path, expected=SCHEMA,
            found=describe(data.get("schema")), hint="moecc plan … --save FILE writes one",
        )  # fmt: skip
    problems = Problems()
    found = _values(data.get("request"), "request", _REQUEST, path, problems)
    found |= _values(data.get("best"), "best", _STRATEGY, path, problems)
    problems.raise_if_any()
    sizes, rules = found["mesh"].values(), found["rules"]
    if not all(type(v) is int for v in sizes) or not all(isinstance(r, str) for r in rules):
        raise InputError("no mesh with rules", where=f"{path}: best", expected="sizes and names",
                         found=describe(found["mesh"]))  # fmt: skip
    wrong = [
        Problem("no such word", f"{path}: {key}", " | ".join(words), describe(found[key]),
                nearest(str(found[key]), words))
        for key, words in _WORDS.items() if found[key] not in words
    ]  # fmt: skip
    if wrong:
        raise InputError(wrong)
    count = data.get("parameters")
    return SavedPlan(
        **{**found, "rules": tuple(rules)},
        parameters=count if isinstance(count, int) else None,
        tokens_per_second=_tokens_per_second(data),
    )


def _tokens_per_second(data: JsonDict) -> float | None:
    """Return what a plan predicts, if it does."""
    batch, best = data.get("batch"), data["best"]
    tokens, seconds = batch.get("tokens") if isinstance(batch, dict) else None, best.get("seconds")
    known = all(isinstance(x, int | float) and x > 0 for x in (tokens, seconds))
    return tokens / seconds if known else None


def _values(table: object, name: str, kinds: _Kinds, path: str, problems: Problems) -> JsonDict:
    if not isinstance(table, dict):
        problems.add("a table is missing", where=f"{path}: {name}", found=describe(table))
        return {}
    for key, types in kinds.items():
        value = table.get(key)
        # A truth value is a whole number to Python, and to nobody else.
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not fits:
            expected = " or ".join(kind.__name__ for kind in types)
            problems.add("a value of another type", where=f"{path}: {name}.{key}",
                         expected=expected, found=describe(value))  # fmt: skip
    return {key: table.get(key) for key in kinds}
