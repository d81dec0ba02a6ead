"""A step of a run as a checkpoint: the parameters of its state, and the files of its source."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType

from moecc.checkpoint.companions import find_companions
from moecc.checkpoint.files import Identity, identify, require_unchanged
from moecc.checkpoint.jsonfile import read_json_object
from moecc.checkpoint.problems import Problems
from moecc.checkpoint.run.digests import require_run_files, require_state
from moecc.checkpoint.run.layout import (
    GRAPH,
    LINEAGE,
    PARAMS,
    RECIPE,
    SOURCE,
    STEP,
    STEPS,
    SavedStep,
    check_inside,
    choose_step,
    read_lineage,
    split_reference,
)
from moecc.checkpoint.run.state import StateReader, array_key
from moecc.checkpoint.several import models_of
from moecc.checkpoint.source import Checkpoint, TensorInfo
from moecc.errors import InputError
from moecc.support.closing import Closing
from moecc.support.text import amount
from moecc.support.untyped import Json
from moecc.types.arrays import Array
from moecc.types.dtypes import DTYPES

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 << 20


class RunCheckpoint(Closing):
    """The parameters of a step of a run; see `moecc.checkpoint.source.Checkpoint`.

    Attributes:
      run: the run folder.
      step: the step that is read.
      lineage: how the model came about.
    """

    format = "run"

    def __init__(self, run: Path, step: SavedStep) -> None:
        self.run = run
        self.step = step
        self.path = run
        check_inside(run, step)
        require_run_files(step)
        self.lineage: Json = read_lineage(run)
        self.config = read_json_object(run / SOURCE / CONFIG, limit_bytes=_MAX_CONFIG_BYTES)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_tensors(step))
        problems = Problems()
        self._companions = find_companions(run / SOURCE, problems)
        problems.raise_if_any()
        files = [*_state_files(step), *self.files(), *self._companions.values()]
        self._identities: dict[Path, Identity] = {path: identify(path) for path in files}

    @cached_property
    def state(self) -> StateReader:
        """What reads parameters and moments, once their files have the digests of step.json.

        Raises:
          InputError: a file is missing or differs; all of them.
          MachineError: tensorstore is missing.
        """
        require_state(self.step)
        return StateReader(self.step.state)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a parameter; thread-safe.

        Raises:
          InputError: there is no such parameter, or it is not as it was saved.
          MachineError: tensorstore is missing.
        """
        if name not in self.tensors:
            raise InputError(f"there is no tensor {name!r}", where=str(self.step.folder))
        return self.state.read(array_key(PARAMS, name), start, stop)

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files of the source that an export copies, by name."""
        return dict(self._companions)

    def remarks(self) -> list[str]:
        """Return how far the model was trained."""
        tokens = self.step.facts.get("tokens", 0)
        return [f"trained for {amount(self.step.number, 'step')}, {tokens:,} tokens"]

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the source's card."""
        found = self.lineage.get("card", {})
        kept = found if isinstance(found, dict) else {}
        return {str(k): tuple(map(str, v)) for k, v in kept.items() if isinstance(v, list)}

    def files(self) -> list[Path]:
        """Return graph, recipe, lineage, config and step.json, which has digests of the state."""
        named = [self.run / name for name in (GRAPH, RECIPE, LINEAGE)]
        return [self.step.folder / STEP, *named, self.run / SOURCE / CONFIG]

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        require_unchanged(self._identities)

    def close(self) -> None:
        """Close the files."""


def inputs_of(checkpoint: Checkpoint | None) -> list[Path]:
    """Return what of a checkpoint an output must not touch: of a run, all but room for exports."""
    if checkpoint is None:
        return []
    if isinstance(checkpoint, RunCheckpoint):
        return [checkpoint.run / STEPS, checkpoint.run / SOURCE]
    return [model.path for model in models_of(checkpoint).values()]


def open_run(reference: str) -> RunCheckpoint:
    """Open ``RUN``, ``RUN@best`` or ``RUN@1200``.

    Raises:
      InputError: it is no run, or has no such checkpoint.
    """
    found = split_reference(reference)
    if found is None:
        raise InputError("this is not the folder of a run", where=reference)
    run, which = Path(found[0]), found[1]
    return RunCheckpoint(run, choose_step(run, which))


def _state_files(step: SavedStep) -> list[Path]:
    return sorted(path for path in step.state.rglob("*") if path.is_file())


def _tensors(step: SavedStep) -> dict[str, TensorInfo]:
    listed = step.facts.get("tensors")
    if not isinstance(listed, dict):
        raise InputError("step.json lists no tensors", where=str(step.folder / STEP))
    return {name: _info(step, name, facts) for name, facts in listed.items()}


def _info(step: SavedStep, name: str, facts: object) -> TensorInfo:
    where = str(step.folder / STEP)
    if not isinstance(facts, dict) or facts.get("dtype") not in DTYPES:
        raise InputError(f"step.json does not give the type of {name!r}", where=where)
    shape, dtype = facts.get("shape"), DTYPES[facts["dtype"]]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise InputError(f"step.json does not give the shape of {name!r}", where=where)
    nbytes = prod(shape) * dtype.itemsize_bytes
    return TensorInfo(name, dtype, tuple(shape), nbytes, step.state, 0)
