"""`moecc.write_params`: arguments as a caller writes them, or rejected by name."""

from __future__ import annotations

import os
from collections.abc import Mapping

from moecc.api.arguments import dtype_of, family_text, flag, folder_text
from moecc.api.model import Model, open
from moecc.errors import UsageError
from moecc.model.open import Model as OpenModel
from moecc.support.untyped import Json
from moecc.tasks import write_params as task
from moecc.tasks.convert import Conversion


def write_params(
    model: Model | OpenModel | str | os.PathLike[str],
    params: Mapping[str, Json],
    folder: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: object = None,
    force: bool = False,
) -> Conversion:
    """Write `params` in place of the parameters of `model` to a new folder.

    Args:
      model: what `moecc.open` returned, perhaps rewritten by passes, or what it takes.
      params: an array for each parameter of the graph, by name, NumPy's or jax's.
      folder: where to.
      to: the family to write; None for one that engines read.
      dtype: the element type to write; None for that of the arrays.
      force: whether an existing folder is replaced.

    Raises:
      UsageError: an argument cannot be used.
      InputError: an array is missing, unknown or of another shape, or holds what is not finite; the
        family cannot express the model; the folder cannot be used.
      MachineError: the disk is too small.
    """
    if not isinstance(params, Mapping):
        raise UsageError("parameters are arrays by name", found=type(params).__name__)
    opened = model if isinstance(model, OpenModel) else open(model).model
    return task.write_params(
        opened, params, folder_text(folder), to=family_text(to), dtype=dtype_of(dtype),
        force=flag("force", force),
    )  # fmt: skip
