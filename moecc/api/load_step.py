"""`moecc.load_step`: a program that `moecc compile --save` wrote, to call."""

from __future__ import annotations

import os
from pathlib import Path

from moecc.ahead.request import LoadedStep, StepLoader
from moecc.api.arguments import source_text
from moecc.backend import get_backend
from moecc.formats.files import read_whole


def load_step(file: str | os.PathLike[str]) -> LoadedStep:
    """Return the step in a file that ``moecc compile --save`` wrote, to be called.

    Raises:
      UsageError: the argument is no path.
      InputError: the file is missing, or is no such artefact.
      MachineError: jax or flatbuffers is not installed.
    """
    place = source_text(file)
    backend = get_backend("xla")
    assert isinstance(backend, StepLoader), "the xla backend exports"
    return backend.load_step(read_whole(Path(place)), place)
