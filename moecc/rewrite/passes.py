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
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from inspect import unwrap
from math import inf
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

from moecc.errors import InputError, MoeccError, Problem, describe_error
from moecc.ir.graph import Graph
from moecc.rewrite.driver import RewriteResult, RuleStats
from moecc.rewrite.pattern import PROMISES, NearMiss, PreservesKind, check_promise
from moecc.support.process import Terminated
from moecc.support.user_files import LOADED, is_own, last_line_in, raised_in
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
            captured = self.shapes.get(f"{loc}.{name}")
            if captured is None:
                hint = "moecc capture --at takes those that its pattern fits"
                return Problem(f"the statistics have no {name} of this location", loc, hint=hint)
            if captured != shape:
                message, expected = f"the statistics have another shape: {name}", str(list(shape))
                return Problem(message, loc, expected, str(list(captured)))
        return None


NO_STATISTICS = Problem(
    "this needs statistics of the model",
    "--capture",
    hint="moecc capture MODEL --text FILE --out DIR takes them, convert --capture DIR reads them",
)
"""What is said where a method reads statistics and there are none."""


ERROR_MARGIN = 10.0
"""A measured relative error above so many times the predicted one breaks the promise.

395 conversions of golden checkpoints by seven lossy pipelines stayed below 4.9 times: predictions
are of a block, and random weights amplify the error on the way to the outputs.
"""


@dataclass(frozen=True)
class Preserves:
    """How a pass changes the function that the graph computes.

    Attributes:
      kind: ``exact`` (bit-identical in the reference), ``reassociation`` (equal in real
        arithmetic) or ``approximate``.
      reason: why it is not exact.
      predicted_error: the relative error to expect, where a formula gives it.
      up_to: what keeps it from being an equality for all weights: a bound on the difference, and
        the values that it holds for; empty for an equality.
    """

    kind: PreservesKind
    reason: str = ""
    predicted_error: float | None = None
    up_to: str = ""

    def __post_init__(self) -> None:
        check_promise(self.kind)

    @property
    def is_equality(self) -> bool:
        """Whether both functions are equal in real arithmetic, for all weights."""
        return self.kind != "approximate" and not self.up_to

    def __str__(self) -> str:
        text = f"{self.kind}: {self.reason}" if self.reason else self.kind
        text = f"{text}, up to {self.up_to}" if self.up_to else text
        if self.predicted_error is None:
            return text
        return f"{text} (predicted relative error {self.predicted_error:.2g})"

    def allows_error(self, measured: float, rounding: float) -> bool:
        """Return whether a measured relative error is no more than what is predicted allows.

        Args:
          measured: the relative error of the outputs.
          rounding: the relative error that rounding alone explains.
        """
        predicted = self.predicted_error
        return predicted is None or measured <= ERROR_MARGIN * predicted + rounding


EXACT = Preserves("exact")


def weakest(promises: Iterable[Preserves]) -> Preserves:
    """Return the combined promise of several passes in a row.

    The weakest kind, the reasons joined, and the predicted errors added up if every approximate
    pass predicts one.
    """
    some = list(promises)
    kind = max((p.kind for p in some), key=PROMISES.index, default=PROMISES[0])
    reasons = dict.fromkeys(p.reason for p in some if p.reason)
    errors = [p.predicted_error for p in some if p.kind == "approximate"]
    predicted = [e for e in errors if e is not None]
    total = sum(predicted) if predicted and len(predicted) == len(errors) else None
    bounds = dict.fromkeys(p.up_to for p in some if p.up_to)
    return Preserves(kind, "; ".join(reasons), total, "; ".join(bounds))


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

        A problem's ``where`` may name the option concerned, by its name in the text.  An option
        beyond its `Bounds` is one.
        """
        values = ((o.name, o.bounds, getattr(self, o.field)) for o in options(type(self)).values())
        return [
            Problem("an option is out of range", name, str(bounds), str(value), bounds.hint)
            for name, bounds, value in values
            if bounds is not None and value is not None and value not in bounds
        ]

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
        """Return what a design guide advises against, with its source (`moecc.rewrite.passes`)."""
        return []


# The options of a pass: its fields, and parsing and printing of their values.

_BARE = re.compile(r'[^\s{}",]+\Z')

MOST_DIGITS = 19
"""Of a whole number: no option means more, and Python's parser of numbers is quadratic."""

