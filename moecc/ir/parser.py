"""Parse the text of a graph: the inverse of the printer, with errors that point at the location.

A wrong line is reported and skipped, and lines that depend on it are skipped silently; all problems
of a text are raised together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from moecc.errors import InputError, Problem, nearest, printable
from moecc.ir.graph import Graph, Value
from moecc.ir.literals import parse_attrs
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.ops import OPS, OpDef, op
from moecc.ir.printer import FORMAT
from moecc.ir.scanner import ParseError, Scanner, Token
from moecc.ir.verify import check_param
from moecc.support.gc_pause import gc_paused
from moecc.types.tensor import TensorType
from moecc.types.text import parse_type

if TYPE_CHECKING:
    from moecc.weights.expr import Expr

MAX_PROBLEMS = 20

MAX_LOCATION = 256
"""The most characters of a location, whose numbers are layers."""


_CLOSING = re.compile(r"^[ \t]*\}", re.MULTILINE)
"""The brace that closes a body, on a line of its own."""

T = TypeVar("T")


class _Poisoned(Exception):
    """The line uses a value whose own line was wrong; nothing new to report."""


class _WrongBody(Exception):
    """The body of the node was parsed to its end, and its problems are recorded."""


def parse(text: str, file: str = "<text>") -> Graph:
    """Return the graph that `text` describes.

    Args:
      text: the output of `print_graph`; ``#`` starts a comment.
      file: the name of the text in messages.

    Raises:
      ParseError: all problems found, up to a limit.
    """
    with gc_paused():
        return _Parser(Scanner(text, file)).module()


class _Parser:
    def __init__(self, scanner: Scanner, around: _Parser | None = None) -> None:
        self.scan = scanner
        self.around = around
        self.graph = Graph() if around is None else Graph("body")
        self.problems: list[Problem] = [] if around is None else around.problems
        self.poisoned: set[str] = set()
        self.types: dict[str, TensorType] = {} if around is None else around.types
        self.attrs: dict[tuple[OpDef, str], dict[str, object]] = {}

    def module(self) -> Graph:
        scan = self.scan
        scan.expect("name", "moecc", what="'moecc 1' at the start of the text")
        version = scan.expect("number", what="the version of the format")
        if version.text != str(FORMAT):
            raise scan.error(
                f"format {version.text} is not supported", version.at, expected=str(FORMAT)
            )
        scan.expect("name", "graph")
        self.graph.name = scan.expect("name", what="the name of the graph").text
        if self.statements() and scan.token.kind != "end":
            self.problems.append(scan.problem("text after the graph", scan.token.at))
        if self.problems:
            raise ParseError(self.problems)
        return self.graph

    def statements(self) -> bool:
        """Parse statements in braces, and return whether the closing brace is present."""
        scan = self.scan
        scan.expect("punct", "{")
        while not (scan.token.kind == "punct" and scan.token.text == "}"):
            if scan.token.kind == "end":
                what = f"the {'graph' if self.around is None else 'body'} has no closing brace"
                self.problems.append(scan.problem(what, scan.token.at))
                return False
            self.line()
        scan.advance()
        return True

    def line(self) -> None:
        """Parse one statement; on an error record it and continue with the next line."""
        start = self.scan.token
        try:
            self.statement(start)
        except ParseError as error:
            # Those of a body are recorded already: both parsers share one list.
            self.problems.extend(p for p in error.problems if p not in self.problems)
            self.recover(start)
        except _Poisoned:
            self.recover(start)
        except _WrongBody:
            self.poison(start)
        if len(self.problems) >= MAX_PROBLEMS:
            raise ParseError(self.problems)

    def poison(self, start: Token) -> str:
        """Mark what the line from `start` on defines as undefined, and return the line."""
        end = self.scan.text.find("\n", start.at)
        line = self.scan.text[start.at : end if end >= 0 else None]
        head = line.split("=", 1)[0].split(":", 1)[0]
        self.poisoned.update(w.strip(" ,")[1:] for w in head.split() if w.startswith("%"))
        return line

    def recover(self, start: Token) -> None:
        text, line = self.scan.text, self.poison(start)
        end = start.at + len(line)
        if start.kind == "value" and line.rstrip().endswith("{"):
            # The body of a wrong line has no meaning without it.
            close = _CLOSING.search(text, end)
            end = close.end() if close is not None else len(text)
        while True:
            try:
                self.scan.jump(end)
                return
            except ParseError as error:
                self.problems.extend(error.problems)
                end = text.find("\n", end + 1)
                if end < 0 or len(self.problems) >= MAX_PROBLEMS:
                    raise ParseError(self.problems) from None

    def statement(self, start: Token) -> None:
        if start.kind == "value":
            self.node()
            return
        keyword = self.scan.expect("name", what="a statement").text
        handlers = {"input": self.input, "output": self.output}
        if self.around is None:
            handlers |= {"attr": self.attr, "param": self.param}
        handler = handlers.get(keyword)
        if handler is None:
            hint = nearest(keyword, handlers)
            raise self.scan.error(f"unknown statement {printable(keyword)!r}", start.at, hint=hint)
        handler()

    def attr(self) -> None:
        name = self.scan.expect("name", what="the name of an attribute").text
        equals = self.scan.token
        if equals.text != "=":
            raise self.scan.error("expected =", equals.at)
        # JSON follows, which is not made of our tokens, so step over the sign by hand.
        self.scan.token = Token("json", "", equals.at + 1)
        self.graph.attrs[name] = self.scan.json_line()

    def input(self) -> None:
        name = self.scan.expect("value", what="a value")
        self.scan.expect("punct", ":")
        type = self.type()
        self.guarded(name.at, lambda: self.graph.input(name.text[1:], type))

    def param(self) -> None:
        scan = self.scan
        name = scan.expect("value", what="a value")
        scan.expect("punct", ":")
        type = self.type()
        made_at = scan.token.at
        weight = self.weight() if scan.token.text == "=" else None
        place = scan.token.at
        loc, origin = self.loc()
        if origin:
            raise scan.error("a parameter has a location and no origin", place)
        value = self.guarded(
            name.at, lambda: self.graph.param(name.text[1:], type, weight, loc=loc)
        )
        for wrong in check_param(value):
            raise scan.error(wrong.what, made_at, expected=wrong.expected, found=wrong.found)

    def weight(self) -> Expr:
        from moecc.weights.text import ExprSyntaxError, parse_expr

        scan, start = self.scan, self.scan.token.at + 1
        try:
            weight, end = parse_expr(scan.text, start)
        except ExprSyntaxError as error:
            raise scan.error(str(error), min(error.offset, len(scan.text))) from None
        except InputError as error:
            raise self.at(error, start) from None
        scan.jump(end)
        return weight

    def output(self) -> None:
        name = self.scan.expect("name", what="the name of an output")
        self.scan.expect("punct", "=")
        value = self.operand()
        if name.text in self.graph.output_names:
            raise self.scan.error(f"output {name.text!r} is defined twice", name.at)
        self.graph.set_output(name.text, value)

    def node(self) -> None:
        scan, graph = self.scan, self.graph
        results = [scan.advance()]
        while scan.take("punct", ","):
            results.append(scan.expect("value", what="a value"))
        scan.expect("punct", "=")
        word = scan.expect("name", what="an operation")
        entry = OPS.get(word.text)
        if entry is None:
            raise self.at(_caught(lambda: op(word.text)), word.at)
        operands: list[Value] = []
        if scan.token.kind == "value":
            operands.append(self.operand())
            while scan.take("punct", ","):
                operands.append(self.operand())
        attrs = self.attributes(entry) if scan.token.kind == "attrs" else {}
        scan.expect("punct", ":")
        types_at = scan.token.at
        types = [self.type()]
        while scan.take("punct", ","):
            types.append(self.type())
        loc, origin = self.loc()
        for token in results:
            if token.text[1:] in graph:
                raise scan.error(f"{token.text} is defined twice", token.at)
        names = [t.text[1:] for t in results]
        if len(set(names)) != len(names):
            raise scan.error("a node defines one value twice", results[0].at)
        if "body" in entry.attrs:
            if "body" in attrs:
                raise scan.error("a body is written in braces after the line", word.at)
            attrs = {**attrs, "body": self.body(word)}
        made = self.guarded(
            word.at,
            lambda: graph.append(entry, operands, attrs, names=names, loc=loc, origin=origin),
        )
        inferred = [v.type for v in made.results]
        if inferred != types:
            for value in made.results:
                self.poisoned.add(value.name)
            raise scan.error(
                f"the type of {word.text} does not follow from its operands",
                types_at,
                expected=", ".join(map(str, inferred)),
                found=", ".join(map(str, types)),
            )

    def body(self, word: Token) -> Graph:
        """Parse the body of the node of the operation `word`, in braces after its line."""
        if self.around is not None:
            raise self.scan.error("a scan within a scan", word.at, hint="unroll the inner one")
        inner, before = _Parser(self.scan, self), len(self.problems)
        if MESH in self.graph.attrs:
            inner.graph.attrs[MESH] = self.graph.attrs[MESH]
        whole = inner.statements()
        if not whole or len(self.problems) > before:
            raise _WrongBody
        return inner.graph

    def operand(self) -> Value:
        token = self.scan.expect("value", what="a value")
        name = token.text[1:]
        if name in self.graph:
            return self.graph.value(name)
        if name in self.poisoned:
            raise _Poisoned
        hint = nearest(name, list(self.graph._names)[-200:])
        raise self.scan.error(f"{token.text} is not defined", token.at, hint=hint)

    def type(self) -> TensorType:
        token = self.scan.expect("type", what="a type such as f32[batch=B]")
        known = self.types.get(token.text)
        if known is not None:
            return known
        try:
            type = parse_type(token.text, self.lookup)
        except InputError as error:
            raise self.at(error, token.at) from None
        except KeyError as error:
            if error.args[0] in self.poisoned:
                raise _Poisoned from None
            raise self.scan.error(f"%{error.args[0]} is not defined", token.at) from None
        if not type.extents:
            self.types[token.text] = type
        return type

    def lookup(self, name: str) -> Value:
        return self.graph.value(name)

    def attributes(self, entry: OpDef) -> dict[str, object]:
        token = self.scan.advance()
        key = (entry, token.text)
        known = self.attrs.get(key)
        if known is None:
            known = self.guarded(token.at, lambda: parse_attrs(entry, token.text))
            self.attrs[key] = known
        return known

    def loc(self) -> tuple[str, str]:
        if self.scan.token.kind != "loc":
            return "", ""
        token = self.scan.advance()
        if len(token.text) > MAX_LOCATION:
            found = f"{len(token.text):,} characters"
            raise self.scan.error("the location is too long", token.at, found=found)
        loc, origin = token.text[1:], ""
        if self.scan.take("name", "by"):
            origin = self.scan.expect("name", what="a pass and rewrite").text
        return loc, origin

    def at(self, error: InputError, at: int) -> ParseError:
        """Return `error`, which has no position, at offset `at`."""
        return ParseError(
            self.scan.problem(p.what, at, expected=p.expected, found=p.found, hint=p.hint)
            for p in error.problems
        )

    def guarded(self, at: int, make: Callable[[], T]) -> T:
        try:
            return make()
        except ParseError:
            raise
        except InputError as error:
            raise self.at(error, at) from None


def _caught(action: Callable[[], object]) -> InputError:
    try:
        action()
    except InputError as error:
        return error
    raise AssertionError("the action was expected to fail")
