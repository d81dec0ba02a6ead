"""Passes recognise operations by patterns and traits, not by comparing their names."""

import ast
from pathlib import Path

import moecc_passes
import pytest

from moecc.ir.operation import OPS

FOLDER = Path(moecc_passes.__file__).parent
LAYOUT = "expert_parallel.py"
"""It has a layout for each operation of a layer of experts, by its name."""

FILES = sorted(p for p in FOLDER.rglob("*.py") if p.name != LAYOUT)


def _is_op_name(node):
    """Whether an expression is ``….op.name``."""
    return ast.unparse(node).endswith(".op.name")


def compared(tree):
    """Yield the lines that compare the name of an operation, match it, or look at its letters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            parts = [node.subject]
        elif isinstance(node, ast.Attribute) and node.attr in ("startswith", "endswith"):
            parts = [node.value]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        else:
            continue
        if any(map(_is_op_name, parts)):
            yield node.lineno


def listed(tree):
    """Yield the lines with a collection of two names of operations or more, and nothing else.

    The words of an option, in ``Literal[…]``, are no operations.
    """
    options = {id(n.slice) for n in ast.walk(tree) if isinstance(n, ast.Subscript)}
    for node in ast.walk(tree):
        if id(node) in options or not isinstance(node, ast.Tuple | ast.List | ast.Set):
            continue
        words = [e.value for e in node.elts if isinstance(e, ast.Constant)]
        if len(words) == len(node.elts) > 1 and all(w in OPS for w in words):
            yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_no_name_is_compared_and_none_is_listed(file):
    tree = ast.parse(file.read_text("utf-8"))
    assert list(compared(tree)) == []
    assert list(listed(tree)) == []


def test_the_search_finds_what_it_looks_for():
    text = """
if node.op.name == "add" or user.op.name in ("mul", "neg"): pass
if node.op.name.endswith("_norm"): pass
x = TABLE[node.op.name]
match node.op.name:
    case "add": pass
"""
    assert sorted(set(compared(ast.parse(text)))) == [2, 3, 4, 5]
    assert list(listed(ast.parse('SAME = {"add", "sub"}\nOTHER = ("add", "word")'))) == [1]
