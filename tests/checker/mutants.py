"""Mutants of the checker: its equations, and the code that applies them, with one thing changed."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .cases import failures
from .corruptions import Proof, is_accepted, proof_of
from .logs import misjudged

FOLDER = Path(__file__).parents[2] / "checker"
SOURCE = FOLDER / "moecc_check.py"
DEFINITIONS = FOLDER / "moecc_check_definitions.txt"

TURNED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
          ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
          ast.Sub: ast.Add}  # fmt: skip
"""Comparisons and signs, and what they become."""

TRUSTED = ("application", "is_integral", "bounds", "_bounds", "matches", "match_all", "rewritten",
           "substitute", "_replaced", "apart", "put", "positive", "read_log", "check")  # fmt: skip
"""Functions of the checker whose mutants are judged."""

EQUIVALENT = {
    "lemma best of undominated scores: experts[N, k, S](f, b)(c) given a, n: "
    "0 < a with a turned operator 0": "a step of 0 makes no places, which is refused",
    "_bounds: without (-inf, inf)": "bounds that are missing decide as little as infinite ones",
    "matches: without isinstance(y, Values | int)": "what has no value is refused",
    "matches: without self.kind(x) == 'sum'": "equations of sums are true of every term",
    "check: without all(({*outputs} <= {*g.outputs} for g in graphs))": "it is refused later",
    "rewritten: without need(result is not None, f'step {step} ({lemma}): its conditions do not "
    "hold')": "nothing is no value, which is refused",
}
"""Mutants that no log can tell from the checker, with the reason."""


class Mutant(NamedTuple):
    """What was changed, the lemmas that it concerns (none: all), and the text that is changed."""

    change: str
    lemmas: frozenset[str] | None
    path: Path
    text: str


def _changes(tree: ast.AST, is_signed: bool) -> Iterator[tuple[str, ast.AST]]:
    """Yield copies of a tree with one comparison, sign, part of a condition or check changed."""
    for at, node in enumerate(ast.walk(tree)):
        if not isinstance(node, ast.BoolOp | ast.Compare | ast.BinOp | ast.Expr):
            continue
        changed = copy.deepcopy(tree)
        target = list(ast.walk(changed))[at]
        if isinstance(target, ast.BoolOp):
            for i in range(len(target.values)):
                part = copy.deepcopy(changed)
                values = list(ast.walk(part))[at].values  # type: ignore[attr-defined]
                gone = ast.unparse(values.pop(i))
                if len(values) == 1:
                    values *= 2
                yield f"without {gone}", part
        elif isinstance(target, ast.Compare):
            for i, operator in enumerate(target.ops):
                if type(operator) in TURNED:
                    part = copy.deepcopy(changed)
                    list(ast.walk(part))[at].ops[i] = TURNED[type(operator)]()  # type: ignore[attr-defined]
                    yield f"{ast.unparse(node)} with a turned operator {i}", part
        elif isinstance(target, ast.BinOp) and is_signed and type(target.op) in TURNED:
            target.op = TURNED[type(target.op)]()
            yield f"{ast.unparse(node)} with another sign", changed
        elif isinstance(target, ast.Expr) and ast.unparse(target).startswith("need("):
            target.value = ast.Constant(value=None)
            yield f"without {ast.unparse(node)}", changed


def of_table() -> Iterator[Mutant]:
    """Yield the mutants of lemmas, of bounds, and of the definitions that lemmas use."""
    rows = DEFINITIONS.read_text("utf-8").splitlines()
    entry, lemmas = "", None
    for at, row in enumerate(rows):
        if row and not row.startswith((" ", "#")):
            entry = row
            match = re.match(r"lemma [†∞ ]*([^:]+):", row)
            lemmas = frozenset([match[1]]) if match else None
        is_judged = entry.startswith(("lemma", "bounds", "define once", "define positive"))
        match = re.match(r"( +(?:let .*? = |if |= )|bounds .*? = |define .*? = )(.*)", row)
        if not is_judged or not match or row.startswith("        "):
            continue
        end = at + 1
        while end < len(rows) and rows[end].startswith("        "):
            end += 1
        text = " ".join([match[2], *(r.strip() for r in rows[at + 1 : end])])
        if match[1].strip() == "if":
            changed = "\n".join([*rows[:at], *rows[end:], ""])
            yield Mutant(f"{entry}: without if {text}", lemmas, DEFINITIONS, changed)
        for change, tree in _changes(ast.parse(text, mode="eval"), True):
            line = match[1] + ast.unparse(tree)
            changed = "\n".join([*rows[:at], line, *rows[end:], ""])
            yield Mutant(f"{entry}: {change}", lemmas, DEFINITIONS, changed)


def of_code() -> Iterator[Mutant]:
    """Yield the mutants of the functions by which equations are applied and logs are read."""
    module = ast.parse(SOURCE.read_text("utf-8"))
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name in TRUSTED:
            right = node.body
            for change, tree in _changes(copy.deepcopy(node), False):
                assert isinstance(tree, ast.FunctionDef)
                node.body = tree.body
                yield Mutant(f"{node.name}: {change}", None, SOURCE, ast.unparse(module))
            node.body = right


def checker_of(mutant: Mutant) -> tuple[ModuleType, Any]:
    """Return the checker that a mutant is, and its table."""
    module = ModuleType("mutant")
    module.__dict__["__file__"] = str(SOURCE)
    text = mutant.text if mutant.path == SOURCE else SOURCE.read_text("utf-8")
    exec(compile(text, "mutant", "exec"), module.__dict__)
    table = mutant.text if mutant.path == DEFINITIONS else DEFINITIONS.read_text("utf-8")
    return module, module.read_table(table)


def is_alive(mutant: Mutant) -> bool:
    """Return whether no log by hand, no proof and no use of a lemma tells a mutant apart."""
    try:
        checker, table = checker_of(mutant)
        is_code = mutant.path == SOURCE
        if is_code and (any(misjudged(checker)) or not is_accepted(checker, proof())):
            return False
        return not any(failures(checker, table, mutant.lemmas))
    except Exception:  # a mutant that breaks is dead
        return False


@cache
def proof() -> Proof:
    """Return a proof of the matrix."""
    proof = proof_of("run", "llama_gqa", "upcycle{experts=4}")
    assert proof is not None
    return proof
