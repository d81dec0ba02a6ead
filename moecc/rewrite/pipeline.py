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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar

from moecc.errors import Problem, UsageError, nearest, or_own, printable, raise_problems
from moecc.ir.graph import Graph
from moecc.ir.operation import has_operations
from moecc.rewrite.passes import (
    EXACT,
    MOST_DIGITS,
    Context,
    Option,
    Pass,
    PassResult,
    Preserves,
    ValuePiece,
    apply_pass,
    blamed,
    choices,
    describe,
    options,
    read,
    split,
    unreadable,
    weakest,
    write,
)
from moecc.support.scan import ParseError, Scanner
from moecc.support.text import brief
from moecc.support.user_files import LOADED as LOADED
from moecc.support.user_files import run_file

# Pipeline templates: a tuple of passes under one name, whose options are forwarded by declaration.
#
# A template is data: which passes run, which of their options it exposes (under the same name and
# type and, unless overridden, with the same default and meaning), and which options it fixes.
# `PipelineTemplate.as_pass` turns it into a pass, so that pipelines, the registry, listings and
# documentation need no special case; ``@st-moe{experts=8}`` and ``st-moe{experts=8}`` name it.

INHERITED: object = object()
"""Marks a field of a template option as inherited from the pass that it is forwarded to."""


@dataclass(frozen=True)
class TemplateOption:
    """An option of a template.

    Attributes:
      field: the name of the Python field; the steps that forward it have a field of the same name.
      default: its value where the text omits it.
      doc: its meaning, in a line.
      type: its annotation, if no step has one or the template allows other values.
    """

    field: str
    default: object = INHERITED
    doc: str = ""
    type: object = INHERITED


@dataclass(frozen=True)
class TemplateStep:
    """A pass of a template.

    Attributes:
      cls: the pass.
      forward: the options forwarded from the template.
      fixed: the options set by the template.
      when: the template option that enables the step: it is skipped where the option is false or
        ``none``.  None: the step always runs.
      statistics: the counts of it that the template reports; None: all.
    """

    cls: type[Pass]
    forward: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    when: str | None = None
    statistics: tuple[str, ...] | None = None


def _no_problems(item: object) -> Iterable[Problem]:
    return ()


