"""Whose fault a crash is: a pass of moecc is a bug of moecc, any other is its author's to fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import unwrap
from types import TracebackType
from typing import ClassVar

from moecc.errors import MoeccError, described
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult
from moecc.support.signals import Terminated

KNOWN = (MoeccError, MemoryError, OSError)
"""Exceptions that are not a bug of a pass: the user's input, or the machine."""

_OURS = ("moecc", "moecc_passes", "moecc_backends")


class PassExit(Exception):
    """A pass raised what ends Python, as ``sys.exit()`` does."""


class PassCrash(MoeccError):
    """A pass raised an unexpected exception: a bug, in the pass or in moecc."""

    exit_code: ClassVar[int] = 70


class OwnPassCrash(PassCrash):
    """A pass that is not part of moecc raised an unexpected exception: its author's to fix."""

    exit_code: ClassVar[int] = 1


def crash_of(cls: type[Pass], doing: str, error: BaseException, hint: str | None) -> PassCrash:
    """Return what to raise for an unexpected exception of a pass, with file and line if it is own.

    Args:
      cls: the pass.
      doing: what was done with it, for messages: ``the pass 2, mine, crashed``.
      error: the exception.
      hint: where the reproducer is.
    """
    what = f"{doing}: {described(error)}"
    if cls.__module__.partition(".")[0] in _OURS:
        return PassCrash(what, hint=hint)
    return OwnPassCrash(what, where=_place(cls, error.__traceback__), hint=hint)


@contextmanager
def blamed(cls: type[Pass], doing: str) -> Iterator[None]:
    """Turn an unexpected exception of an own pass into `OwnPassCrash`; others pass through."""
    try:
        yield
    except (*KNOWN, KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        crash = crash_of(cls, f"the pass {cls.name} crashed {doing}", error, None)
        if isinstance(crash, OwnPassCrash):
            raise crash from error
        raise


def apply_pass(item: Pass, graph: Graph, context: Context) -> PassResult:
    """Apply a pass to `graph`, in place, and return its result.

    Raises:
      PassExit: the pass would have ended Python.
      TypeError: it returned something else.
    """
    try:
        result = item.apply(graph, context)
    except (Exception, KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        raise PassExit(described(error)).with_traceback(error.__traceback__) from None
    if not isinstance(result, PassResult):
        raise TypeError(f"apply returned {type(result).__name__}, expected PassResult")
    return result


def _place(cls: type[Pass], trace: TracebackType | None) -> str:
    """Return file and line of the innermost call within the file of a pass, or of its `apply`."""
    code = getattr(unwrap(cls.apply), "__code__", None)
    found = f"{code.co_filename}:{code.co_firstlineno}" if code else cls.__module__
    while trace is not None:
        code = trace.tb_frame.f_code
        if trace.tb_frame.f_globals.get("__name__") == cls.__module__:
            found = f"{code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
