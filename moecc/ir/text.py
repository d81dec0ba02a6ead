"""The text of a graph: printer and parser."""

from __future__ import annotations

import copyreg
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moecc.errors import InputError, Problem, nearest
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.operation import OPS, Attr, OpDef, format_attr, op
from moecc.ir.verify import check_param
from moecc.support.process import gc_paused
from moecc.support.scan import ParseError as ParseError
from moecc.support.scan import Scanner
from moecc.support.text import json_text
from moecc.types import TensorType, is_name, parse_type

if TYPE_CHECKING:
    from moecc.weights.expr import Expr


FORMAT = 1
"""The version of the text format, in its first line."""


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


def lines(graph: Graph) -> Iterator[str]:
    """Yield the lines of a graph's text."""
    yield f"moecc {FORMAT}"
    yield f"graph {graph.name} {{"
    for key, value in graph.attrs.items():
        yield f"  attr {key} = {json_text(value)}"
    yield from _inputs(graph, "  ")
    for value in graph.params.values():
        weight = "" if value.weight is None else f" = {value.weight}"
        yield f"  param %{value.name} : {value.type}{weight}{format_loc(value.loc, '')}"
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


def _parse_value(spec: Attr[Any] | None, text: str) -> object:
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


# Parse the text of a graph: the inverse of the printer, with errors that point at the location.
#
# A wrong line is reported and skipped, and lines that depend on it are skipped silently; all
# problems of a text are raised together.

MAX_PROBLEMS = 20

MAX_LOCATION = 256
"""The most characters of a location, whose numbers are layers."""


_BLANKS = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_VALUE = re.compile(r"%[A-Za-z0-9_][A-Za-z0-9_.\-]*(?:\{[0-9.]+\}[A-Za-z0-9_.\-]*)*")
_TYPE = re.compile(r"[a-z][a-z0-9]*\[[^\]\n]*\](?:\ unreduced\([^)\n]*\))?")
_ATTRS = re.compile(r'\{(?:[^{}"\n]|"(?:[^"\\\n]|\\.)*")*\}')
_LOC = re.compile(r"@[^\s]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./\-]*")
_BY = re.compile(r"by(?![A-Za-z0-9_./\-])")
_NUMBER = re.compile(r"-?(?:inf|[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)")

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
        return _GraphParser(Scanner(text, file, blanks=_BLANKS)).module()


