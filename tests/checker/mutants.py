"""Mutants of the checker: its equations, and the code that applies them, with one thing changed."""

from __future__ import annotations

import ast
import copy
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import moecc_check_graphs

from .cases import failures
from .corruptions import Proof, is_accepted, proof_of
from .devices import misjudged_on_devices
from .logs import misjudged
from .parts import misjudged_parts
from .steps import misjudged_steps

FOLDER = Path(__file__).parents[2] / "checker"
TABLE, TERMS, GRAPHS = "table", "moecc_check.py", "moecc_check_graphs.py"
STEPS = "moecc_check_steps.py"
"""Parts of the checker: its lemmas and definitions, and its code."""

TURNED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
          ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
          ast.Sub: ast.Add}  # fmt: skip
"""Comparisons and signs, and what they become."""

TRUSTED = ("application", "is_integral", "bounds", "_bounds", "matches", "match_all", "rewritten",
           "substitute", "_replaced", "apart", "put", "positive", "read_log", "check", "packed",
           "compare", "check_graphs", "program", "need_shards", "check_lines", "check_scan",
           "check_node", "unknown", "on_device", "read_text", "add", "kinds", "axes", "operand",
           "change", "check_assignment", "check_slots", "check_points", "may_read", "hidden_of",
           "add_cache")  # fmt: skip
"""Functions of the checker whose mutants are judged."""
DEFINED = ("lemma", "bounds", "define once", "define positive", "define shared", "define is_place",
           "define opened_size", "define joined_size", "define is_shifted", "define combined",
           "define turns", "define count", "define over", "define start_of", "define shard_of",
           "define summed", "define block", "define gathered", "device", "local")  # fmt: skip
"""Entries of the table whose mutants are judged."""

EQUIVALENT = {
    "lemma best of undominated scores: experts[N, k, S](f, b)(c) given a, n: "
    "0 < a with a turned operator 0": "a step of 0 makes no places, which is refused",
    "packed: len(rows) <= MOST_ORDERS with a turned operator 0": "of more orders one is taken, too",
    "packed: len(orders) > 1 with a turned operator 0": "a lone order changes nothing",
    "add: len(result.node.parts) > 1 with a turned operator 0": "one part is checked, too",
    "check_node: without need(name in self.numbers['step'], f'nothing is known of "
    "{name}')": "a name without a number is refused",
    "check_node: without all((k in self.ids for k in keys))": "a node without a number is refused",
    "_bounds: without (-inf, inf)": "bounds that are missing decide as little as infinite ones",
    "matches: without isinstance(y, Values | int)": "what has no value is refused",
    "matches: without self.kind(x) == 'sum'": "equations of sums are true of every term",
    "compare: without all(({*outputs} <= {*g.outputs} for g in graphs))": "it is refused later",
    "check_node: without need({*y.body.vars} <= allowed, f'{name} depends on where a device "
    "is')": "terms of other variables are different",
    "matches: without (x.body,)": "slots alone are compared with a pattern",
    "on_device: without need(all(counts.values()), 'parts that do not divide over "
    "devices')": "what has no parts has no value, or another",
    "unknown: without not type_.unreduced": "a row of a sum of ids is no sum of rows",
    "rewritten: without need(result is not None, f'step {step} ({lemma}): its conditions do not "
    "hold')": "nothing is no value, which is refused",
}
"""Mutants that no log can tell from the checker, with the reason."""


class Mutant(NamedTuple):
    """A change of a part of the checker.

    Attributes:
      change: what was changed.
      lemmas: those that it concerns; None for all, besides what devices do.
      part: of the checker.
      text: of the part, changed.
    """

    change: str
    lemmas: frozenset[str] | None
    part: str
    text: str

    def text_of(self, part: str) -> str:
        """Return the text of a part of the checker that it is."""
        if part == self.part:
            return self.text
        return (
            moecc_check_graphs.table_text() if part == TABLE else (FOLDER / part).read_text("utf-8")
        )


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
    rows = moecc_check_graphs.table_text().splitlines()
    entry, lemmas = "", None
    for at, row in enumerate(rows):
        if row and not row.startswith((" ", "#")):
            entry = row
            match = re.match(r"lemma [†∞ ]*([^:]+):", row)
            is_of_devices = row.startswith(("device", "local"))
            lemmas = frozenset([match[1]] if match else []) if match or is_of_devices else None
        is_judged = entry.startswith(DEFINED)
        pattern = r"( +(?:let .*? = |if |= )|(?:bounds|define|device|local) .*?[)\]] = )(.*)"
        match = re.match(pattern, row)
        if not is_judged or not match or row.startswith("        "):
            continue
        end = at + 1
        while end < len(rows) and rows[end].startswith("        "):
            end += 1
        text = " ".join([match[2], *(r.strip() for r in rows[at + 1 : end])])
        if match[1].strip() == "if":
            changed = "\n".join([*rows[:at], *rows[end:], ""])
            yield Mutant(f"{entry}: without if {text}", lemmas, TABLE, changed)
        for change, tree in _changes(ast.parse(text, mode="eval"), True):
            line = match[1] + ast.unparse(tree)
            changed = "\n".join([*rows[:at], line, *rows[end:], ""])
            yield Mutant(f"{entry}: {change}", lemmas, TABLE, changed)


def of_code() -> Iterator[Mutant]:
    """Yield the mutants of the functions by which equations are applied and logs are read."""
    for part in (TERMS, GRAPHS, STEPS):
        module = ast.parse((FOLDER / part).read_text("utf-8"))
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and node.name in TRUSTED:
                right = node.body
                for change, tree in _changes(copy.deepcopy(node), False):
                    assert isinstance(tree, ast.FunctionDef)
                    node.body = tree.body
                    yield Mutant(f"{node.name}: {change}", None, part, ast.unparse(module))
                node.body = right


def checker_of(mutant: Mutant) -> ModuleType:
    """Return the checker that a mutant is."""
    modules = {}
    for part in (GRAPHS, STEPS, TERMS):
        modules[part] = module = ModuleType(part.removesuffix(".py"))
        module.__dict__["__file__"] = str(FOLDER / part)
        with mock.patch.dict(sys.modules, {m.__name__: m for m in modules.values()}):
            exec(compile(mutant.text_of(part), part, "exec"), module.__dict__)
    table = mutant.text_of(TABLE)
    modules[GRAPHS].table_text = lambda: table  # type: ignore[attr-defined]
    return modules[TERMS]


def is_alive(mutant: Mutant) -> bool:
    """Return whether no log by hand, no proof and no use of a lemma tells a mutant apart."""
    try:
        checker = checker_of(mutant)
        if mutant.lemmas:
            return not any(failures(checker, checker.read_table(), mutant.lemmas))
        if mutant.part == STEPS:
            return not any(misjudged_steps(checker))
        if mutant.part != TABLE and not is_accepted(checker, proof()):
            return False
        # What takes longer to judge by comes later.
        if any(misjudged(checker)) or any(misjudged_on_devices(checker)):
            return False
        if mutant.lemmas is None and any(failures(checker, checker.read_table())):
            return False
        return not any(misjudged_parts(checker)) and not any(misjudged_steps(checker))
    except Exception:  # a mutant that breaks is dead
        return False


@cache
def proof() -> Proof:
    """Return a proof of the matrix."""
    proof = proof_of("run", "llama_gqa", "upcycle{experts=4}")
    assert proof is not None
    return proof
