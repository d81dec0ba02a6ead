"""Commands of `click`, derived from the functions of `moecc.jobs`.

Positional parameters of a job become arguments, keyword parameters become options; one whose type
is a dataclass becomes an option for each field.  The types, defaults and
`moecc.support.console.Spelling` say how they are read; the docstring is the help, its section
``Args`` describes the parameters, as ``Attributes`` does the fields.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import cache
from math import isfinite
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from moecc.errors import escaped, nearest
from moecc.jobs import python_name
from moecc.jobs.command import Report
from moecc.support.console import PROGRESS, Spelling, clear_line, quietly, say
from moecc.support.text import duration_text, finite_json, json_text

_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Example):\s*$")


@dataclass(frozen=True)
class Docstring:
    """The parts of a docstring in Google's style.

    Attributes:
      text: what stands above the sections.
      args: the descriptions of the parameters, or of the fields of a class, by name.
      example: the lines of the section ``Example``.
    """

    text: str
    args: Mapping[str, str] = field(default_factory=dict)
    example: tuple[str, ...] = ()

    @classmethod
    def of(cls, function: object) -> Docstring:
        """Return the docstring of a function, its sections apart."""
        sections: dict[str, list[str]] = {"": []}
        lines = sections[""]
        for line in (inspect.getdoc(function) or "").splitlines():
            if match := _SECTION.match(line):
                lines = sections.setdefault(match[1], [])
            else:
                lines.append(line)
        args, name = dict[str, str](), ""
        described = sections.get("Args") or sections.get("Attributes", [])
        for line in inspect.cleandoc("\n" + "\n".join(described)).splitlines():
            if line.startswith(" "):
                args[name] += f" {line.strip()}"
            elif line:
                name, _, text = line.partition(": ")
                args[name] = text
        example = tuple(line.strip() for line in sections.get("Example", []) if line.strip())
        return cls("\n".join(sections[""]).strip(), args, example)


def job_function(name: str) -> Callable[..., Report | int | None]:
    """Return the function of a command: `moecc.jobs.NAME.NAME`, with ``_`` after a keyword."""
    function: Callable[..., Report | int | None]
    module = importlib.import_module(f"moecc.jobs.{python_name(name)}")
    function = getattr(module, python_name(name))
    return function


@cache
def command_of(name: str) -> Command:
    """Return the command of a job."""
    return make_command(name, job_function(name))


def make_command(name: str, job: Callable[..., Report | int | None]) -> Command:
    """Return a command that calls `job`; every one takes ``--quiet``, and reports ``--format``."""
    doc, hints = Docstring.of(job), get_type_hints(job, include_extras=True)
    parameters, records = list[click.Parameter](), dict[str, Any]()
    for parameter in inspect.signature(job).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            records[parameter.name] = hint
            parameters += _options(hint)
        else:
            parameters.append(_parameter(parameter, hint, doc.args.get(parameter.name, "")))
    if hints["return"] is not int:
        help = "Report for people, or as one JSON object on standard output."
        kinds = click.Choice(("human", "json"))
        parameters.append(
            click.Option(["--format"], type=kinds, default="human", show_default=True, help=help)
        )
    help = "Print only warnings and errors on standard error."
    parameters.append(click.Option(["--quiet"], is_flag=True, help=help))

    def run(*, quiet: bool, format: str = "human", **arguments: object) -> None:
        with quietly(quiet), heartbeat(name, quiet=quiet):
            for parameter_name, record in records.items():
                settings = {f.name: arguments.pop(f.name) for f in fields(record)}
                arguments[parameter_name] = record(**settings)
            positional = [arguments.pop(p.name) for p in parameters if isinstance(p, Argument)]
            result = job(*positional, **arguments)
        code = show(result, format) if isinstance(result, Report) else result
        if code:
            raise click.exceptions.Exit(code)

    epilog = "\n\n".join(f"Example: {line}" for line in doc.example)
    return Command(name, callback=run, params=parameters, help=_plain(doc.text), epilog=epilog)


def _plain(text: str) -> str:
    """Return the text of a docstring without the marks of code."""
    return text.replace("``", "").replace("`", "")


def _options(record: Any) -> Iterator[click.Parameter]:
    """Yield an option for each field of a dataclass; the docstrings of its bases count, too."""
    hints = get_type_hints(record, include_extras=True)
    doc = {n: text for cls in record.__mro__[::-1] for n, text in Docstring.of(cls).args.items()}
    for parameter in inspect.signature(record).parameters.values():
        option = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        yield _parameter(option, hints[option.name], doc[option.name])


def _parameter(parameter: inspect.Parameter, hint: Any, help: str) -> click.Parameter:
    spelling = Spelling()
    if hasattr(hint, "__metadata__"):
        spelling = next(m for m in hint.__metadata__ if isinstance(m, Spelling))
        hint = hint.__origin__
    is_required = parameter.default is parameter.empty
    if NoneType in get_args(hint):
        hint = next(t for t in get_args(hint) if t is not NoneType)
    is_sequence = get_origin(hint) is Sequence
    if is_sequence:
        (hint,) = get_args(hint)
    name, settings = parameter.name, dict[str, Any](required=is_required)
    if not is_required:
        settings["default"] = None if is_sequence else parameter.default
    settings["type"] = _type(hint, spelling)
    if spelling.complete:
        settings["shell_complete"] = _completion(spelling.complete)
    if parameter.kind is not parameter.KEYWORD_ONLY:
        metavar = spelling.metavar or name.upper()
        count = -1 if is_sequence else 1
        argument = Argument([name], metavar=metavar, nargs=count, **settings)
        argument.help = _plain(help or spelling.help)
        return argument
    words = [
        f"--{spelling.option or name.replace('_', '-')}",
        name,
        *([f"-{spelling.short}"] if spelling.short else []),
    ]
    if hint is bool:
        del settings["type"]
        settings["is_flag"] = True
    return click.Option(
        words, metavar=spelling.metavar, multiple=is_sequence, help=_plain(help or spelling.help),
        show_default=not (is_required or hint is bool or parameter.default in (None, "", ())),
        **settings,
    )  # fmt: skip


def _type(hint: Any, spelling: Spelling) -> click.ParamType[Any]:
    if spelling.choices:
        return _Choice(spelling.choices)
    if get_origin(hint) is Literal:
        return _Choice(get_args(hint))
    if spelling.is_count:
        return _Count(hint, spelling.low)
    if hint is float:
        return _FiniteRange(spelling.low, spelling.high)
    if spelling.low is None:
        types: dict[object, click.ParamType[Any]]
        types = {int: click.INT, str: click.STRING, bool: click.BOOL}
        return types[hint]
    return click.IntRange(int(spelling.low), spelling.high)


class _Choice(click.Choice[str]):
    """One of a few words, of which the message for any other suggests the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        words = super().get_invalid_choice_message(value, ctx).removesuffix(".")
        return "; ".join(filter(None, (words, nearest(str(value), self.choices))))


