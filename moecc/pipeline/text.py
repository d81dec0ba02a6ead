"""Pipelines, and their text: ``canonicalize,upcycle{experts=8 top-k=2 layers=3,7,11}``.

    pipeline := (item (',' item)*)?
    item     := '@'? name ('{' option (' ' option)* '}')?
    option   := name ('=' value)?
    value    := piece (',' piece)*
    piece    := characters other than space, comma, quote and brace, or a JSON string

An option without a value is a flag that is set.  ``@`` marks the name of a pipeline
template; printed texts omit it.  All problems of a text are reported
together, each with its position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from moecc.errors import Problem, UsageError, nearest, printable
from moecc.ir.scanner import problem_at
from moecc.pipeline.blame import blamed
from moecc.pipeline.options import Option, Piece, choices, describe, options, read, split, write
from moecc.pipeline.passes import Pass, Preserves, weakest
from moecc.pipeline.registry import Registry, installed, unknown_pass
from moecc.pipeline.template import TemplatePass

MAX_PROBLEMS = 20

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*")
_SET = (Piece("true"),)
_BRACES = "options are in braces: upcycle{experts=8 top-k=2}"
_EQUALS = "an option and its value are joined by =, without blanks: upcycle{experts=8 top-k=2}"
_BETWEEN = "passes are separated by commas: upcycle{experts=8},dce"
_CLOSED = "a pass with options is written upcycle{experts=8 top-k=2}"
_BLANKS = "options are separated by blanks: upcycle{experts=8 top-k=2}"
_COMMAS = re.compile(r",[a-z][a-z-]*=")
_VALUE = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^\s{}"])+')


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str, registry: Registry | None = None, file: str = "pipeline") -> Pipeline:
        """Return the pipeline parsed from `text`, its options checked.

        Args:
          text: see the grammar of this module.
          registry: the available passes; by default the installed ones.
          file: the name of the text in messages.

        Raises:
          UsageError: all problems of the text.
        """
        return cls(_Parser(text, file, installed() if registry is None else registry).passes())

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __str__(self) -> str:
        return ",".join(map(format_pass, self.passes))

    def in_full(self) -> str:
        """Return the text with every option stated, so that later defaults cannot change it."""
        return ",".join(format_pass(item, in_full=True) for item in self.passes)

    def problems(self) -> list[Problem]:
        """Return contradictions of options with each other or with earlier passes."""
        return [p for i in range(len(self.passes)) for p in self._problems_of(i)]

    def _problems_of(self, index: int) -> Iterator[Problem]:
        item = self.passes[index]
        for p in _problems_of(item, self.passes[:index]):
            yield replace(p, where=f"{item.name}, option {p.where}" if p.where else item.name)

    def warnings(self) -> list[Problem]:
        """Return warnings of options that are allowed but rarely intended, with their pass."""
        return self._said(lambda item: item.warnings())

    def lints(self) -> list[Problem]:
        """Return what a design guide advises against, with the pass that does it."""
        return self._said(lambda item: item.lints())

    def _said(self, ask: Callable[[Pass], list[Problem]]) -> list[Problem]:
        return [
            replace(p, where=f"{item.name}, option {p.where}" if p.where else item.name)
            for item in self.passes
            for p in _blamed(item, ask)
        ]

    @property
    def preserves(self) -> Preserves:
        """The combined promise of the passes."""
        return weakest(p.preserves for p in self.passes)


def _problems_of(item: Pass, earlier: Sequence[Pass]) -> list[Problem]:
    with blamed(type(item), "while its options were checked"):
        return [*item.validate(), *item.validate_after(earlier)]


def _blamed(item: Pass, ask: Callable[[Pass], list[Problem]]) -> list[Problem]:
    with blamed(type(item), "while its options were checked"):
        return list(ask(item))


def format_pass(item: Pass, *, in_full: bool = False) -> str:
    """Return the text of one pass: its name and options.

    Args:
      item: the pass.
      in_full: whether options at their defaults are printed too.
    """
    given = [(o, getattr(item, o.field)) for o in options(type(item)).values()]
    parts = [
        _format_option(o, value)
        for o, value in given
        if in_full or o.required or value != o.default
    ]
    return f"{item.name}{{{' '.join(parts)}}}" if parts else item.name


def _format_option(option: Option, value: object) -> str:
    return option.name if value is True else f"{option.name}={write(option.type, value)}"


@dataclass
class _Given:
    """An option as written in the text; a flag has no pieces."""

    name: str
    at: int
    pieces: tuple[Piece, ...]
    text: str


@dataclass
class _Item:
    """A pass as written in the text."""

    name: str
    at: int
    is_template: bool = False
    given: list[_Given] = field(default_factory=list)


class _SyntaxProblem(Exception):
    """The text violates the grammar at an offset."""

    def __init__(self, what: str, at: int, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.at = at
        self.hint = hint


class _Parser:
    def __init__(self, text: str, file: str, registry: Registry) -> None:
        self.text = text
        self.file = file
        self.registry = registry
        self.problems: list[Problem] = []
        self.at = 0
        self.inside = False

    def passes(self) -> tuple[Pass, ...]:
        """Return the passes, or raise UsageError with all problems."""
        made: list[Pass] = []
        for item in self.items():
            if len(self.problems) >= MAX_PROBLEMS:
                break
            one = self.make(item, made)
            if one is not None:
                made.append(one)
        if self.problems:
            raise UsageError(self.problems)
        return tuple(made)

    def problem(self, what: str, at: int, **more: str | None) -> None:
        self.problems.append(problem_at(self.text, self.file, what, at, **more))

    def items(self) -> list[_Item]:
        found: list[_Item] = []
        if not self.text.strip():
            return found
        while True:
            try:
                found.append(self.item())
                self.skip()
                if self.at < len(self.text):
                    self.expect(",", "a comma before the next pass")
                    continue
            except _SyntaxProblem as error:
                self.problem(error.what, error.at, hint=error.hint)
                if len(self.problems) < MAX_PROBLEMS and self.recover():
                    continue
            return found

    def recover(self) -> bool:
        """Skip to the next comma outside braces, and return whether there is one."""
        if self.inside:
            end = self.text.find("}", self.at)
            self.at = end + 1 if end >= 0 else len(self.text)
        self.inside = False
        comma = self.text.find(",", self.at)
        self.at = comma + 1
        return comma >= 0

    def item(self) -> _Item:
        self.skip()
        start = self.at
        is_template = self.take("@")
        item = _Item(self.name("the name of a pass"), start, is_template)
        if not self.take("{"):
            return item
        self.inside = True
        self.skip()
        while not self.take("}"):
            item.given.append(self.option())
            self.skip()
        self.inside = False
        return item

    def option(self) -> _Given:
        at = self.at
        name = self.name("the name of an option, or }")
        if not self.take("="):
            if self.at < len(self.text) and self.text[self.at] not in " \t\r\n}":
                raise self.expected("=, a space or }")
            return _Given(name, at, (), "no value")
        start = self.at
        match = _VALUE.match(self.text, start)
        if match is None:
            raise self.expected("a value")
        self.at = match.end()
        try:
            return _Given(name, at, split(match.group()), match.group())
        except ValueError as error:
            self.at = start + error.args[0] if isinstance(error.args[0], int) else start
            raise self.expected("a value without spaces, or in quotes") from None

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match is not None else self.at

    def name(self, what: str) -> str:
        match = _NAME.match(self.text, self.at)
        if match is None:
            raise self.expected(what)
        self.at = match.end()
        return match.group()

    def take(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def expect(self, mark: str, what: str) -> None:
        if not self.take(mark):
            raise self.expected(what)

    def expected(self, what: str) -> _SyntaxProblem:
        rest = self.text[self.at : self.at + 1]
        found = repr(printable(rest)) if rest else "the end of the text"
        return _SyntaxProblem(f"expected {what}, found {found}", self.at, self.way_out(rest))

    def way_out(self, rest: str) -> str | None:
        """Return how it is written, where `rest` stands for something that is written otherwise."""
        if self.inside:
            return _BLANKS if self.after_comma() else _EQUALS if rest in ("=", ":") else _CLOSED
        if self.text[: self.at].rstrip().endswith("}"):
            return _BETWEEN
        return None if rest in ("", ",") else _BRACES

    def after_comma(self) -> bool:
        """Whether options seem to be separated by commas here."""
        return self.inside and self.text[: self.at].rstrip().endswith(",")

    def make(self, item: _Item, earlier: Sequence[Pass]) -> Pass | None:
        """Return the pass that `item` describes, or None after recording its problems."""
        if item.name not in self.registry:
            problem = unknown_pass(self.registry, item.name)
            self.problem(problem.what, item.at, hint=problem.hint)
            return None
        cls = self.registry.get(item.name)
        if item.is_template and not issubclass(cls, TemplatePass):
            what = f"{item.name} is a pass, not a pipeline template"
            self.problem(what, item.at, hint=f"{item.name}, without @")
            return None
        before = len(self.problems)
        values = self.values(cls, item)
        if len(self.problems) > before:
            return None
        with blamed(cls, "while it was made"):
            made = cls(**values)
        places = {g.name: g.at for g in item.given}
        for p in _problems_of(made, earlier):
            at = places.get(p.where or "", item.at)
            self.problem(p.what, at, expected=p.expected, found=p.found, hint=p.hint)
        return made

    def values(self, cls: type[Pass], item: _Item) -> dict[str, object]:
        known, values = options(cls), {}
        for given in item.given:
            option = known.get(given.name)
            if option is None:
                hint = nearest(given.name, known) or f"options: {', '.join(known) or 'none'}"
                self.problem(f"{item.name} has no option {given.name!r}", given.at, hint=hint)
            elif option.field in values:
                self.problem(f"option {given.name!r} is defined twice", given.at)
            else:
                values[option.field] = self.value(option, given)
        for option in known.values():
            if option.required and option.field not in values:
                self.problem(
                    f"{item.name} needs the option {option.name!r}",
                    item.at,
                    expected=describe(option.type),
                    hint=f"{item.name}{{{option.name}=…}}",
                )
        return values

    def value(self, option: Option, given: _Given) -> object:
        try:
            value = read(option.type, given.pieces or _SET)
            if given.pieces or value is True:
                return value
        except ValueError:
            pass
        by_commas = _BLANKS if _COMMAS.search(given.text) else None
        self.problem(
            f"option {given.name!r} has a value of another type",
            given.at,
            expected=describe(option.type),
            found=printable(given.text),
            hint=by_commas or nearest(given.text, choices(option.type)),
        )
        return None
