"""The text of a graph: printer and parser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moecc.errors import InputError, Problem, nearest, printable
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.operation import OPS, Attr, OpDef, op
from moecc.ir.verify import check_param
from moecc.support.process import gc_paused
from moecc.support.text import json_text
from moecc.types import TensorType, is_name, parse_type

if TYPE_CHECKING:
    from moecc.weights.expr import Expr


FORMAT = 1
"""The version of the text format, in its first line."""

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*\Z")
_WORDS = ("true", "false", "inf", "nan")


def format_word(text: str) -> str:
    """Return `text` bare where it reads back as a word, and quoted otherwise."""
    if _BARE.match(text) and text not in _WORDS:
        return text
    return json.dumps(text)


def format_number(value: float) -> str:
    """Return the shortest text that reads back as `value`."""
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    return repr(value)


def format_attr(spec: Attr, value: Any) -> str:
    """Return the text of an attribute's value."""
    if spec.kind == "bool":
        return "true" if value else "false"
    if spec.kind == "float":
        return format_number(value)
    if spec.kind in ("str", "axis"):
        return format_word(value)
    if spec.kind in ("axes", "words"):
        return str(value[0]) if len(value) == 1 else f"({', '.join(value)})"
    if spec.kind == "sizes":
        return f"({', '.join(f'{n}={s}' for n, s in value)})"
    return str(value)


def format_attrs(entry: OpDef, attrs: Mapping[str, object]) -> str:
    """Return the attributes that differ from their defaults, in braces, or nothing."""
    parts = [
        f"{name}={format_attr(spec, attrs[name])}"
        for name, spec in entry.attrs.items()
        if spec.kind != "region" and attrs[name] != spec.default
    ]
    return f" {{{', '.join(parts)}}}" if parts else ""


def format_loc(loc: str, origin: str) -> str:
    """Return the location and origin as printed at the end of a line."""
    if not loc and not origin:
        return ""
    return f" @{loc} by {origin}" if origin else f" @{loc}"


def format_node(node: Node) -> str:
    """Return the line of one node, without indentation and without its body."""
    results = ", ".join(["%" + v.name for v in node.results])
    operands = "".join([" %" + v.name + "," for v in node.operands])[:-1]
    attrs = format_attrs(node.op, node.attrs) if node.attrs else ""
    types = ", ".join([str(v.type) for v in node.results])
    loc = format_loc(node.loc, node.origin) if node.loc or node.origin else ""
    return f"{results} = {node.op.name}{operands}{attrs} : {types}{loc}"


def _format_param(value: Value) -> str:
    return f"param %{value.name} : {value.type}{_format_weight(value)}{format_loc(value.loc, '')}"


def _format_weight(value: Value) -> str:
    if value.weight is None:
        return ""
    from moecc.weights.text import format_expr

    return f" = {format_expr(value.weight)}"


def lines(graph: Graph) -> Iterator[str]:
    """Yield the lines of a graph's text."""
    yield f"moecc {FORMAT}"
    yield f"graph {graph.name} {{"
    for key, value in graph.attrs.items():
        yield f"  attr {key} = {json_text(value)}"
    yield from _inputs(graph, "  ")
    for value in graph.params.values():
        yield "  " + _format_param(value)
    yield from _computation(graph, "  ")
    yield "}"


def _inputs(graph: Graph, indent: str) -> Iterator[str]:
    for value in graph.inputs.values():
        yield f"{indent}input %{value.name} : {value.type}"


def _computation(graph: Graph, indent: str) -> Iterator[str]:
    """Yield the lines of nodes, their bodies in braces, and the outputs."""
    for node in graph:
        body = node.body
        yield indent + format_node(node) + (" {" if body is not None else "")
        if body is not None:
            yield from _inputs(body, indent + "  ")
            yield from _computation(body, indent + "  ")
            yield indent + "}"
    for name, value in graph.outputs.items():
        yield f"{indent}output {name} = %{value.name}"


def print_graph(graph: Graph) -> str:
    """Return the text of `graph`; `parse` reads it back to an equal graph."""
    return "\n".join(lines(graph)) + "\n"


# Parse attribute values.

_ATTR = re.compile(
    r"\s*([A-Za-z_]\w*)\s*=\s*"
    r"(\([^()]*\)|\"(?:[^\"\\]|\\.)*\"|[^,()\"\s]+)\s*(,|\Z)"
)


def parse_attrs(entry: OpDef, text: str) -> dict[str, object]:
    """Return the attributes of `entry` parsed from `text`, braces included.

    Raises:
      InputError: the text does not parse; kinds are checked by `OpDef.complete`.
    """
    inner, pos = text[1:-1].rstrip(), 0
    attrs: dict[str, object] = {}
    while pos < len(inner):
        match = _ATTR.match(inner, pos)
        if match is None:
            raise InputError("not an attribute", expected="name=value", found=inner[pos:])
        name, value, _ = match.groups()
        if name in attrs:
            raise InputError(f"attribute {name!r} is defined twice")
        attrs[name] = _parse_value(entry.attrs.get(name), value)
        pos = match.end()
    return attrs


def _parse_value(spec: Attr | None, text: str) -> object:
    kind = spec.kind if spec is not None else ""
    if kind in ("str", "axis") and text[0] not in '("':
        # A word is never parsed as a number: an axis may well be called inf.
        return text
    if kind in ("axes", "words"):
        # One axis needs no parentheses, so that {over=embed} reads well.
        return tuple(_parts(text[1:-1])) if text[0] == "(" else (text,)
    return _parse_tuple(text[1:-1]) if text[0] == "(" else _parse_scalar(text)


def _parts(inner: str) -> list[str]:
    return [p.strip() for p in inner.split(",") if p.strip()]


