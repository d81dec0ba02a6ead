"""Mutants of the checker: each lemma without one of its conditions, or with a comparison turned."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType

SOURCE = Path(__file__).parents[2] / "checker" / "moecc_check.py"

TURNED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
          ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
"""Comparisons, and what they become."""


def mutants() -> Iterator[tuple[str, str]]:
    """Yield what was changed, a line and how it reads now, and the lemma with the change."""
    for function in ast.parse(SOURCE.read_text("utf-8")).body:
        if not isinstance(function, ast.FunctionDef) or not _is_lemma(function):
            continue
        for at in range(len(list(ast.walk(function)))):
            changed = copy.deepcopy(function)
            node = list(ast.walk(changed))[at]
            line = getattr(node, "lineno", 0)
            if _mutate(node):
                place = f"{function.name}, line {line}"
                source = ast.unparse(ast.fix_missing_locations(changed))
                yield f"{place}: {ast.unparse(node)[:120]}", source


def _is_lemma(function: ast.FunctionDef) -> bool:
    calls = (d for d in function.decorator_list if isinstance(d, ast.Call))
    return any(isinstance(c.func, ast.Name) and c.func.id == "lemma" for c in calls)


def _mutate(node: ast.AST) -> bool:
    """Change a node in place, if there is a change of its kind."""
    if isinstance(node, ast.If) and isinstance(node.body[0], ast.Return):
        guarded = node.body[0].value
        if isinstance(guarded, ast.Constant) and guarded.value is None:
            node.test = ast.Constant(value=False)
            return True
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or | ast.And):
        node.values = node.values[:-1] if len(node.values) > 2 else [node.values[0]] * 2
        return True
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in TURNED:
        node.ops[0] = TURNED[type(node.ops[0])]()
        return True
    return False


@cache
def _checker() -> CodeType:
    return compile(SOURCE.read_text("utf-8"), "checker", "exec")


def loaded(lemma: str) -> ModuleType:
    """Return the checker with another definition of a lemma."""
    module = ModuleType("mutant")
    exec(_checker(), module.__dict__)
    exec(compile(lemma, "mutant", "exec"), module.__dict__)
    return module