@dataclass(frozen=True)
class PipelineTemplate:
    """A sequence of passes under one name.

    Attributes:
      name: kebab-case; the name in pipelines.
      summary: one line, without a full stop.
      steps: the passes, in the order in which they run.
      options: its options, in the order in which they are listed.
      doc: its documentation, as the docstring of a pass.
      check: yields problems of the options beyond those the passes report.
      advise: yields lints beyond those of the passes.
    """

    name: str
    summary: str
    steps: tuple[TemplateStep, ...]
    options: tuple[TemplateOption, ...] = ()
    doc: str = ""
    check: Callable[[Any], Iterable[Problem]] = _no_problems
    advise: Callable[[Any], Iterable[Problem]] = _no_problems

    def __call__(self, **fields: object) -> TemplatePass:
        """Return the template with options, as a pass.

        Raises:
          TypeError: it has no such option.
        """
        return self.as_pass(**fields)

    @cached_property
    def as_pass(self) -> type[TemplatePass]:
        """Return the template as a pass class; call it only if `faults` yields nothing."""
        cls: type[TemplatePass] = make_dataclass(
            self.class_name,
            [self._field(option) for option in self.options],
            bases=(TemplatePass,),
            namespace={
                "name": self.name,
                "summary": self.summary,
                "must_match": any(step.cls.must_match for step in self.steps),
                "takes_rolled": all(step.cls.takes_rolled for step in self.steps),
                "template": self,
                "__doc__": self.doc or f"{self.summary[:1].upper()}{self.summary[1:]}.",
                # Without it `dataclass` would use the module of the caller, which is this one.
                "__module__": __name__,
            },
            frozen=True,
            kw_only=True,
        )
        return cls

    @property
    def class_name(self) -> str:
        """The name of the pass class."""
        return f"{''.join(word.capitalize() for word in self.name.split('-'))}Pass"

    def faults(self) -> Iterator[str]:
        """Yield the errors of the declaration."""
        offered = [option.field for option in self.options]
        for name, count in sorted(Counter(offered).items()):
            if count > 1:
                yield f"it offers the option {name!r} twice"
        if not self.steps:
            yield "it has no step"
        for step in self.steps:
            name, available = step.cls.name, _fields(step.cls)
            for option in (*step.forward, *step.fixed):
                if option not in available:
                    yield f"{name} has no option {option!r}"
            for option in step.forward:
                if option in step.fixed:
                    yield f"the option {option!r} of {name} is forwarded and fixed"
                if option not in offered:
                    yield f"it forwards {option!r} to {name}, but does not offer it"
            if step.when is not None and step.when not in offered:
                yield f"{name} is enabled by the option {step.when!r}, which it does not offer"
            for field_name, declared in available.items():
                if declared.required and field_name not in (*step.forward, *step.fixed):
                    yield f"{name} needs the option {field_name!r}"
        used = {name for step in self.steps for name in (*step.forward, step.when)}
        for offer in self.options:
            if offer.field not in used:
                yield f"no step takes its option {offer.field!r}"
            elif offer.type is INHERITED and self._target(offer.field) is None:
                yield f"its option {offer.field!r} has no type, and no step has one for it"

    def _target(self, name: str) -> Option | None:
        """Return the option of the first pass that takes the option `name`."""
        steps = (step for step in self.steps if name in step.forward)
        return next((_fields(step.cls).get(name) for step in steps), None)

    def _field(self, option: TemplateOption) -> tuple[str, object, object]:
        """Return the field of the pass for an option, as `make_dataclass` takes it."""
        target = self._target(option.field)
        kind: Any = target.type if target and option.type is INHERITED else option.type
        default = option.default
        if default is INHERITED:
            default = target.default if target else MISSING
        hint = Annotated[kind, option.doc or (target.doc if target else "")]
        return option.field, hint, field() if default is MISSING else field(default=default)


def _fields(cls: type[Pass]) -> dict[str, Option]:
    """Return the options of a pass by the names of their fields."""
    return {option.field: option for option in options(cls).values()}


@dataclass(frozen=True)
class TemplatePass(Pass):
    """A pass that runs those of its template."""

    template: ClassVar[PipelineTemplate]

    @property
    def parts(self) -> list[tuple[TemplateStep, Pass]]:
        """The steps enabled by these options, with their passes."""
        return [
            (step, step.cls(**{name: getattr(self, name) for name in step.forward}, **step.fixed))
            for step in self.template.steps
            if step.when is None or getattr(self, step.when) not in (False, None, "none")
        ]

    @property
    def preserves(self) -> Preserves:
        """The combined promise of the passes."""
        return weakest(item.preserves for _, item in self.parts)

    def _gather(self, ask: Callable[[Pass], Iterable[Problem]]) -> list[Problem]:
        return [problem for _, item in self.parts for problem in ask(item)]

    def validate(self) -> list[Problem]:
        """Return the problems that the passes report, and those of the template's own check."""
        return [*self._gather(lambda item: item.validate()), *self.template.check(self)]

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return contradictions with the passes before this one."""
        return self._gather(lambda item: item.validate_after(earlier))

    def warnings(self) -> list[Problem]:
        """Return the warnings of the passes."""
        return self._gather(lambda item: item.warnings())

    def lints(self) -> list[Problem]:
        """Return what the passes, and the template itself, are advised against."""
        return [*self._gather(lambda item: item.lints()), *self.template.advise(self)]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Run the passes; a pass that must match and matches nothing ends the run.

        Raises:
          InputError: as the passes raise it.
        """
        total: PassResult | None = None
        promises = []
        for step, item in self.parts:
            result = apply_pass(item, graph, ctx)
            promises.append(result.preserves or item.preserves)
            names = result.stats if step.statistics is None else step.statistics
            stats = {name: result.stats[name] for name in names if name in result.stats}
            if total is None:
                # The matches are those of the first pass.
                total = replace(result, stats=stats)
            else:
                total.changed |= result.changed
                total.stats = stats | total.stats
                total.remarks = [*total.remarks, *result.remarks]
                total.near_misses = [*total.near_misses, *result.near_misses]
                total.rules = result.rules | total.rules
            if item.must_match and not result.matched:
                total.matched = 0
                break
        assert total is not None, "a template has a step"
        total.preserves = weakest(promises)
        return total