_SCALARS: dict[object, tuple[str, re.Pattern[str], Callable[[str], object]]] = {
    types.NoneType: ("none", re.compile(r"none\Z"), lambda text: None),
    bool: ("true or false", re.compile(r"(?:true|false)\Z"), lambda text: text == "true"),
    int: ("a whole number", re.compile(rf"[+-]?[0-9]{{1,{MOST_DIGITS}}}\Z"), int),
    float: (
        "a number",
        re.compile(r"[+-]?(?:inf|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\Z"),
        float,
    ),
}
"""Description, form and parser of the values of a type, the most restrictive type first."""


@dataclass(frozen=True, slots=True)
class ValuePiece:
    """A part of a value between commas: its text, and whether it was quoted."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Bounds:
    """The values of an option that is a number, in its ``Annotated`` after the documentation.

    Attributes:
      low: the least value.
      high: what the value is below; infinite values are never allowed.
      is_open: whether `low` itself is not allowed.
      is_closed: whether `high` itself is allowed.
      hint: what is usual.
    """

    low: float
    high: float = inf
    is_open: bool = False
    is_closed: bool = False
    hint: str | None = None

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.is_open else self.low <= value
        return above and (value < self.high or (self.is_closed and value == self.high))

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.is_open else f"at least {self.low:g}"
        if self.high == inf:
            return low
        return f"{low}, {'at most' if self.is_closed else 'less than'} {self.high:g}"


@dataclass(frozen=True)
class Option:
    """An option of a pass.

    Attributes:
      name: the name in the text, ``top-k``.
      field: the name of the Python field, ``top_k``.
      type: its annotation.
      doc: its meaning, in a line.
      default: its value where the text omits it, or `dataclasses.MISSING`.
      bounds: the values that are allowed, if the annotation has bounds.
    """

    name: str
    field: str
    type: object
    doc: str
    default: object
    bounds: Bounds | None = None

    @property
    def required(self) -> bool:
        """Whether the text must state it."""
        return self.default is MISSING


@cache
def options(cls: type[Pass]) -> dict[str, Option]:
    """Return the options of a pass by name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    declared: dict[str, Option] = {}
    for f in fields(cls):
        hint, doc, *bounds = [hints[f.name], ""]
        if get_origin(hint) is Annotated:
            hint, doc, *bounds = get_args(hint)
        name = f.name.replace("_", "-")
        default = f.default if f.default_factory is MISSING else f.default_factory()
        declared[name] = Option(name, f.name, hint, doc, default, *bounds)
    return declared


def unreadable(cls: type[Pass]) -> list[str]:
    """Return the annotations of a pass that cannot be resolved or have no text form."""
    try:
        declared = options(cls)
    except NameError as error:
        return [f"an annotation cannot be resolved: {error}"]
    return [
        f"option {o.name!r} has a type without a text form: {o.type}"
        for o in declared.values()
        if not _has_text(o.type)
    ]


def _has_text(type: object) -> bool:
    if type in _SCALARS or type is str or get_origin(type) is Literal:
        return True
    inner = [t for t in get_args(type) if t is not ...]
    is_compound = get_origin(type) in (tuple, *_UNIONS)
    return is_compound and bool(inner) and all(map(_has_text, inner))


_UNIONS = (Union, types.UnionType)


class _NoFit(ValueError):
    """The text is not a value of the type."""


