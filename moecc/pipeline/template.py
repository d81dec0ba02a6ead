"""Pipeline templates: a tuple of passes under one name, whose options are forwarded by declaration.

A template is data: which passes run, which of their options it exposes (under the same name and
type and, unless overridden, with the same default and meaning), and which options it
fixes.  `PipelineTemplate.as_pass` turns it into a pass, so that pipelines, the registry, listings
and documentation need no special case; ``@st-moe{experts=8}`` and ``st-moe{experts=8}`` name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

from moecc.errors import Problem
from moecc.ir.graph import Graph
from moecc.pipeline.blame import apply_pass
from moecc.pipeline.options import Option, options
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, weakest

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
class Step:
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

    def runs(self, item: Pass) -> bool:
        """Return whether the template's options `item` enable the step."""
        return self.when is None or getattr(item, self.when) not in (False, None, "none")

    def made(self, item: Pass) -> Pass:
        """Return the pass with the options forwarded from `item`, the template with its options."""
        forwarded = {name: getattr(item, name) for name in self.forward}
        return self.cls(**forwarded, **self.fixed)

    def reported(self, result: PassResult) -> dict[str, int]:
        """Return the statistics of the step that the template reports."""
        wanted = result.stats if self.statistics is None else self.statistics
        return {name: result.stats[name] for name in wanted if name in result.stats}


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
    steps: tuple[Step, ...]
    options: tuple[TemplateOption, ...] = ()
    doc: str = ""
    check: Callable[[Any], Iterable[Problem]] = _no_problems
    advise: Callable[[Any], Iterable[Problem]] = _no_problems

    def __call__(self, **given: object) -> TemplatePass:
        """Return the template with options, as a pass.

        Raises:
          TypeError: it has no such option.
        """
        return self.as_pass(**given)

    @cached_property
    def as_pass(self) -> type[TemplatePass]:
        """Return the template as a pass class; call it only if `faults` yields nothing."""
        made: type[TemplatePass] = make_dataclass(
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
        return made

    @property
    def class_name(self) -> str:
        """The name of the pass class."""
        return f"{''.join(word.capitalize() for word in self.name.split('-'))}Pass"

    def faults(self) -> Iterator[str]:
        """Yield the errors of the declaration."""
        offered = [option.field for option in self.options]
        twice = {name for name in offered if offered.count(name) > 1}
        yield from (f"it offers the option {name!r} twice" for name in sorted(twice))
        if not self.steps:
            yield "it has no step"
        for step in self.steps:
            yield from _faults_of_step(step, offered)
        used = {name for step in self.steps for name in (*step.forward, step.when)}
        for option in self.options:
            if option.field not in used:
                yield f"no step takes its option {option.field!r}"
            elif option.type is INHERITED and self._target(option.field) is None:
                yield f"its option {option.field!r} has no type, and no step has one for it"

    def _target(self, name: str) -> Option | None:
        """Return the option of the first pass that takes the option `name`."""
        for step in self.steps:
            if name in step.forward:
                return _fields(step.cls).get(name)
        return None

    def _field(self, option: TemplateOption) -> tuple[str, object, object]:
        """Return the field of the pass for an option, as `make_dataclass` takes it."""
        target = self._target(option.field)
        kind: Any = target.type if target and option.type is INHERITED else option.type
        doc = option.doc or (target.doc if target else "")
        default = option.default
        if default is INHERITED:
            default = target.default if target else MISSING
        hint = Annotated[kind, doc]
        return option.field, hint, field() if default is MISSING else field(default=default)


def _fields(cls: type[Pass]) -> dict[str, Option]:
    """Return the options of a pass by the names of their fields."""
    return {option.field: option for option in options(cls).values()}


def _faults_of_step(step: Step, offered: Sequence[str]) -> Iterator[str]:
    there = _fields(step.cls)
    for name in (*step.forward, *step.fixed):
        if name not in there:
            yield f"{step.cls.name} has no option {name!r}"
    for name in step.forward:
        if name in step.fixed:
            yield f"the option {name!r} of {step.cls.name} is forwarded and fixed"
        if name not in offered:
            yield f"it forwards {name!r} to {step.cls.name}, but does not offer it"
    if step.when is not None and step.when not in offered:
        yield f"{step.cls.name} is enabled by the option {step.when!r}, which it does not offer"
    for option in there.values():
        if option.required and option.field not in (*step.forward, *step.fixed):
            yield f"{step.cls.name} needs the option {option.field!r}"


@dataclass(frozen=True)
class TemplatePass(Pass):
    """A pass that runs those of its template."""

    template: ClassVar[PipelineTemplate]

    @property
    def parts(self) -> list[tuple[Step, Pass]]:
        """The steps enabled by these options, with their passes."""
        return [(step, step.made(self)) for step in self.template.steps if step.runs(self)]

    @property
    def preserves(self) -> Preserves:
        """The combined promise of the passes."""
        return weakest(item.preserves for _, item in self.parts)

    def validate(self) -> list[Problem]:
        """Return the problems that the passes report, and those of the template's own check."""
        found = [p for _, item in self.parts for p in item.validate()]
        return [*found, *self.template.check(self)]

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return contradictions with the passes before this one."""
        return [p for _, item in self.parts for p in item.validate_after(earlier)]

    def warnings(self) -> list[Problem]:
        """Return the warnings of the passes."""
        return [p for _, item in self.parts for p in item.warnings()]

    def lints(self) -> list[Problem]:
        """Return what the passes, and the template itself, are advised against."""
        return [*(p for _, item in self.parts for p in item.lints()), *self.template.advise(self)]

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
            stats = step.reported(result)
            total = _joined(total, result, stats)
            if item.must_match and not result.matched:
                total.matched = 0
                break
        assert total is not None, "a template has a step"
        total.preserves = weakest(promises)
        return total


def _joined(total: PassResult | None, result: PassResult, stats: dict[str, int]) -> PassResult:
    """Return the joined result of the steps; `matched` is that of the first one."""
    if total is None:
        return PassResult(
            result.changed, result.matched, stats, [*result.remarks], [*result.near_misses],
            {**result.rules},
        )  # fmt: skip
    return PassResult(
        total.changed or result.changed,
        total.matched,
        total.stats | {name: count for name, count in stats.items() if name not in total.stats},
        [*total.remarks, *result.remarks],
        [*total.near_misses, *result.near_misses],
        {**result.rules, **total.rules},
    )