class _GraphParser:
    def __init__(self, scan: Scanner, around: _GraphParser | None = None) -> None:
        self.scan = scan
        self.around = around
        self.graph = Graph() if around is None else Graph("body")
        self.problems: list[Problem] = [] if around is None else around.problems
        self.poisoned: set[str] = set()
        self.types: dict[str, TensorType] = {} if around is None else around.types
        self.attrs: dict[tuple[OpDef, str], dict[str, object]] = {}

    def module(self) -> Graph:
        scan = self.scan
        self.keyword("moecc", "'moecc 1' at the start of the text", _IMPORT)
        start = scan.skip()
        version = self.token(_NUMBER, "the version of the format")
        if version != str(FORMAT):
            raise scan.error(f"format {version} is not supported", start, expected=str(FORMAT))
        self.keyword("graph", "graph")
        self.graph.name = self.token(_NAME, "the name of the graph")
        if self.statements() and not scan.is_at_end():
            self.problems.append(scan.problem("text after the graph", scan.at))
        if self.problems:
            raise ParseError(self.problems)
        return self.graph

    def token(self, pattern: re.Pattern[str], description: str) -> str:
        """Parse a token, which must not have characters that a terminal does not show."""
        text = self.scan.match(pattern, description)
        if not text.isprintable():
            for at, character in enumerate(text, self.scan.at - len(text)):
                if character != "\t" and not character.isprintable():
                    hint = "remove it, or escape it in a string"
                    raise self.scan.error("a control or invisible character", at, hint=hint)
        return text

    def keyword(self, word: str, description: str, hint: str | None = None) -> None:
        start = self.scan.skip()
        if not self.scan.is_match(_NAME) or self.token(_NAME, word) != word:
            self.scan.at = start
            raise self.scan.expected(description, hint)

    def statements(self) -> bool:
        """Parse statements in braces, and return whether the closing brace is present."""
        scan = self.scan
        scan.expect("{")
        while not scan.take("}"):
            if scan.is_at_end():
                message = f"the {'graph' if self.around is None else 'body'} has no closing brace"
                self.problems.append(scan.problem(message, scan.at))
                return False
            self.line(scan.skip())
        return True

    def line(self, start: int) -> None:
        """Parse one statement; on an error record it and continue with the next line."""
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

    def poison(self, start: int) -> str:
        """Mark what the line from `start` on defines as undefined, and return the line."""
        end = self.scan.text.find("\n", start)
        line = self.scan.text[start : end if end >= 0 else None]
        head = line.split("=", 1)[0].split(":", 1)[0]
        self.poisoned.update(w.strip(" ,")[1:] for w in head.split() if w.startswith("%"))
        return line

    def recover(self, start: int) -> None:
        """Continue after the line from `start` on, and after the body that it begins."""
        line = self.poison(start)
        self.scan.at = start + len(line)
        if line.startswith("%") and line.rstrip().endswith("{"):
            # The body of a wrong line has no meaning without it.
            close = _CLOSING.search(self.scan.text, self.scan.at)
            self.scan.at = close.end() if close is not None else len(self.scan.text)

    def statement(self, start: int) -> None:
        if self.scan.is_ahead("%"):
            self.node()
            return
        handlers = {"input": self.input, "output": self.output}
        if self.around is None:
            handlers |= {"attr": self.attr, "param": self.param}
        self.scan.lookup(self.token(_NAME, "a statement"), handlers, "statement", start)()

    def attr(self) -> None:
        scan = self.scan
        name = self.token(_NAME, "the name of an attribute")
        scan.expect("=")
        start, end = scan.at, scan.text.find("\n", scan.at)
        scan.at = end if end >= 0 else len(scan.text)
        try:
            self.graph.attrs[name] = json.loads(scan.text[start : scan.at])
        except (ValueError, RecursionError) as error:
            message = getattr(error, "msg", "nested too deeply")
            raise scan.error(f"not JSON: {message}", start + getattr(error, "pos", 0)) from None

    def typed_name(self) -> tuple[int, str, TensorType]:
        """Parse ``%name : type``, and return its offset, too."""
        at = self.scan.skip()
        name = self.token(_VALUE, "a value")
        self.scan.expect(":")
        return at, name[1:], self.type()

    def input(self) -> None:
        at, name, type = self.typed_name()
        self.guarded(at, lambda: self.graph.input(name, type))

    def param(self) -> None:
        scan = self.scan
        at, name, type = self.typed_name()
        weight_at = scan.skip()
        weight = self.weight() if scan.take("=") else None
        loc_at = scan.skip()
        loc, origin = self.loc()
        if origin:
            raise scan.error("a parameter has a location and no origin", loc_at)
        value = self.guarded(at, lambda: self.graph.param(name, type, weight, loc=loc))
        for p in check_param(value):
            raise scan.error(p.message, weight_at, expected=p.expected, found=p.found)

    def weight(self) -> Expr:
        from moecc.weights.text import ExprParser

        # An expression is on one line, without comments.
        inner = Scanner(self.scan.text, self.scan.file, self.scan.at)
        weight = self.guarded(inner.at, ExprParser(inner).expr)
        self.scan.at = inner.at
        return weight

    def output(self) -> None:
        at = self.scan.skip()
        name = self.token(_NAME, "the name of an output")
        self.scan.expect("=")
        value = self.operand()
        if name in self.graph.output_names:
            raise self.scan.error(f"output {name!r} is defined twice", at)
        self.graph.set_output(name, value)

    def node(self) -> None:
        scan, graph = self.scan, self.graph
        results: list[tuple[int, str]] = []
        while not results or scan.take(","):
            results.append((scan.skip(), self.token(_VALUE, "a value")[1:]))
        scan.expect("=")
        at = scan.skip()
        operation = self.token(_NAME, "an operation")
        # An unknown operation may have a new name, which `op` tells.
        entry = OPS.get(operation) or self.guarded(at, lambda: op(operation))
        operands: list[Value] = []
        if scan.is_ahead("%"):
            operands.append(self.operand())
            while scan.take(","):
                operands.append(self.operand())
        attrs = self.attributes(entry) if scan.is_ahead("{") else {}
        scan.expect(":")
        types_at = scan.skip()
        types = [self.type()]
        while scan.take(","):
            types.append(self.type())
        loc, origin = self.loc()
        for result_at, name in results:
            if name in graph:
                raise scan.error(f"%{name} is defined twice", result_at)
        names = [name for _, name in results]
        if len(set(names)) != len(names):
            raise scan.error("a node defines one value twice", results[0][0])
        if "body" in entry.attrs:
            if "body" in attrs:
                raise scan.error("a body is written in braces after the line", at)
            attrs = {**attrs, "body": self.body(at)}
        node = self.guarded(
            at, lambda: graph.append(entry, operands, attrs, names=names, loc=loc, origin=origin)
        )
        inferred = [v.type for v in node.results]
        if inferred != types:
            self.poisoned.update(value.name for value in node.results)
            raise scan.error(
                f"the type of {operation} does not follow from its operands",
                types_at,
                expected=", ".join(map(str, inferred)),
                found=", ".join(map(str, types)),
            )

    def body(self, at: int) -> Graph:
        """Parse the body of the node whose operation is at offset `at`, in braces."""
        if self.around is not None:
            raise self.scan.error("a scan within a scan", at, hint="unroll the inner one")
        inner, before = _GraphParser(self.scan, self), len(self.problems)
        if MESH in self.graph.attrs:
            inner.graph.attrs[MESH] = self.graph.attrs[MESH]
        if not inner.statements() or len(self.problems) > before:
            raise _WrongBody
        return inner.graph

    def operand(self) -> Value:
        at = self.scan.skip()
        name = self.token(_VALUE, "a value")[1:]
        if name in self.graph:
            return self.graph.value(name)
        if name in self.poisoned:
            raise _Poisoned
        hint = nearest(name, list(self.graph._names)[-200:])
        raise self.scan.error(f"%{name} is not defined", at, hint=hint)

    def type(self) -> TensorType:
        at = self.scan.skip()
        text = self.token(_TYPE, "a type such as f32[batch=B]")
        type = self.types.get(text)
        if type is not None:
            return type
        try:
            type = self.guarded(at, lambda: parse_type(text, self.graph.value))
        except KeyError as error:
            if error.args[0] in self.poisoned:
                raise _Poisoned from None
            raise self.scan.error(f"%{error.args[0]} is not defined", at) from None
        if not type.extents:
            self.types[text] = type
        return type

    def attributes(self, entry: OpDef) -> dict[str, object]:
        at = self.scan.skip()
        text = self.token(_ATTRS, "attributes in braces")
        key = (entry, text)
        if key not in self.attrs:
            self.attrs[key] = self.guarded(at, lambda: parse_attrs(entry, text))
        return self.attrs[key]

    def loc(self) -> tuple[str, str]:
        at = self.scan.skip()
        if not self.scan.is_ahead("@"):
            return "", ""
        loc = self.token(_LOC, "a location")
        if len(loc) > MAX_LOCATION:
            raise self.scan.error("the location is too long", at, found=f"{len(loc):,} characters")
        by = self.scan.is_match(_BY) and self.token(_BY, "by")
        return loc[1:], self.token(_NAME, "a pass and rewrite") if by else ""

    def guarded(self, at: int, make: Callable[[], T]) -> T:
        """Return what `make` returns; an error without a position is one at offset `at`."""
        try:
            return make()
        except ParseError:
            raise
        except InputError as error:
            raise ParseError(
                self.scan.problem(p.message, at, expected=p.expected, found=p.found, hint=p.hint)
                for p in error.problems
            ) from None


