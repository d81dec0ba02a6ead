"""Hostile graphs, whose names and texts are code: ``python -m tests.emit.fuzz COUNT FILE``.

The JSON file has the counts, from which a next run goes on.

Whatever the values, parameters, axes, scopes and texts of a graph are called, the emitted text has
one syntax tree, but for names of its own: those become placeholders, and everything that Python,
torch or a helper defines is compared as it stands.
"""

from __future__ import annotations

import ast
import builtins
import json
import keyword
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from moecc_backends.torch_source.writer import BlockWriter

from moecc.backend import emit_program
from moecc.errors import MoeccError
from moecc.ir.text import parse

PLAIN = """moecc 1
graph plain {
  attr family = "plain"
  attr config = {"title": "quoted"}
  input %tokens : i32[batch=B, seq=S]
  param %first.embed.weight : f32[vocab=7, embed=4] @embed
  param %first.layers.0.before.weight : f32[embed=4] @layers.0.ffn
  param %first.layers.0.turn.left.weight : f32[wide=4, embed=4] @layers.0.mixer
  param %first.layers.0.turn.right.weight : f32[embed=4, wide=4] @layers.0.mixer
  param %layers.0.ffn.router.weight : f32[expert=2, embed=4] @layers.0.ffn
  param %first.layers.0.mlp.raise.weight : f32[expert=2, mlp=8, embed=4] @layers.0.ffn
  param %first.layers.0.mlp.lower.weight : f32[expert=2, embed=4, mlp=8] @layers.0.ffn
  param %first.layers.0.gain : f32[embed=4] @layers.0.ffn
  %h = embedding %first.embed.weight, %tokens {axis=vocab} : f32[batch=B, seq=S, embed=4] @embed
  %l = contract %h, %first.layers.0.turn.left.weight {over=embed} : f32[batch=B, seq=S, wide=4] @layers.0.mixer
  %t = tanh %l : f32[batch=B, seq=S, wide=4] @layers.0.mixer
  %r = contract %t, %first.layers.0.turn.right.weight {over=wide} : f32[batch=B, seq=S, embed=4] @layers.0.mixer
  %u = add %h, %r : f32[batch=B, seq=S, embed=4] @layers.0.mixer
  %n = rms_norm %u, %first.layers.0.before.weight {axis=embed, eps=1e-05} : f32[batch=B, seq=S, embed=4] @layers.0.ffn
  %router = contract %n, %layers.0.ffn.router.weight {over=embed, precision=f32} : f32[batch=B, seq=S, expert=2] @layers.0.ffn
  %experts, %gates = route %router {top_k=1} : i32[batch=B, seq=S, choice=1], f32[batch=B, seq=S, choice=1] @layers.0.ffn
  %slots = assign_slots %experts {tokens=(batch, seq), experts=2} : i32[batch=B, seq=S, choice=1] @layers.0.ffn
  %rows = dispatch %n, %experts, %slots : f32[group=1, expert=2, slot=ragged(%slots), embed=4] @layers.0.ffn
  %wide = contract %rows, %first.layers.0.mlp.raise.weight {over=embed} : f32[group=1, expert=2, slot=ragged(%slots), mlp=8] @layers.0.ffn
  %act = gelu %wide : f32[group=1, expert=2, slot=ragged(%slots), mlp=8] @layers.0.ffn
  %down = contract %act, %first.layers.0.mlp.lower.weight {over=mlp} : f32[group=1, expert=2, slot=ragged(%slots), embed=4] @layers.0.ffn
  %sum = combine %down, %experts, %slots, %gates : f32[batch=B, seq=S, embed=4] @layers.0.ffn
  %m = mul %sum, %first.layers.0.gain : f32[batch=B, seq=S, embed=4] @layers.0.ffn
  %out = add %u, %m : f32[batch=B, seq=S, embed=4] @layers.0.ffn
  output hidden = %out
}
"""  # noqa: E501
"""The graph whose names and texts are changed."""