def read(type: object, pieces: tuple[ValuePiece, ...]) -> object:
    """Return the value of `type` parsed from `pieces`.

    Raises:
      ValueError: they are not a value of the type.
    """
    origin = get_origin(type)
    if origin in _UNIONS:
        for member in _members(type):
            try:
                return read(member, pieces)
            except _NoFit:
                continue
        raise _NoFit
    if origin is tuple:
        pieces = () if pieces == (ValuePiece("()"),) else pieces
        elements = _elements(type, len(pieces))
        if len(elements) != len(pieces):
            raise _NoFit
        return tuple(read(t, (p,)) for t, p in zip(elements, pieces, strict=True))
    if type is str and not any(p.quoted for p in pieces):
        return ",".join(p.text for p in pieces)
    if len(pieces) != 1:
        raise _NoFit
    text = pieces[0].text
    if origin is Literal:
        for choice in get_args(type):
            if str(choice) == text:
                return choice
    elif type is str:
        return text
    elif type in _SCALARS and not pieces[0].quoted:
        _, form, parse = _SCALARS[type]
        if form.match(text):
            return parse(text)
    raise _NoFit


def _elements(type: object, count: int) -> tuple[object, ...]:
    """Return the types of the elements of a tuple of `count` elements."""
    inner = get_args(type)
    return inner[:1] * count if inner[-1] is ... else inner


def _members(type: object) -> list[object]:
    """Return the members of a union, the most restrictive first."""
    order: list[object] = [Literal, *_SCALARS, tuple, str]

    def rank(member: object) -> int:
        origin: object = get_origin(member)
        return order.index(member if origin is None else origin)

    return sorted(get_args(type), key=rank)


def write(type: object, value: object) -> str:
    """Return the text that `read` parses back to `value`.

    Raises:
      ValueError: `value` is not of `type`.
    """
    if isinstance(value, tuple) and get_origin(type) in (tuple, *_UNIONS):
        if get_origin(type) in _UNIONS:
            tuples = (t for t in _members(type) if get_origin(t) is tuple)
            text = _write_elements(next(tuples, tuple[str, ...]), value)
        else:
            text = _write_elements(type, value)
    else:
        text = _write_scalar(type, value)
    if not _is_text_of(type, split(text), value):
        raise ValueError(f"{value!r} is not {describe(type)}")
    return text


def _write_elements(type: object, value: tuple[object, ...]) -> str:
    if not value:
        return "()"
    texts = []
    for inner, element in zip(_elements(type, len(value)), value, strict=True):
        text = _write_scalar(inner, element)
        texts.append(json.dumps(element) if "," in text and text[0] != '"' else text)
    return ",".join(texts) if texts != ["()"] else '"()"'


def _write_scalar(type: object, value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    parts = value.split(",")
    if all(map(_BARE.match, parts)) and _is_text_of(type, tuple(map(ValuePiece, parts)), value):
        return value
    return json.dumps(value)


def _is_text_of(type: object, pieces: tuple[ValuePiece, ...], value: object) -> bool:
    try:
        again = read(type, pieces)
    except _NoFit:
        return False
    # A float may be an int in Python, but True is not 1.
    return bool(again == value) and isinstance(again, bool) == isinstance(value, bool)


_PIECE = re.compile(r'"((?:[^"\\]|\\.)*)"|([^\s{}",]+)')


def split(text: str) -> tuple[ValuePiece, ...]:
    """Return the pieces of a value's text.

    Raises:
      ValueError: it is not a value.
    """
    pieces: list[ValuePiece] = []
    at = 0
    while not pieces or at < len(text):
        at += bool(pieces)
        match = _PIECE.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != ","):
            raise ValueError(at if match is None else match.end())
        # json rejects control characters inside quotes, which a shell may well pass on.
        is_quoted = match.group(1) is not None
        word = json.loads(match.group(), strict=False) if is_quoted else match.group()
        pieces.append(ValuePiece(word, is_quoted))
        at = match.end()
    return tuple(pieces)


