"""Where an equation comes from in the user's program."""

from __future__ import annotations

import traceback as tracebacks
from collections.abc import Callable
from functools import cache, partial
from inspect import unwrap
from pathlib import Path
from sysconfig import get_paths
from types import TracebackType

from moecc_backends.islands.jaxprs import Equation

_SELF = str(Path(__file__).parent)


@cache
def _is_library(file: str) -> bool:
    folders = (get_paths()["purelib"], get_paths()["platlib"], get_paths()["stdlib"])
    return file.startswith((*folders, _SELF, "<"))


def user_line(equation: Equation) -> str:
    """Return ``file.py:12 in block`` for the innermost line outside of libraries, or nothing."""
    traceback = equation.source_info.traceback
    frames = [] if traceback is None else list(traceback.frames)
    found = next((f for f in frames if not _is_library(f.file_name)), None)
    if found is None:
        return ""
    return f"{Path(found.file_name).name}:{found.line_num} in {found.function_name}"


def function_line(function: Callable[..., object]) -> str:
    """Return ``file.py:12 in block`` for a function, or its name where it has no file."""
    inner: object = unwrap(function)
    while isinstance(inner, partial):
        inner = inner.func
    name = str(getattr(inner, "__qualname__", "function"))
    code = getattr(inner, "__code__", None)
    if code is None:
        return name
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} in {name}"


def line_of(traceback: TracebackType | None) -> str | None:
    """Return the innermost line of an exception outside of libraries, or None."""
    frames = [] if traceback is None else tracebacks.extract_tb(traceback)
    found = [f for f in frames if not _is_library(f.filename)]
    if not found:
        return None
    last = found[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}"
