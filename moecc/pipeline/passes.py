"""The `Pass` base class: a frozen dataclass whose fields are its options, with a checked promise.

A subclass sets `name`, `summary` and `preserves`, and writes `apply`.  Each field is an option of
the pipeline string, ``top_k`` as ``top-k``; its type is one of int, float, bool, str, a Literal, a
tuple of these, or a union of these and None; ``Annotated[int, "what it means"]`` documents it.
The docstring shows the graph before and after.
"""

from __future__ import annotations

import json
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from inspect import unwrap
from types import TracebackType
from typing import (
    Annotated,
    ClassVar,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from moecc.errors import MoeccError, Problem, described
from moecc.ir.graph import Graph
from moecc.rewrite.driver import RewriteResult, RuleStats
from moecc.rewrite.pattern import NearMiss, PreservesKind
from moecc.support.process import Terminated
from moecc.types import Array
from moecc.weights.expr import Expr


class ReadWeight(Protocol):
    """Reads small parameters from the checkpoint of the model, where there is one."""

    def __call__(self, weight: Expr) -> Array | None:
        """Return the value of a weight expression, or None where it cannot be read."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model's values over texts, which `moecc capture` wrote.

    Attributes:
      texts: the names of the texts, in order.
      shapes: the shapes of the statistics by name; None where they are not to be looked at, as on a
        model at reduced sizes.
    """

    texts: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]] | None = None

    def problem(self, loc: str, wanted: Mapping[str, tuple[int, ...]]) -> Problem | None:
        """Return what is wrong with the statistics at a location, or None.

        Args:
          loc: the location, ``layers.3.ffn``.
          wanted: the shapes of the statistics that are needed, by their names there.
        """
        if self.shapes is None:
            return None
        for name, shape in wanted.items():
            found = self.shapes.get(f"{loc}.{name}")
            if found is None:
                return Problem(
                    f"the statistics have no {name} of this location",
                    loc,
                    hint="moecc capture --at takes those that its pattern fits",
                )
            if found != shape:
                return Problem(
                    f"the statistics have another shape: {name}",
                    loc,
                    str(list(shape)),
                    str(list(found)),
                )
        return None


NO_STATISTICS = Problem(
    "this needs statistics of the model",
    "--capture",
    hint="moecc capture MODEL --text FILE --out DIR takes them, convert --capture DIR reads them",
)
"""What is said where a method reads statistics and there are none."""


_ORDER: tuple[PreservesKind, ...] = ("exact", "reassociation", "approximate")


@dataclass(frozen=True)
class Preserves:
    """How a pass changes the function that the graph computes.

    Attributes:
      kind: ``exact`` (bit-identical in the reference), ``reassociation`` (equal in real
        arithmetic) or ``approximate``.
      reason: why it is not exact.
      predicted_error: the relative error to expect, where a formula gives it.
    """

    kind: PreservesKind
    reason: str = ""
    predicted_error: float | None = None

    def __str__(self) -> str:
        text = f"{self.kind}: {self.reason}" if self.reason else self.kind
        if self.predicted_error is None:
            return text
        return f"{text} (predicted relative error {self.predicted_error:.2g})"


EXACT = Preserves("exact")


def weakest(promises: Iterable[Preserves]) -> Preserves:
    """Return the combined promise of several passes in a row.

    The weakest kind, the reasons joined, and the predicted errors added up if every approximate
    pass predicts one.
    """
    some = list(promises)
    kind = max((p.kind for p in some), key=_ORDER.index, default=_ORDER[0])
    reasons = dict.fromkeys(p.reason for p in some if p.reason)
    errors = [p.predicted_error for p in some if p.kind == "approximate"]
    known = [e for e in errors if e is not None]
    total = sum(known) if known and len(known) == len(errors) else None
    return Preserves(kind, "; ".join(reasons), total)