# The registry of passes: those of installed packages, and those of a user's file.
#
# A package registers passes under the entry point ``moecc.passes``: a mapping from a name to a
# factory that imports and returns the class, or a pipeline template, so that listing names imports
# nothing.  moecc's own passes are registered in the same way.

_KEBAB = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*\Z")


Factory = Callable[[], type[Pass] | PipelineTemplate]


@dataclass(frozen=True)
class Registry:
    """Passes by name.

    Attributes:
      factories: the factory of each pass.
      origins: the package or file of each pass.
    """

    factories: Mapping[str, Factory]
    origins: Mapping[str, str]

    def names(self) -> list[str]:
        """Return the names of all passes, sorted."""
        return sorted(self.factories)

    def __contains__(self, name: object) -> bool:
        return name in self.factories

    def get(self, name: str) -> type[Pass]:
        """Return the pass called `name`.

        Raises:
          UsageError: there is no such pass (the nearest name is suggested), or the class or
            template is invalid.
        """
        if name not in self.factories:
            raise UsageError([unknown_pass(self, name)])
        item = self.factories[name]()
        if isinstance(item, PipelineTemplate):
            self._refuse(name, item.class_name, item.faults())
            item = item.as_pass
        self._refuse(name, item.__name__, _faults(item, name))
        return item

    def _refuse(self, name: str, cls: str, faults: Iterable[str]) -> None:
        problems = [Problem(fault, f"{self.origins[name]}, {cls}") for fault in faults]
        raise_problems(problems, UsageError)

    def extended(self, factories: Mapping[str, Factory], origin: str) -> Registry:
        """Return this registry with more passes.

        Raises:
          UsageError: a name is in use.
        """
        repeated = [
            Problem(
                f"the pass {name!r} is defined twice",
                origin,
                found=f"another in {self.origins[name]}",
                hint="rename one of them",
            )
            for name in factories
            if name in self.factories
        ]
        raise_problems(repeated, UsageError)
        return Registry(
            {**self.factories, **factories}, {**self.origins, **dict.fromkeys(factories, origin)}
        )

    def with_file(self, path: Path, *, required: bool = True) -> Registry:
        """Return this registry with the passes that a Python file defines; the file is run.

        Args:
          path: the file.
          required: whether it is an error if it defines none.

        Raises:
          UsageError: it cannot be read or run, defines no pass, or a name is in use.
        """
        module = run_file(path)
        classes = [
            item
            for item in vars(module).values()
            if isinstance(item, type)
            and issubclass(item, Pass)
            and item.__module__ == module.__name__
        ]
        items: list[type[Pass] | PipelineTemplate] = [c for c in classes if hasattr(c, "name")]
        nameless = [
            Problem("the pass has no name", f"{path}, {c.__name__}",
                    hint='name: ClassVar[str] = "my-pass", by which pipelines call it')
            for c in classes
            if not hasattr(c, "name") and not c.__abstractmethods__ and not c.__subclasses__()
        ]  # fmt: skip
        raise_problems(nameless, UsageError)
        # A template that the file only imports does not count as one that it defines.
        items += [
            item
            for item in vars(module).values()
            if isinstance(item, PipelineTemplate)
            and not (item.name in self and self.factories[item.name]() is item)
        ]
        if required and not items and not has_operations(module):
            raise UsageError(
                "the file defines no pass, family or operation",
                where=str(path),
                hint="a pass is a subclass of Pass with a name, or a PipelineTemplate; "
                "a variable holds a Family",
            )
        # A file that is named twice is run once, and adds nothing.
        added = [x for x in items if x.name not in self or self.factories[x.name]() is not x]
        extended = self.extended({item.name: partial(_same, item) for item in added}, str(path))
        for item in items:
            extended.get(item.name)
        return extended


