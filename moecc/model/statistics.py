"""Statistics beside a model, which its weights may be made of."""

from __future__ import annotations

from pathlib import Path

from moecc.capture.folder import fingerprint, open_capture
from moecc.checkpoint.several import SeveralCheckpoints
from moecc.errors import InputError
from moecc.model.open import Model
from moecc.pipeline.passes import Statistics
from moecc.weights.branches import STATISTICS


def add_statistics(model: Model, place: str | None) -> Statistics | None:
    """Open statistics, which then are read beside the weights of `model`; return what they are.

    Args:
      model: the model; its checkpoint becomes one of both.
      place: the folder of the statistics, or None.

    Raises:
      InputError: there are none, they were changed, or they are of another model.
    """
    if place is None:
        return None
    checkpoint = model.checkpoint
    if checkpoint is None:
        raise InputError(f"{model.name} has no weights", hint="give a checkpoint")
    tensors, facts = open_capture(Path(place))
    several = checkpoint if isinstance(checkpoint, SeveralCheckpoints) else None
    base = checkpoint if several is None else several.base
    found = fingerprint(base)
    if found != facts.model:
        tensors.close()
        raise InputError(
            "the statistics are of another model", where=place, expected=f"{base.path}: {found}",
            found=facts.model, hint="moecc capture takes them of this one",
        )  # fmt: skip
    branches = {} if several is None else several.branches
    model.checkpoint = SeveralCheckpoints(base, branches, {STATISTICS: tensors})
    shapes = {name: info.shape for name, info in tensors.tensors.items()}
    return Statistics(tuple(facts.texts), shapes)