@dataclass(frozen=True, slots=True)
class Remark:
    """A note of a pass on what it did or left undone: where, and what."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def _ignore(remark: Remark) -> None:
    """Drop a remark: the default of a context."""


def _no_weights(weight: Expr) -> Array | None:
    """Read nothing: the default of a context."""
    return None


@dataclass(frozen=True)
class Context:
    """The environment of a pass besides the graph.

    Attributes:
      seed: determines every random choice of the pipeline.
      allow_unmatched: whether a pass that must match may match nothing.
      remark: receives remarks as they arise.
      read: reads small parameters, such as the scale of a norm, where a promise depends on them.
      models: the names of the models beside the source whose weights may be read.
      statistics: what was captured of the model's values, if anything.
      promises: whether the promise of this very graph is wanted (`PassResult.preserves`); not where
        a graph is made to be looked at, since to estimate an error takes longer than to rewrite.
    """

    seed: int = 0
    allow_unmatched: bool = False
    remark: Callable[[Remark], None] = _ignore
    read: ReadWeight = _no_weights
    models: Sequence[str] = ()
    statistics: Statistics | None = None
    promises: bool = True


@dataclass
class PassResult:
    """The result of a pass.

    Attributes:
      changed: whether the graph differs from before.
      matched: the number of sites that the pass found to work on.
      stats: counts by name.
      remarks: remarks beyond those passed to the context already.
      near_misses: candidates that nearly matched, and why they did not.
      rules: statistics of the rewrite rules, by rule.
      preserves: what this application does to the function, if the graph decides more than
        the options do; None means the pass's declared promise.
    """

    changed: bool
    matched: int = 0
    stats: dict[str, int] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    rules: dict[str, RuleStats] = field(default_factory=dict)
    preserves: Preserves | None = None

    @classmethod
    def of(cls, done: RewriteResult) -> PassResult:
        """Return the result of a pass that only runs `moecc.rewrite.rewrite`."""
        stats = {name: rule.hits for name, rule in done.rules.items() if rule.hits}
        return cls(
            changed=done.rewrites > 0,
            matched=done.rewrites,
            stats=stats,
            near_misses=done.near_misses,
            rules=done.rules,
        )


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes.

    Attributes:
      name: kebab-case; the name in pipelines.
      summary: one line, without a full stop.
      must_match: whether it is an error if the pass finds nothing to work on.
      takes_rolled: whether it accepts a graph with repeated layers; other passes are rejected
        there, since they would not see the bodies.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    must_match: ClassVar[bool] = False
    takes_rolled: ClassVar[bool] = False

    @property
    @abstractmethod
    def preserves(self) -> Preserves:
        """The promise of the pass with these options."""

    @abstractmethod
    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite `graph` in place; it is valid before and after, not always in between.

        Raises:
          InputError: the pass cannot be applied to this graph.
        """

    def validate(self) -> list[Problem]:
        """Return the problems of the options alone, independent of the graph.

        A problem's ``where`` may name the option concerned, by its name in the text.
        """
        return []

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return contradictions with the passes before this one, independent of the graph.

        Args:
          earlier: the passes that run before it, in order.
        """
        return []

    def warnings(self) -> list[Problem]:
        """Return warnings of options that are allowed but rarely intended."""
        return []

    def measure(self, before: Graph, after: Graph, seed: int) -> float | None:
        """Return how far `after` is from what is promised of it, relative to its outputs.

        For a pass whose graph is called otherwise than before, so that outputs for the same inputs
        say nothing; None, the default, compares those.

        Args:
          before: the graph that the pass was applied to.
          after: what it made of it.
          seed: of random data.
        """
        return None

    def lints(self) -> list[Problem]:
        """Return what a design guide advises against, with its source (`moecc.pipeline.passes`)."""
        return []


# The options of a pass: its fields, and parsing and printing of their values.

_BARE = re.compile(r'[^\s{}",]+\Z')
_INT = re.compile(r"[+-]?[0-9]{1,19}\Z")
_FLOAT = re.compile(r"[+-]?(?:inf|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\Z")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a value between commas: its text, and whether it was quoted."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Option:
    """An option of a pass.

    Attributes:
      name: the name in the text, ``top-k``.
      field: the name of the Python field, ``top_k``.
      type: its annotation.
      doc: its meaning, in a line.
      default: its value where the text omits it, or `dataclasses.MISSING`.
    """

    name: str
    field: str
    type: object
    doc: str
    default: object

    @property
    def required(self) -> bool:
        """Whether the text must state it."""
        return self.default is MISSING


@cache
def options(cls: type[Pass]) -> dict[str, Option]:
    """Return the options of a pass by name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    found: dict[str, Option] = {}
    for declared in fields(cls):
        hint, doc = hints[declared.name], ""
        if get_origin(hint) is Annotated:
            hint, doc = get_args(hint)[:2]
        name = declared.name.replace("_", "-")
        default = (
            declared.default if declared.default_factory is MISSING else declared.default_factory()
        )
        found[name] = Option(name, declared.name, hint, doc, default)
    return found