CODE = (
    '"', "'", '"""', "'''", "\\", "\n", "\r", "\t", "#", ";", "(", ")", ":", "=", "{", "}",
    "%s", "{0}", "\x00", "\x01", "\x02", "\x010\x02", "__import__('os')", "eval", "exec", "self",
    "import", "os", "system", "class", "lambda", ".", "..", "-", "0", "é", "\u202e", "\u2028",
    "a" * 90,    "layers,0", "print(1)", "ﬁ", "𝐚", " ", "\x0c",
)  # fmt: skip
PARTS = (
    "a", "_", "-", "9", "class", "self", "forward", "eval", "exec", "__import__", "0", "os",
    "torch", "nn", "F", "config", "layer", "rows", "None", "hidden_states", "Router", "weight",
    "train", "B", "Scope", "training", "StMoeModel", "ExpertRows", "super", "print", "match",
)  # fmt: skip
VALUES = ("h", "l", "t", "r", "u", "n", "wide", "act", "down", "sum", "m", "out")
MODULES = ("first", "embed", "before", "turn", "left", "right", "mlp", "raise", "lower", "gain")
AXES = ("wide", "mlp", "vocab")


def hostile_text(rng: np.random.Generator) -> str:
    """Return the plain graph with other names, scopes and texts, no two of which are equal."""
    words = {f"%{v}": f"%{_name(rng, '-')}v{i}" for i, v in enumerate(VALUES)}
    words |= {f"{m}.": f"{_name(rng, '-')}m{i}." for i, m in enumerate(MODULES[:-1])}
    words[".gain"] = f".{_name(rng, '-')}g"
    words |= {f"{a}=": f"{_name(rng, '')}x{i}=" for i, a in enumerate(AXES)}
    text = re.sub(r"(?<=over=)(wide|mlp)|(?<=axis=)vocab", lambda m: f"{m[0]}=", PLAIN)
    pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    before, after = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9_])"
    pattern = rf"{before}(?:{pattern})(?:(?<=[.=])|{after})|\.gain{after}"
    text = re.sub(pattern, lambda m: words[m[0]], text)
    text = re.sub(r"(over|axis)=(\w+)=", r"\1=\2", text)
    scope = re.sub(r"\s", "", "".join(rng.choice(CODE, 3)))
    text = text.replace("@layers.0.mixer", f"@layers.0.{scope}s")
    quoted = "".join(rng.choice(CODE, 3)).replace("\\", "\\\\").replace('"', '\\"')
    quoted = "".join(c if c >= " " else f"\\u{ord(c):04x}" for c in quoted)
    return text.replace('"plain"', f'"{quoted}"').replace("quoted", quoted)


def _name(rng: np.random.Generator, further: str) -> str:
    """Return a name of the grammar, with letters of `further`."""
    text = "".join(rng.choice(PARTS, 2))
    return re.sub(rf"[^A-Za-z0-9_{further}]", "", text if text[0].isalpha() else f"x{text}")


@cache
def vocabulary() -> frozenset[str]:
    """Return all names that mean something: of Python, of the helpers and models, of torch."""
    nodes = list(ast.walk(ast.parse(emitted(PLAIN))))
    names = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    names |= {alias.asname or alias.name for n in nodes
              if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names}  # fmt: skip
    names |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own = {"Mixer", "turn", "left", "right", "raise_", "lower", "embed", "before", "gain", "first"}
    return frozenset(names | set(dir(builtins)) | {"self"}) - own