def _same(item: type[Pass] | PipelineTemplate) -> type[Pass] | PipelineTemplate:
    return item


@cache
def installed() -> Registry:
    """Return the passes of all installed packages.

    Raises:
      UsageError: two packages define a pass of the same name.
    """
    registry = Registry({}, {})
    for point in entry_points(group="moecc.passes"):
        origin = point.dist.name if point.dist is not None else point.value
        registry = registry.extended(point.load(), origin)
    return registry


def unknown_pass(registry: Registry, name: str) -> Problem:
    """Return the problem that there is no pass `name`, with the nearest name."""
    names = ", ".join(registry.names()) or "none is installed, so install moecc again"
    hint = nearest(name, registry.factories) or f"passes: {names}"
    return Problem(f"unknown pass {name!r}", hint=or_own(hint))


def _faults(cls: type[Pass], name: str) -> Iterator[str]:
    """Yield why a class cannot be the pass `name`."""
    if cls.name != name:
        yield f"the pass registered as {name!r} has the name {cls.name!r}"
    if not _KEBAB.match(name):
        yield f"{name!r} is not in kebab-case"
    if not isinstance(getattr(cls, "summary", None), str):
        yield "it has no summary"
    if missing := sorted(cls.__abstractmethods__):
        yield f"it does not define {' and '.join(missing)}"
    if not isinstance(promise := getattr(cls, "preserves", EXACT), Preserves | property):
        yield f'it preserves {promise!r}, which is no promise: Preserves("exact"), say'
    if "__dataclass_fields__" not in vars(cls):
        yield "it is not a dataclass: @dataclass(frozen=True) is missing"
    else:
        yield from unreadable(cls)


MAX_PROBLEMS = 20

_NOTHING = re.compile("")
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*")
_SET = (ValuePiece("true"),)
_BRACES = "options are in braces: upcycle{experts=8 top-k=2}"
_EQUALS = "an option and its value are joined by =, without blanks: upcycle{experts=8 top-k=2}"
_BETWEEN = "passes are separated by commas: upcycle{experts=8},dce"
_CLOSED = "a pass with options is written upcycle{experts=8 top-k=2}"
_BLANKS = "options are separated by blanks: upcycle{experts=8 top-k=2}"
_COMMAS = re.compile(r",[a-z][a-z-]*=")
_VALUE = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^\s{}"])+')


@dataclass(frozen=True, repr=False)
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
        return cls(
            _PipelineParser(text, file, installed() if registry is None else registry).passes()
        )

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __str__(self) -> str:
        return ",".join(map(format_pass, self.passes))

    def __repr__(self) -> str:
        return brief("moecc.Pipeline", [("", str(self))])

    def in_full(self) -> str:
        """Return the text with every option stated, so that later defaults cannot change it."""
        return ",".join(format_pass(item, in_full=True) for item in self.passes)

    def problems(self) -> list[Problem]:
        """Return contradictions of options with each other or with earlier passes."""
        return self._gather(_problems_of)

    def warnings(self) -> list[Problem]:
        """Return warnings of options that are allowed but rarely intended, with their pass."""
        return self._gather(lambda item, earlier: item.warnings())

    def remarks(self) -> list[str]:
        """Return the warnings as lines, for reports."""
        return ["; ".join(map(str.strip, str(p).splitlines())) for p in self.warnings()]

    def lints(self) -> list[Problem]:
        """Return what a design guide advises against, with the pass that does it."""
        return self._gather(lambda item, earlier: item.lints())

    def _gather(self, ask: Callable[[Pass, Sequence[Pass]], list[Problem]]) -> list[Problem]:
        return [
            replace(p, where=f"{item.name}, option {p.where}" if p.where else item.name)
            for index, item in enumerate(self.passes)
            for p in _asked(item, self.passes[:index], ask)
        ]

    @property
    def preserves(self) -> Preserves:
        """The combined promise of the passes."""
        return weakest(p.preserves for p in self.passes)