def choices(type: object) -> list[str]:
    """Return the words that the literals in `type` allow."""
    if get_origin(type) is Literal:
        return list(map(str, get_args(type)))
    return [word for inner in get_args(type) for word in choices(inner)]


def describe(type: object) -> str:
    """Return a description of the values of `type`, for messages and the documentation."""
    origin, inner = get_origin(type), get_args(type)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        if inner[-1] is ...:
            return f"a list, separated by commas, each {describe(inner[0])}"
        return f"{len(inner)} values separated by commas: {', '.join(map(describe, inner))}"
    if origin in _UNIONS:
        return " or ".join(map(describe, inner))
    return "text" if type is str else _SCALARS[type][0]


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
    message: str,
    option: str | None,
    section: str,
    *,
    expected: str | None = None,
    value: object = None,
) -> Problem:
    """Return a lint; `section` is that of the paper, "section 5.1" or "appendix A"."""
    text = f"{value:g}" if isinstance(value, float) else None if value is None else str(value)
    return Problem(message, option, expected, text, f"{PAPER}, {section}")


def too_many_experts(experts: int, option: str) -> list[Problem]:
    """Return a lint if there are more experts than help."""
    if experts <= MOST_EXPERTS:
        return []
    expected = f"at most {MOST_EXPERTS}"
    return [
        advice("more experts than help", option, "section 5.1", expected=expected, value=experts)
    ]


def too_much_capacity(factor: float | None, experts: int, option: str) -> list[Problem]:
    """Return a lint if an expert has more slots than there are tokens."""
    if factor is None or factor <= experts:
        return []
    message, expected = "an expert has more slots than there are tokens", f"at most {experts}"
    expected = f"{expected}, the number of experts"
    return [advice(message, option, "section 2", expected=expected, value=factor)]


def coefficient(value: float, usual: float, loss: str, option: str, section: str) -> list[Problem]:
    """Return a lint if the coefficient of `loss` is 0, or a hundred times off the paper's."""
    if usual / 100 < value < usual * 100:
        return []
    message = f"{loss} is off" if value == 0 else f"{loss} is a hundred times off"
    return [advice(message, option, section, expected=f"{usual:g}", value=value or 0)]


# Whose fault a crash is: a pass of moecc is a bug of moecc, any other is its author's to fix.

KNOWN = (MoeccError, MemoryError, OSError)
"""Exceptions that are not a bug of a pass: the user's input, or the machine."""


class OwnPassError(InputError):
    """A pass that is not part of moecc gave moecc what it refuses: its author's to fix."""


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
    message = f"{doing}: {describe_error(error)}"
    # A pass of moecc may call an operation of the user's.
    line = last_line_in(LOADED, error)
    if is_own(cls.__module__):
        # The innermost call within the file of the pass, or its `apply`.
        code = getattr(unwrap(cls.apply), "__code__", None)
        start = f"{code.co_filename}:{code.co_firstlineno}" if code else cls.__module__
        line = line or last_line_in(cls.__module__, error) or start
    if line is None:
        return PassCrash(message, hint=hint)
    return OwnPassCrash(message, where=line, hint=hint)


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
      OwnPassError: an own pass built what an operation does not take, say.
      TypeError: it returned something else.
    """
    try:
        result = item.apply(graph, context)
    except InputError as error:
        module = type(item).__module__
        line = last_line_in(module, error) or last_line_in(LOADED, error)
        # What the pass itself refuses is its user's to mend.
        if not is_own(module) or line is None or raised_in(error) == module:
            raise
        raise OwnPassError(
            replace(p, where=f"{line}: {p.where or f'the pass {item.name}'}")
            for p in error.problems
        ) from error
    except (Exception, KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        raise PassExit(describe_error(error)).with_traceback(error.__traceback__) from None
    if not isinstance(result, PassResult):
        raise TypeError(f"apply returned {type(result).__name__}, expected PassResult")
    return result