class Shape(ast.NodeTransformer):
    """Replaces names of the graph by placeholders."""

    def name(self, text: str) -> str:
        """Return a name that means something as it is, and others as a placeholder."""
        if not (text.isidentifier() and text.isascii()) or keyword.iskeyword(text):
            raise ValueError(f"{text!r} is no name")
        return text if text in vocabulary() else "_"

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Replace a variable."""
        node.id = self.name(node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """Replace an argument."""
        node.arg = self.name(node.arg)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Replace a member, of what lies below `self` always."""
        self.generic_visit(node)
        is_module = isinstance(node.value, ast.Name) and node.value.id == "self"
        is_module |= isinstance(node.value, ast.Attribute) and node.value.attr == "_"
        node.attr = "_" if is_module and node.attr != "training" else self.name(node.attr)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        """Replace the name of an argument."""
        node.arg = node.arg and self.name(node.arg)
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Replace the name of a class."""
        node.name = self.name(node.name)
        self.generic_visit(node)
        return node


def emitted(text: str) -> str:
    """Return the program of a graph."""
    (program,) = emit_program(parse(text), "torch").files.values()
    return program


WORD = re.compile(r'"[^"\n]*"|\d[\w.]*|[A-Za-z_]\w*', re.ASCII)
"""Texts, numbers and names."""


def shape(program: str, head: str = "") -> list[str]:
    """Return the statements of a program after `head`, names of its own apart."""
    text = program.removeprefix(head)
    lines = text.splitlines()
    return [_dump(node, "\n".join(lines[node.lineno - 1 : node.end_lineno]))
            for node in ast.parse(text).body]  # fmt: skip


def _dump(node: ast.AST, text: str) -> str:
    """Return a statement; equal texts but for names of their own are the same one."""
    if "\\" in text or "'" in text:
        return ast.dump(Shape().visit(node))
    key = WORD.sub(_word, text)
    if key not in DUMPS:
        DUMPS[key] = ast.dump(Shape().visit(node))
    return DUMPS[key]


def _word(match: re.Match[str]) -> str:
    text = match[0]
    is_own = (text[0].isalpha() or text[0] == "_") and text not in vocabulary()
    return "_" if is_own and not keyword.iskeyword(text) else text


DUMPS: dict[str, str] = {}


@contextmanager
def fixed_lines() -> Iterator[None]:
    """Let each value have a line of its own, whatever the lengths of names are."""
    limits = {"longest_operands": sys.maxsize, "longest_call": sys.maxsize, "longest_value": 0}
    defaults = {name: getattr(BlockWriter, name) for name in limits}
    try:
        for name, limit in limits.items():
            setattr(BlockWriter, name, limit)
        yield
    finally:
        for name, limit in defaults.items():
            setattr(BlockWriter, name, limit)


@cache
def expected() -> tuple[str, list[str]]:
    """Return the imports and helpers of the plain program, and its other statements."""
    plain = emitted(PLAIN)
    head = plain[: plain.index("\nclass Mixer(")]
    return head, shape(plain, head)


def fault(rng: np.random.Generator) -> str:
    """Return how the program of a hostile graph differs from the plain one; empty: it does not.

    Raises:
      MoeccError: the graph is rejected.
    """
    with fixed_lines():
        head, plain = expected()
        try:
            statements = shape(emitted(hostile_text(rng)), head)
        except (SyntaxError, ValueError) as error:
            return str(error) or "no syntax"
    if len(statements) != len(plain):
        return f"{len(statements)} statements"
    pairs = zip(statements, plain, strict=True)
    return next((f"{a} is not {b}" for a, b in pairs if a != b), "")


def run(count: int, first: int = 0, seed: int = 0) -> tuple[int, list[str]]:
    """Return how many of `count` graphs were written, and the faults of their texts."""
    written, faults = 0, []
    for number in range(first, first + count):
        try:
            difference = fault(np.random.default_rng((seed, number)))
        except MoeccError:
            continue
        written += 1
        faults += [f"{number}: {difference}"] if difference else []
    return written, faults


if __name__ == "__main__":
    path = Path(sys.argv[2])
    counts = {"graphs": 0, "written": 0, "seconds": 0.0, "faults": []}
    counts |= json.loads(path.read_text()) if path.exists() else {}
    while counts["graphs"] < int(sys.argv[1]):
        start = time.process_time()
        written, faults = run(500, counts["graphs"])
        counts["graphs"] += 500
        counts["written"] += written
        counts["faults"] += faults
        counts["seconds"] = round(counts["seconds"] + time.process_time() - start, 1)
        counts["date"] = time.strftime("%Y-%m-%d")
        path.write_text(json.dumps(counts, indent=1) + "\n")
    sys.exit(bool(counts["faults"]))