def unreadable(cls: type[Pass]) -> list[str]:
    """Return the annotations of a pass that cannot be resolved or have no text form."""
    try:
        found = options(cls)
    except NameError as error:
        return [f"an annotation cannot be resolved: {error}"]
    return [
        f"option {o.name!r} has a type without a text form: {o.type}"
        for o in found.values()
        if not _is_spelled(o.type)
    ]


def _is_spelled(type: object) -> bool:
    if type in (int, float, bool, str, types.NoneType) or get_origin(type) is Literal:
        return True
    if get_origin(type) is tuple or _is_union(type):
        inner = [t for t in get_args(type) if t is not ...]
        return bool(inner) and all(map(_is_spelled, inner))
    return False


class _NoFit(ValueError):
    """The text is not a value of the type."""


def read(type: object, pieces: tuple[Piece, ...]) -> object:
    """Return the value of `type` parsed from `pieces`.

    Raises:
      ValueError: they are not a value of the type.
    """
    if get_origin(type) is tuple:
        return _read_tuple(get_args(type), pieces)
    if _is_union(type):
        return _read_union(type, pieces)
    if type is str and not any(p.quoted for p in pieces):
        return ",".join(p.text for p in pieces)
    if len(pieces) != 1:
        raise _NoFit
    return _read_one(type, pieces[0])


def _read_one(type: object, piece: Piece) -> object:
    text = piece.text
    if get_origin(type) is Literal:
        for choice in get_args(type):
            if str(choice) == text:
                return choice
        raise _NoFit
    if type is str:
        return text
    if piece.quoted:
        raise _NoFit
    if type is types.NoneType and text == "none":
        return None
    if type is bool and text in ("true", "false"):
        return text == "true"
    if type is int and _INT.match(text):
        return int(text)
    if type is float and _FLOAT.match(text):
        return float(text)
    raise _NoFit


def _read_tuple(elements: tuple[object, ...], pieces: tuple[Piece, ...]) -> tuple[object, ...]:
    if pieces == (Piece("()"),):
        pieces = ()
    each = elements[:1] * len(pieces) if elements[-1] is ... else elements
    if len(each) != len(pieces):
        raise _NoFit
    return tuple(read(t, (p,)) for t, p in zip(each, pieces, strict=True))


def _read_union(type: object, pieces: tuple[Piece, ...]) -> object:
    for member in _members(type):
        try:
            return read(member, pieces)
        except _NoFit:
            continue
    raise _NoFit


def _is_union(type: object) -> bool:
    return get_origin(type) in (Union, types.UnionType)


def _members(type: object) -> list[object]:
    """Return the members of a union, the most restrictive first."""
    order = [types.NoneType, bool, int, float]

    def rank(member: object) -> int:
        if member in order:
            return order.index(member)
        if get_origin(member) is Literal:
            return -1
        return 9 if member is str else 8

    return sorted(get_args(type), key=rank)


def write(type: object, value: object) -> str:
    """Return the text that `read` parses back to `value`.

    Raises:
      ValueError: `value` is not of `type`.
    """
    if isinstance(value, tuple) and (get_origin(type) is tuple or _is_union(type)):
        text = _write_tuple(type, value)
    else:
        text = _write_one(type, value)
    if not _spells(type, split(text), value):
        raise ValueError(f"{value!r} is not {describe(type)}")
    return text


def _write_tuple(type: object, value: tuple[object, ...]) -> str:
    if not value:
        return "()"
    if _is_union(type):
        type = next((t for t in _members(type) if get_origin(t) is tuple), tuple[str, ...])
    args = get_args(type)
    each = args[:1] * len(value) if args[-1] is ... else args
    parts = [_write_element(t, v) for t, v in zip(each, value, strict=True)]
    return ",".join(parts) if parts != ["()"] else '"()"'


def _write_element(type: object, value: object) -> str:
    text = _write_one(type, value)
    return json.dumps(value) if "," in text and text[0] != '"' else text


