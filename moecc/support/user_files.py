"""Python files of the user's own, run as modules: what they fail with is theirs to mend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, TracebackType
from zlib import crc32

from moecc.errors import UsageError, describe_error
from moecc.support.process import Terminated

LOADED = "moecc_loaded_"
"""How the names of the modules begin."""

_OURS = ("moecc", "moecc_passes", "moecc_backends")

_RUN: dict[tuple[str, int], ModuleType] = {}


def is_own(module: str) -> bool:
    """Return whether a module is the user's own, and no part of moecc."""
    return module.partition(".")[0] not in _OURS


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a separate module, once as long as it does not change.

    Raises:
      UsageError: it does not exist, is not Python, or fails: with its line, not as a crash.
    """
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    key = (str(path.resolve()), path.stat().st_mtime_ns)
    if key not in _RUN:
        _RUN[key] = _run(path)
    return _RUN[key]


def _run(path: Path) -> ModuleType:
    # Files with the same name in two folders are two modules.
    name = f"{LOADED}{path.stem}_{crc32(str(path.resolve()).encode()):08x}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("not a Python file", where=str(path), hint="its name must end in .py")
    module = module_from_spec(spec)
    # dataclasses looks the module up by name to resolve annotations.
    sys.modules[name] = module
    with Blamed(path):
        spec.loader.exec_module(module)
    return module


class Blamed:
    """Turns an exception of a user's file into a `UsageError` that names file and line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A file that exits Python would otherwise end the command successfully.
        if error is None or isinstance(error, KeyboardInterrupt | Terminated):
            return
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(self.path, error)
        where = f"{self.path}:{line}" if line else str(self.path)
        raise UsageError(describe_error(error), where=where) from error


def _line_in(path: Path, error: BaseException) -> int | None:
    # The file is run under the absolute path that the import system gives it.
    lines = [
        c.tb_lineno for c in _calls(error) if Path(c.tb_frame.f_code.co_filename) == path.absolute()
    ]
    return lines[-1] if lines else None


def _calls(error: BaseException) -> Iterator[TracebackType]:
    """Yield the calls of a traceback, the outermost first."""
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def last_line_in(module: str, error: BaseException) -> str | None:
    """Return file and line of the innermost call in modules of a name that failed, if one did.

    Args:
      module: the name of a module, or how the names of several begin.
      error: the exception.
    """
    where = None
    for call in _calls(error):
        name = call.tb_frame.f_globals.get("__name__", "")
        if isinstance(name, str) and name.startswith(module):
            where = f"{call.tb_frame.f_code.co_filename}:{call.tb_lineno}"
    return where


def raised_in(error: BaseException) -> str:
    """Return the name of the module whose code raised an exception."""
    name = ""
    for call in _calls(error):
        name = str(call.tb_frame.f_globals.get("__name__", ""))
    return name


def line_of_user(error: BaseException) -> str | None:
    """Return file and line of the innermost call of a user's file that failed, if one did."""
    return last_line_in(LOADED, error)