# Graph files, and the checkpoint that a graph names.
#
# A relative name in a ``.moe`` file is taken from the folder of the file, so that a graph and its
# checkpoint can be moved together; on standard input and output, and in memory, it is taken from
# the working folder.

ATTRIBUTE = "checkpoint"


def names_from_file(graph: Graph, file: str) -> None:
    """Change a relative name, as read from `file`, to one from the working folder."""
    name, folder = _relative_name(graph), os.path.dirname(file)
    if name and folder:
        _set(graph, os.path.normpath(os.path.join(folder, name)))


def names_for_file(graph: Graph, file: str | None) -> None:
    """Change a relative name to one from the folder of `file`, which is about to be written."""
    name = _relative_name(graph)
    if not name or file is None or file == "-":
        return
    # Parents are resolved: a name that goes up leaves the folder that a link leads to.
    parent, last = os.path.split(os.path.abspath(name))
    folder = os.path.realpath(os.path.dirname(file) or os.curdir)
    _set(graph, os.path.relpath(os.path.join(os.path.realpath(parent), last), folder))


def _relative_name(graph: Graph) -> str:
    name = graph.attrs.get(ATTRIBUTE)
    return name if isinstance(name, str) and not os.path.isabs(name) else ""


def _set(graph: Graph, name: str) -> None:
    graph.attrs = {**graph.attrs, ATTRIBUTE: name}


_IMPORT = "moecc import MODEL prints the graph of a model"


def _reduced(graph: Graph) -> tuple[Callable[[str], Graph], tuple[str]]:
    return parse, (print_graph(graph),)


# A graph is pickled and deep-copied as its text: to follow the links from node to node would be as
# deep as the graph is long.
copyreg.pickle(Graph, _reduced)


def read_graph(path: str) -> Graph:
    """Return the graph in a ``.moe`` file, or on standard input for ``-``.

    The checkpoint that it names is taken from the folder of the file.

    Raises:
      ParseError: the text is not a graph.
      InputError: the file cannot be read as text.
    """
    if path == "-":
        data, name = sys.stdin.buffer.read(), "<stdin>"
    else:
        if os.path.isdir(path):
            raise InputError("is a folder, not a graph", where=path, hint=_IMPORT)
        if not os.path.isfile(path):
            folder, missing = os.path.split(path)
            folder = folder or os.curdir
            is_listed = os.path.isdir(folder) and os.access(folder, os.R_OK)
            near = nearest(missing, os.listdir(folder)) if is_listed else None
            raise InputError("no such file", where=path, hint=near or _IMPORT)
        data, name = Path(path).read_bytes(), path
    try:
        graph = parse(data.decode(), name)
    except UnicodeDecodeError as error:
        where = f"{name}: byte {error.start}"
        raise InputError("not text: a .moe file is UTF-8", where=where, hint=_IMPORT) from None
    if path != "-":
        names_from_file(graph, path)
    return graph
