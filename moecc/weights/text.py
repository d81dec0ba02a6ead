"""The text of a weight expression, on one line, which parses back to the same expression.

expr     = name "(" … ")"
source("name" : bf16[mlp=1536, embed=576])      full(0.5 : f32[expert=8])
tile(x, expert=8)  tile(x, expert=8, position=1)
stack(x, y, axis=expert)  concat(x, y, axis=mlp)
each(expert=0..7, source("experts.{expert}.w" : bf16[mlp=1536]))  for a stack of eight
index(x, expert=3)  slice(x, mlp=0:768)  rename(x, mlp=inner)  permute(x, (embed, mlp))
split(x, mlp=(group=2, mlp=768))  merge(x, (group, mlp)=mlp)
scale(x, 2.0)  cast(x, f32)  add(x, y)  mul(x, y)  minimum(x, y)  select(mask, x, y)
mean(x, keep=(expert))  std(x, mask)
normal(f32[expert=8], std=0.02, key=0x1f)  with mean=0.5
truncated_normal(f32[expert=8], std=0.02, key=0x1f)  with bound=2.0
uniform(f32[expert=8], low=-0.1, high=0.1, key=0x1f)
subset(pred[expert=8, mlp=1536], axis=mlp, count=768, key=0x1f)
take(x, mlp=order)  permutation(i32[mlp=1536], key=0x1f)
clusters(counts, axis=mlp, first=384, groups=6)  aligned(x, reference, axis=mlp)
fitted(covariance, mean, cross, ridge=0.01, std=0.02)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import NoReturn, TypeVar

from moecc.errors import InputError, printable
from moecc.support.ranges import Progression
from moecc.support.scan import STRING, WORD, ParseError, Scanner
from moecc.types import DTYPES, DType, TensorType, parse_type
from moecc.weights import fits as fits  # which registers its nodes
from moecc.weights.arithmetic import Moment
from moecc.weights.expr import MAX_DEPTH, NODES, Expr, Source, walk
from moecc.weights.movement import Stack, in_full

T = TypeVar("T")

_NATURAL = re.compile(r"[0-9]{1,18}(?![0-9])")
_RANGE = re.compile(r"[0-9]{1,9}\.\.[0-9]{1,9}(?:\.\.[0-9]{1,9})?(?![0-9.])")
_PIECE = re.compile(r'"(?:[^"\\\n]|\\.)*"|[^"()\[\],\n]+|.|\n')
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")
_KEY = re.compile(r"0x[0-9a-fA-F]{1,32}(?![0-9a-fA-F])")
_TYPE = re.compile(r"[a-z][a-z0-9]*\[[^\]\n]*\]")
_MARK = re.compile(r"\w+=|\S")
_KEYWORD = re.compile(r"[ \t]*\w+=")

MAX_EACH = 100_000
"""The limit on expressions that all ranges of one expression expand to."""

# Cached: a model has thousands of tensors of a few types.
_types: dict[str, TensorType] = {}
_MAX_TYPES = 4096

_CLASSES = {word: cls for word, cls in NODES.items() if cls is not Moment}
_CLASSES |= {"each": Stack, "mean": Moment, "std": Moment}


def parse_expr(text: str) -> tuple[Expr, int]:
    """Return the expression at the beginning of `text`, and the offset of its end.

    Raises:
      ParseError: the text is not an expression.
      InputError: the expression has a type error.
    """
    parser = ExprParser(Scanner(text))
    return parser.expr(), parser.scan.at


Step = tuple[list[str], str, str]
"""The marks before a field, its name, and its form."""


@cache
def _steps(cls: type[Expr]) -> list[tuple[bool, list[Step]]]:
    """Return the groups of a syntax after the first parenthesis, and whether each is optional."""
    groups = [
        (
            bool(g.defaults),
            [(_MARK.findall(literal), name, form) for literal, name, form in g.parts],
        )
        for g in cls.parsed_syntax
    ]
    first = groups[0][1]
    while "(" not in first[0][0]:
        del first[0]
    first[0][0].clear()
    return groups


class ExprParser:
    """Parses expressions at the cursor of a scanner, whose blanks are those within a line."""

    def __init__(self, scan: Scanner, depth: int = 0, expansions: list[int] | None = None) -> None:
        self.scan = scan
        self.depth = depth
        # Shared with the parsers of the expanded texts of an `each`.
        self.expansions = [0] if expansions is None else expansions

    def expr(self) -> Expr:
        """Parse one expression."""
        scan, start = self.scan, self.scan.skip()
        if self.depth >= MAX_DEPTH:
            raise scan.error(f"the expression nests deeper than {MAX_DEPTH}", start)
        name = scan.match(WORD, "an expression such as source(…)")
        cls = scan.lookup(name, _CLASSES, "weight expression", start)
        scan.expect("(")
        self.depth += 1
        fields: dict[str, object] = {"kind": name} if cls is Moment else {}
        steps = _steps(cls)
        if name == "each":
            fields, steps = self.each(), steps[1:]
        for optional, group in steps:
            if optional and not self.is_group_ahead(group[0][0]):
                continue
            for marks, field, form in group:
                for mark in marks:
                    scan.expect(mark)
                if field:
                    fields[field] = _READERS[form](self)
        self.depth -= 1
        return cls(**fields)

    def is_group_ahead(self, marks: list[str]) -> bool:
        """Return whether an optional group that begins with `marks` comes next."""
        scan, start = self.scan, self.scan.at
        ahead = all(map(scan.take, marks)) and (len(marks) > 1 or not scan.is_match(_KEYWORD))
        scan.at = start
        return ahead

    def each(self) -> dict[str, object]:
        """Parse ``axis=first..last, text``, or with a step, into the fields of a stack."""
        scan = self.scan
        axis = self.name()
        scan.expect("=")
        start = scan.skip()
        numbers = map(int, scan.match(_RANGE, "a range, 0..29").split(".."))
        low, high, step, *_ = (*numbers, 1)
        if step < 1 or high <= low or (high - low) % step:
            raise scan.error("a range must rise in equal steps", start)
        progression = Progression(low, step, (high - low) // step + 1)
        self.expansions[0] += progression.count
        if self.expansions[0] > MAX_EACH:
            raise scan.error(f"an expression expands to more than {MAX_EACH:,} others", start)
        scan.expect(",")
        start = scan.skip()
        end = _argument_end(scan.text, start)
        body = scan.text[start:end]
        # An escape in a name may stand for a part of a mark.
        if "\\" in body or f"{{{axis}}}" in STRING.sub("", body):
            xs = [self.expanded(text, start) for text in in_full(body, axis, progression)]
        else:
            xs = self.substituted(body, axis, progression, start)
        scan.at = end
        return {"xs": tuple(xs), "axis": axis}

    def substituted(self, body: str, axis: str, progression: Progression, at: int) -> list[Expr]:
        """Return `body`, whose marks stand in names of sources alone, for each number.

        It is parsed once, which takes half of the time of parsing 35,000 texts.
        """
        before = self.expansions[0]
        template = self.expanded(body, at)
        self.expansions[0] += (self.expansions[0] - before) * (progression.count - 1)
        if self.expansions[0] > MAX_EACH:
            raise self.scan.error(f"an expression expands to more than {MAX_EACH:,} others", at)
        nodes = list(walk(template))
        sources = {x: in_full(x.name, axis, progression) for x in nodes if isinstance(x, Source)}
        results = []
        for number in range(progression.count):
            values: dict[Expr, Expr] = {}
            for x in nodes:
                if isinstance(x, Source):
                    values[x] = Source(sources[x][number], x.type)
                else:
                    values[x] = x.with_operands(*(values[y] for y in x.operands))
            results.append(values[template])
        return results

    def expanded(self, text: str, at: int) -> Expr:
        """Parse all of another `text`, whose errors are reported at `at`."""
        parser = ExprParser(Scanner(text), self.depth, self.expansions)
        try:
            expr = parser.expr()
            if not parser.scan.is_at_end():
                raise parser.scan.error("more than one expression", at)
        except ParseError as error:
            raise self.scan.error(f"in {printable(text, 60)!r}: {error.message}", at) from None
        return expr

    def operands(self) -> tuple[Expr, ...]:
        """Parse operands, each with a comma after it, up to a keyword."""
        xs = []
        while not self.scan.is_match(_KEYWORD):
            xs.append(self.expr())
            self.scan.expect(",")
        return tuple(xs)

    def name(self) -> str:
        """Parse the name of an axis."""
        return self.scan.match(WORD, "the name of an axis")

    def natural(self) -> int:
        """Parse an integer that is not negative."""
        return int(self.scan.match(_NATURAL, "a whole number"))

    def number(self) -> float:
        """Parse a finite number."""
        start = self.scan.skip()
        value = float(self.scan.match(_NUMBER, "a number"))
        if math.isinf(value):
            raise self.scan.error("the number is too large", start)
        return value

    def names(self) -> tuple[str, ...]:
        """Parse names in parentheses."""
        return tuple(self.listed(self.name))

    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Parse names with sizes in parentheses."""

        def size() -> tuple[str, int]:
            name = self.name()
            self.scan.expect("=")
            return name, self.natural()

        return tuple(self.listed(size))

    def listed(self, parse: Callable[[], T]) -> Iterator[T]:
        """Parse entries in parentheses, separated by commas."""
        self.scan.expect("(")
        if not self.scan.take(")"):
            yield parse()
            while not self.scan.take(")"):
                self.scan.expect(",")
                yield parse()

    def dtype(self) -> DType:
        """Parse the name of an element type."""
        start = self.scan.skip()
        name = self.scan.match(WORD, "an element type")
        return self.scan.lookup(name, DTYPES, "element type", start)

    def type(self) -> TensorType:
        """Parse a type."""
        start = self.scan.skip()
        text = self.scan.match(_TYPE, "a type such as f32[mlp=8]")
        type = _types.get(text)
        if type is None:
            try:
                type = parse_type(text, _no_values)
            except InputError as error:
                raise self.scan.error(str(error.problems[0]), start) from None
            if len(_types) < _MAX_TYPES:
                _types[text] = type
        return type


_READERS: dict[str, Callable[[ExprParser], object]] = {
    "Expr": ExprParser.expr,
    "Expr | None": ExprParser.expr,
    "tuple[Expr, ...]": ExprParser.operands,
    "str": ExprParser.name,
    "string": lambda parser: parser.scan.string(),
    "int": ExprParser.natural,
    "key": lambda p: int(p.scan.match(_KEY, "a key of up to 32 hexadecimal digits, 0x…"), 16),
    "float": ExprParser.number,
    "tuple[str, ...]": ExprParser.names,
    "Sizes": ExprParser.sizes,
    "DType": ExprParser.dtype,
    "TensorType": ExprParser.type,
}
"""Parsers of fields by their form; `moecc.weights.expr` has the printers."""


def _argument_end(text: str, start: int) -> int:
    """Return the end of the argument that starts at `start`: before a comma or parenthesis."""
    depth, end = 0, start
    for match in _PIECE.finditer(text, start):
        mark, end = match.group(), match.end()
        if mark == "\n" or (not depth and mark in (",", ")")):
            return match.start()
        depth += (mark in ("(", "[")) - (mark in (")", "]"))
    return end


def _no_values(name: str) -> NoReturn:
    raise InputError("a weight has fixed sizes only", found=f"%{name}")
