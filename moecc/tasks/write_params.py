"""Write parameters that a loop of one's own trained, as a checkpoint with manifest and card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moecc.errors import InputError, Problem, nearest
from moecc.formats.source import GivenParams
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.model.open import Model
from moecc.pipeline.text import Pipeline
from moecc.support.untyped import Json
from moecc.tasks.convert import Conversion, plan, write
from moecc.types import DTYPES, DType, TensorType
from moecc.weights.expr import Source


def write_params(
    model: Model,
    params: Json,
    folder: str | Path,
    *,
    to: str = "auto",
    dtype: DType | None = None,
    force: bool = False,
) -> Conversion:
    """Write `params` in place of the parameters of `model` to a new folder.

    Args:
      model: opened, its graph perhaps rewritten by passes; its checkpoint gives tokenizer,
        licences and card.
      params: an array for each parameter of the graph, by name, NumPy's or jax's.
      folder: where to.
      to: the family to write; ``auto`` chooses one that engines read.
      dtype: the type to write; None for that of the arrays.
      force: whether an existing folder is replaced.

    Raises:
      InputError: an array is missing, unknown or of another shape, or holds what is not finite; the
        family cannot express the model; the folder cannot be used.
      MachineError: the disk is too small.
    """
    if model.checkpoint is None:
        raise InputError(f"{model.name} has no files to write beside parameters")
    problems = list(_misfits(model.graph, params))
    if problems:
        raise InputError(problems)
    used = {n: params[n] for n in model.graph.params}
    given = GivenParams(model.checkpoint, used)
    graph = clone(model.graph)
    for name, param in graph.params.items():
        param.weight = Source(name, TensorType(given.tensors[name].dtype, param.type.bare.axes))
    planned = plan(Model(graph, model.name, given), Pipeline.parse(""), to, dtype=dtype)
    return write(planned, folder, force=force)


def _misfits(graph: Graph, params: Json) -> Iterator[Problem]:
    known = {d.numpy for d in DTYPES.values() if d.is_float}
    for name in params:
        if name not in graph.params:
            what = "the model has no such parameter"
            yield Problem(what, str(name), hint=nearest(str(name), graph.params))
    for name, param in graph.params.items():
        if name not in params:
            yield Problem("no array is given", f"param %{name}", str(param.type))
            continue
        array = params[name]
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            found = type(array).__name__
            yield Problem("this is no array", f"param %{name}", str(param.type), found)
        elif tuple(array.shape) != param.type.shape or array.dtype not in known:
            yield Problem("the array does not fit", f"param %{name}", str(param.type),
                          f"{array.dtype}{list(array.shape)}")  # fmt: skip