def _parse_tuple(inner: str) -> tuple[object, ...]:
    parts = _parts(inner)
    if parts and all("=" in p for p in parts):
        pairs = (p.split("=", 1) for p in parts)
        return tuple((n.strip(), _parse_size_word(s.strip())) for n, s in pairs)
    return tuple(_parse_scalar(p) for p in parts)


def _parse_size_word(text: str) -> object:
    return text if is_name(text) or not text else _parse_scalar(text)


def _parse_scalar(text: str) -> object:
    if text[0] == '"':
        try:
            return json.loads(text)
        except ValueError:
            raise InputError("not a string", found=text) from None
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if len(text) <= 20 else float(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


# Tokens of the text format with their offsets, and errors that point at them.

_TOKEN = re.compile(
    r"""
    (?P<skip>(?:[ \t\r\n]+|\#[^\n]*)+)
  | (?P<value>%[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:\{[0-9.]+\}[A-Za-z0-9_.\-]*)*)
  | (?P<type>[a-z][a-z0-9]*\[[^\]\n]*\](?:\ unreduced\([^)\n]*\))?)
  | (?P<attrs>\{(?:[^{}"\n]|"(?:[^"\\\n]|\\.)*")*\})
  | (?P<loc>@[^\s]*)
  | (?P<name>[A-Za-z_][A-Za-z0-9_./\-]*)
  | (?P<number>-?(?:inf|[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?))
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<punct>[{}=,:()])
    """,
    re.VERBOSE,
)


class ParseError(InputError):
    """Text that is not a valid graph; each problem has line, column and a caret."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its kind, its text, and the offset at which it starts."""

    kind: str
    text: str
    at: int


def problem_at(text: str, file: str, what: str, at: int, **more: str | None) -> Problem:
    """Return a problem at offset `at` of `text`, with its line and a caret below the column."""
    line = text.count("\n", 0, at) + 1
    start = text.rfind("\n", 0, at) + 1
    column = at - start + 1
    end = text.find("\n", start)
    whole = text[start : end if end >= 0 else len(text)]
    # A long line is cut around the column, so that the caret stays on the screen.
    cut = max(0, column - 61)
    shown = printable(whole[cut : cut + 110], 110)
    pad = len(printable(whole[cut : column - 1], 110)) if column > 1 else 0
    excerpt = f"{line:5} | {shown}\n      | {' ' * pad}^"
    return Problem(f"{what}\n{excerpt}", f"{file}:{line}:{column}", **more)


class Scanner:
    """Reads the tokens of `text` one after the other.

    Attributes:
      text: the input.
      file: its name in messages.
      token: the next token; its kind is ``end`` at the end.
    """

    def __init__(self, text: str, file: str = "<text>") -> None:
        self.text = text
        self.file = file
        self.pos = 0
        self.token = Token("end", "", 0)
        self.advance()

    def advance(self) -> Token:
        """Return the next token, and scan the one after it.

        Raises:
          ParseError: the text continues with an invalid token.
        """
        before = self.token
        match = _TOKEN.match(self.text, self.pos)
        if match is not None and match.lastgroup == "skip":
            self.pos = match.end()
            match = _TOKEN.match(self.text, self.pos)
        if match is None:
            if self.pos < len(self.text):
                raise self.error(f"unexpected character {self.text[self.pos]!r}", self.pos)
            self.token = Token("end", "", self.pos)
            return before
        self.pos = match.end()
        self.token = Token(match.lastgroup or "", match.group(), match.start())
        if not self.token.text.isprintable():
            self._require_printable()
        return before

    def _require_printable(self) -> None:
        """Raise ParseError for a control character, which would be printed again as it is."""
        for at, character in enumerate(self.token.text, self.token.at):
            if character != "\t" and not character.isprintable():
                hint = "remove it, or escape it in a string"
                raise self.error("a control or invisible character", at, hint=hint)

    def jump(self, pos: int) -> None:
        """Continue at offset `pos`."""
        self.pos = pos
        self.advance()

    def expect(self, kind: str, text: str | None = None, what: str | None = None) -> Token:
        """Return the next token, which must be of `kind` (and equal `text`).

        Raises:
          ParseError: it differs.
        """
        token = self.token
        if token.kind != kind or (text is not None and token.text != text):
            found = repr(printable(token.text, 40)) if token.text else "the end of the text"
            raise self.error(f"expected {what or text or kind}, found {found}", token.at)
        return self.advance()

    def take(self, kind: str, text: str) -> bool:
        """Consume the next token if it is `text`, and return whether it was."""
        if self.token.kind != kind or self.token.text != text:
            return False
        self.advance()
        return True

    def problem(self, what: str, at: int, **more: str | None) -> Problem:
        """Return a problem at offset `at`, with its line and a caret below the place."""
        return problem_at(self.text, self.file, what, at, **more)

    def error(self, what: str, at: int, **more: str | None) -> ParseError:
        """Return a `ParseError` at offset `at`."""
        return ParseError([self.problem(what, at, **more)])

    def json_line(self) -> object:
        """Return the JSON value that fills the rest of the line after the last token read.

        Raises:
          ParseError: it is not JSON.
        """
        start = self.token.at
        end = self.text.find("\n", start)
        end = len(self.text) if end < 0 else end
        try:
            value = json.loads(self.text[start:end])
        except (ValueError, RecursionError) as error:
            at = start + getattr(error, "pos", 0)
            raise self.error(
                f"not JSON: {getattr(error, 'msg', 'nested too deeply')}", at
            ) from None
        self.jump(end)
        return value


# Parse the text of a graph: the inverse of the printer, with errors that point at the location.
#
# A wrong line is reported and skipped, and lines that depend on it are skipped silently; all
# problems
# of a text are raised together.

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