def _problems_of(item: Pass, earlier: Sequence[Pass]) -> list[Problem]:
    return [*item.validate(), *item.validate_after(earlier)]


def _asked(
    item: Pass,
    earlier: Sequence[Pass],
    ask: Callable[[Pass, Sequence[Pass]], list[Problem]],
) -> list[Problem]:
    with blamed(type(item), "while its options were checked"):
        problems: list[object] = list(ask(item, earlier))
        for problem in problems:
            if not isinstance(problem, Problem):
                raise TypeError(f"{problem!r} is no Problem of moecc.errors")
    return [p for p in problems if isinstance(p, Problem)]


def format_pass(item: Pass, *, in_full: bool = False) -> str:
    """Return the text of one pass: its name and options.

    Args:
      item: the pass.
      in_full: whether options at their defaults are printed too.
    """
    values = [(o, getattr(item, o.field)) for o in options(type(item)).values()]
    parts = [
        o.name if value is True else f"{o.name}={write(o.type, value)}"
        for o, value in values
        if in_full or o.required or value != o.default
    ]
    return f"{item.name}{{{' '.join(parts)}}}" if parts else item.name


@dataclass
class _StatedOption:
    """An option as written in the text; a flag has no pieces."""

    name: str
    at: int
    pieces: tuple[ValuePiece, ...]
    text: str


@dataclass
class _Item:
    """A pass as written in the text."""

    name: str
    at: int
    is_template: bool
    stated: list[_StatedOption] = field(default_factory=list)