class _FiniteRange(click.FloatRange):
    """A range without infinity and NaN, of which the first is above and the second beside all."""

    name = "number"  # in messages: not a valid number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number

    def _describe_range(self) -> str:
        """Return the range for the help; click describes one without bounds as ``x<=None``."""
        return "" if self.min is None and self.max is None else super()._describe_range()


_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}

_MOST = 10**30
"""The limit on counts: their products with sizes stay numbers of floating point."""


class _Count(click.ParamType[Any]):
    """A number of tokens: ``4096``, ``4M``, ``1.5e12``, ``2T``; of ints a whole one."""

    name = "count"
    _SPELLED = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,3})?)\s*([kmgbt]?)\Z", re.IGNORECASE)

    def __init__(self, kind: type[int] | type[float], low: float | None) -> None:
        self._kind, self._low = kind, low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        spelled = self._SPELLED.match(value.strip())
        try:
            number = Fraction(spelled[1]) * _POWERS[spelled[2].lower()] if spelled else None
        except ValueError:  # underscores where Python allows none
            number = None
        if number is None or (self._kind is int and number.denominator != 1):
            noun = "whole number" if self._kind is int else "number"
            self.fail(f"{value!r} is not a {noun}: 4096, 4M or 2e12, say", param, ctx)
        if self._low is not None and number < self._low:
            self.fail(f"{value} is less than {self._low:g}", param, ctx)
        if number > _MOST:
            self.fail(f"the number is more than {_MOST:g}", param, ctx)
        return self._kind(number)


def _completion(function: str) -> Callable[..., list[CompletionItem]]:
    """Return what completes a value by a function of `moecc.cli.complete`, or by files."""

    def complete(context: object, parameter: object, incomplete: str) -> list[CompletionItem]:
        from moecc.cli import complete

        words = getattr(complete, function)(incomplete)
        return [*map(CompletionItem, words)] or [CompletionItem(incomplete, type="file")]

    return complete


class Argument(click.Argument):
    """An argument with a help text."""

    help = ""


class Command(click.Command):
    """A command whose help also lists its arguments."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then the options."""
        arguments = [p for p in self.params if isinstance(p, Argument)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl([(p.make_metavar(ctx), p.help) for p in arguments])
        super().format_options(ctx, formatter)


def show(report: Report, format: str) -> int:
    """Print what a command reports, and return its exit code.

    Raises:
      MoeccError: the error that the report ends with.
    """
    if report.is_silent:
        pass
    elif report.data is not None and format == "json":
        clear_line()
        print(json_text(finite_json(report.to_json()), indent=2))
    elif report.is_aside:
        say(report.text())
    elif report.is_raw:
        text = report.text()
        sys.stdout.write(escaped(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    else:
        clear_line()
        print(escaped(report.text()))
    if report.error is not None:
        raise report.error
    return report.exit_code


# A sign of life of a command that says nothing: on a terminal after a second, else in lines.

VARIABLE = "MOECC_PROGRESS"
"""The environment variable by which scripts that compare standard error switch it ``off``."""

FIRST_SECONDS = 1.0
LINE_SECONDS = (10.0, 30.0, 60.0)
"""When lines come where standard error is no terminal; after the last, each so much later."""


@contextmanager
def heartbeat(name: str, *, quiet: bool) -> Iterator[None]:
    """Show on the standard error for how long the command `name` has been working."""
    if quiet or os.environ.get(VARIABLE) == "off":
        yield
        return
    PROGRESS.clear()
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(name, over), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _beat(name: str, over: threading.Event) -> None:
    start, is_watched, lines = time.monotonic(), sys.stderr.isatty(), 0
    times = FIRST_SECONDS if is_watched else LINE_SECONDS[0]
    while not over.wait(max(0.0, start + times - time.monotonic())) and not PROGRESS.is_set():
        text = f"{name}: {duration_text(times)} so far"
        if is_watched:
            # What is printed next begins at the start of this line, and hides it.
            print(f"\r\033[K{text}\r", end="", file=sys.stderr, flush=True)
            times += FIRST_SECONDS
            continue
        print(text, file=sys.stderr, flush=True)
        lines += 1
        times = LINE_SECONDS[lines] if lines < len(LINE_SECONDS) else times + LINE_SECONDS[-1]
    if is_watched and times > FIRST_SECONDS:
        clear_line()