def _write_one(type: object, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    parts = value.split(",")
    if all(_BARE.match(p) for p in parts):
        bare = tuple(Piece(p) for p in parts)
        if _spells(type, bare, value):
            return value
    return json.dumps(value)


def _spells(type: object, pieces: tuple[Piece, ...], value: object) -> bool:
    try:
        back = read(type, pieces)
    except _NoFit:
        return False
    # A float may be an int in Python, but True is not 1.
    return bool(back == value) and isinstance(back, bool) == isinstance(value, bool)


_PIECE = re.compile(r'"((?:[^"\\]|\\.)*)"|([^\s{}",]+)')


def split(text: str) -> tuple[Piece, ...]:
    """Return the pieces of a value's text.

    Raises:
      ValueError: it is not a value.
    """
    pieces: list[Piece] = []
    at = 0
    while True:
        match = _PIECE.match(text, at)
        if match is None:
            raise ValueError(at)
        pieces.append(_piece(match.group()))
        at = match.end()
        if at == len(text):
            return tuple(pieces)
        if text[at] != ",":
            raise ValueError(at)
        at += 1


def _piece(text: str) -> Piece:
    if text[0] != '"':
        return Piece(text)
    # json rejects control characters inside quotes, which a shell may well pass on.
    return Piece(json.loads(text, strict=False), quoted=True)


def choices(type: object) -> list[str]:
    """Return the words that the literals in `type` allow."""
    if get_origin(type) is Literal:
        return list(map(str, get_args(type)))
    return [word for inner in get_args(type) for word in choices(inner)]


def describe(type: object) -> str:
    """Return a description of the values of `type`, for messages and the documentation."""
    if get_origin(type) is Literal:
        return f"one of {', '.join(map(str, get_args(type)))}"
    if get_origin(type) is tuple:
        inner = get_args(type)
        if inner[-1] is ...:
            return f"a list, separated by commas, each {describe(inner[0])}"
        return f"{len(inner)} values separated by commas: {', '.join(map(describe, inner))}"
    if _is_union(type):
        return " or ".join(describe(t) for t in get_args(type))
    words: dict[object, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    return "none" if type is types.NoneType else words[type]


# Lints: what a published design guide advises against, with the section that says so.
#
# A lint is no error, and no warning either: it may be just what an experiment is about.  ``moecc
# lint`` shows them, and ``--warnings error`` makes them one.

PAPER = "ST-MoE"
"""Designing Effective Sparse Expert Models (Zoph et al. 2022), whose sections are cited."""

MOST_EXPERTS = 256
"""Beyond this many, more experts hardly help (section 5.1)."""

BALANCE, ROUTER_Z = 1e-2, 1e-3
"""The coefficients of the balance loss (appendix A) and of the router z-loss (section 3.3)."""


def advice(
    what: str, place: str | None, section: str, *, expected: str | None = None, found: object = None
) -> Problem:
    """Return a lint; `section` is the place in the paper, "section 5.1" or "appendix A"."""
    said = None if found is None else f"{found:g}" if isinstance(found, float) else str(found)
    return Problem(what, place, expected, said, f"{PAPER}, {section}")


def too_many_experts(experts: int, place: str) -> list[Problem]:
    """Return a lint if there are more experts than help."""
    if experts <= MOST_EXPERTS:
        return []
    return [advice("more experts than help", place, "section 5.1",
                   expected=f"at most {MOST_EXPERTS}", found=experts)]  # fmt: skip


def too_much_capacity(factor: float | None, experts: int, place: str) -> list[Problem]:
    """Return a lint if an expert has more slots than there are tokens."""
    if factor is None or factor <= experts:
        return []
    return [advice("an expert has more slots than there are tokens", place, "section 2",
                   expected=f"at most {experts}, the number of experts", found=factor)]  # fmt: skip


def coefficient(value: float, usual: float, what: str, place: str, section: str) -> list[Problem]:
    """Return a lint if a coefficient is 0, or a hundred times off the paper's."""
    if value == 0:
        return [advice(f"{what} is off", place, section, expected=f"{usual:g}", found=0)]
    if usual / 100 < value < usual * 100:
        return []
    return [advice(f"{what} is a hundred times off", place, section,
                   expected=f"{usual:g}", found=value)]  # fmt: skip


# Whose fault a crash is: a pass of moecc is a bug of moecc, any other is its author's to fix.

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