class _PipelineParser:
    def __init__(self, text: str, file: str, registry: Registry) -> None:
        self.scan = Scanner(text, file, blanks=_NOTHING)
        self.registry = registry
        self.problems: list[Problem] = []
        self.inside = False

    def passes(self) -> tuple[Pass, ...]:
        """Return the passes, or raise UsageError with all problems."""
        passes: list[Pass] = []
        for item in self.items():
            if len(self.problems) >= MAX_PROBLEMS:
                break
            parsed = self.make(item, passes)
            if parsed is not None:
                passes.append(parsed)
        if self.problems:
            raise UsageError(self.problems)
        return tuple(passes)

    def problem(self, message: str, at: int, **more: str | None) -> None:
        self.problems.append(self.scan.problem(message, at, **more))

    def items(self) -> Iterator[_Item]:
        scan, pending = self.scan, bool(self.scan.text.strip())
        while pending:
            try:
                yield self.item()
                self.skip()
                pending = not scan.is_at_end()
                if pending and not scan.take(","):
                    raise self.expected("a comma before the next pass")
            except ParseError as error:
                self.problems.extend(error.problems)
                # Continue after the next comma outside of braces.
                end = scan.text.find("}", scan.at) if self.inside else scan.at
                comma = scan.text.find(",", end) if end >= 0 else -1
                pending = comma >= 0 and len(self.problems) < MAX_PROBLEMS
                scan.at, self.inside = comma + 1, False

    def item(self) -> _Item:
        scan = self.scan
        self.skip()
        start = scan.at
        is_template = scan.take("@")
        item = _Item(self.token(_NAME, "the name of a pass"), start, is_template)
        if scan.take("{"):
            self.inside = True
            self.skip()
            while not scan.take("}"):
                item.stated.append(self.option())
                self.skip()
            self.inside = False
        return item

    def option(self) -> _StatedOption:
        scan, at = self.scan, self.scan.at
        name = self.token(_NAME, "the name of an option, or }")
        if not scan.take("="):
            if not scan.is_at_end() and scan.text[scan.at] not in " \t\r\n}":
                raise self.expected("=, a space or }")
            return _StatedOption(name, at, (), "no value")
        start = scan.at
        text = self.token(_VALUE, "a value")
        try:
            return _StatedOption(name, at, split(text), text)
        except ValueError as error:
            scan.at = start + error.args[0] if isinstance(error.args[0], int) else start
            raise self.expected("a value without spaces, or in quotes") from None

    def skip(self) -> None:
        self.scan.match(_SPACE, "")

    def token(self, pattern: re.Pattern[str], description: str) -> str:
        if not self.scan.is_match(pattern):
            raise self.expected(description)
        return self.scan.match(pattern, description)

    def expected(self, description: str) -> ParseError:
        """Return an error that shows how it is written, where the text looks like another form."""
        scan = self.scan
        before, character = scan.text[: scan.at].rstrip(), scan.text[scan.at : scan.at + 1]
        if self.inside:
            hint = _EQUALS if character in ("=", ":") else _CLOSED
            return scan.expected(description, _BLANKS if before.endswith(",") else hint)
        if character in ("", ","):
            return scan.expected(description, None)
        is_between = before.endswith("}") or character in ";|" or character.isalpha()
        return scan.expected(description, _BETWEEN if is_between else _BRACES)

    def make(self, item: _Item, earlier: Sequence[Pass]) -> Pass | None:
        """Return the pass that `item` describes, or None after recording its problems."""
        if item.name not in self.registry:
            problem = unknown_pass(self.registry, item.name)
            self.problem(problem.message, item.at, hint=problem.hint)
            return None
        cls = self.registry.get(item.name)
        if item.is_template and not issubclass(cls, TemplatePass):
            message = f"{item.name} is a pass, not a pipeline template"
            self.problem(message, item.at, hint=f"{item.name}, without @")
            return None
        before = len(self.problems)
        values = self.values(cls, item)
        if len(self.problems) > before:
            return None
        with blamed(cls, "while it was made"):
            parsed = cls(**values)
        offsets = {stated.name: stated.at for stated in item.stated}
        for p in _asked(parsed, earlier, _problems_of):
            at = offsets.get(p.where or "", item.at)
            self.problem(p.message, at, expected=p.expected, found=p.found, hint=p.hint)
        return parsed

    def values(self, cls: type[Pass], item: _Item) -> dict[str, object]:
        declared, values = options(cls), {}
        for stated in item.stated:
            option = declared.get(stated.name)
            if option is None:
                hint = nearest(stated.name, declared)
                hint = hint or f"options: {', '.join(declared) or 'none'}"
                self.problem(f"{item.name} has no option {stated.name!r}", stated.at, hint=hint)
            elif option.field in values:
                self.problem(f"option {stated.name!r} is defined twice", stated.at)
            else:
                values[option.field] = self.value(option, stated)
        for option in declared.values():
            if option.required and option.field not in values:
                self.problem(
                    f"{item.name} needs the option {option.name!r}",
                    item.at,
                    expected=describe(option.type),
                    hint=f"{item.name}{{{option.name}=…}}",
                )
        return values

    def value(self, option: Option, stated: _StatedOption) -> object:
        try:
            value = read(option.type, stated.pieces or _SET)
            if stated.pieces or value is True:
                return value
        except ValueError:
            pass
        has_comma = _COMMAS.search(stated.text) is not None
        is_large = len(stated.text) > MOST_DIGITS and stated.text.isdecimal()
        named = choices(option.type)
        kind = "a value that is none of its choices" if named else "a value of another type"
        fault = "too large a number" if is_large else kind
        digits = f" of {MOST_DIGITS} digits at most" if is_large else ""
        self.problem(
            f"option {stated.name!r} has {fault}",
            stated.at,
            expected=f"{describe(option.type)}{digits}",
            found=printable(stated.text),
            hint=_BLANKS if has_comma else nearest(stated.text, named),
        )
        return None
