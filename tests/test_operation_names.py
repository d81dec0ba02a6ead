"""Where operations are still known by name, with the reason: everything else reads traits."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from moecc.ir import OPS

from .test_layering import PACKAGES, ROOT

REASONS: dict[str, tuple[int, str]] = {
    "moecc/ir/docs.py": (1, "what the table of operations says in words of mixed axes"),
    "moecc/ir/ops.py": (1, "no two rows have one name"),
    "moecc/families/experts.py": (1, "a shared expert's gate is a sigmoid by definition"),
    "moecc/ir/indices.py": (1, "learned positions are a table that positions look up"),
    "moecc/ir/table/repetition.py": (2, "the accessors of stack and index, the parts of a scan"),
    "moecc/ir/view.py": (1, "a view of attributes is of the operations that it names"),
    "moecc/plan/residuals.py": (1, "a rename is the same value under another name"),
    "backends/moecc_backends/xla/dispatch/legality.py": (
        1,
        "positions reads the shape of rows and none of their elements",
    ),
    "backends/moecc_backends/xla/dispatch/expert_exchange.py": (
        1,
        "the buffer of within_buffer bounds what can arrive",
    ),
    "backends/moecc_backends/xla/lower/assign_slots.py": (
        1,
        "route and hash_experts name an expert for every choice",
    ),
    "passes/moecc_passes/sharding/experts/chunked.py": (
        7,
        "the pass that makes chunks and joins finds those that it made",
    ),
    "passes/moecc_passes/sharding/experts/bound.py": (
        1,
        "buffers bound assign_slots; experts that choose have a bound",
    ),
    "passes/moecc_passes/sharding/groups.py": (1, "group_sum counts in token groups"),
    "passes/moecc_passes/sharding/legal.py": (1, "shard starts a case and is none of its way"),
}
"""By file: how many comparisons of an operation's name there are, and why."""

LIMIT = 25


def _is_name_of_operation(node: ast.expr, known: set[str]) -> bool:
    """Whether `node` is ``….op.name``, a step's ``….op``, or a variable that holds one."""
    if isinstance(node, ast.Name):
        return node.id in known
    is_name = isinstance(node, ast.Attribute) and node.attr == "name"
    owner = node.value if is_name and isinstance(node, ast.Attribute) else None
    return (isinstance(owner, ast.Attribute) and owner.attr == "op") or (
        isinstance(owner, ast.Name) and owner.id == "op"
    )


def _called(node: ast.Name | ast.alias) -> bool:
    return (node.id if isinstance(node, ast.Name) else node.name) == "OpDef"


def _of_row(node: ast.expr) -> bool:
    """Whether `node` is ``entry.name``, which in modules about rows is one's name."""
    owner = node.value if isinstance(node, ast.Attribute) and node.attr == "name" else None
    return isinstance(owner, ast.Name) and owner.id == "entry"


def _literals(node: ast.expr) -> list[str]:
    """Return the strings that a literal, or a collection of literals, consists of."""
    if isinstance(node, ast.Call) and node.args and getattr(node.func, "id", "") in _COLLECTIONS:
        node = node.args[0]
    items = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    found = [i.value for i in items if isinstance(i, ast.Constant) and isinstance(i.value, str)]
    return found if len(found) == len(items) else []


_COLLECTIONS = ("frozenset", "set", "tuple")


def comparisons(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the comparisons in a module, and tests by ``startswith`` or ``endswith``."""
    nodes = list(ast.walk(tree))
    about_rows = any(isinstance(n, (ast.Name, ast.alias)) and _called(n) for n in nodes)
    bound = (n for n in nodes if isinstance(n, ast.Assign))
    known = {
        t.id
        for n in bound
        for t, v in _pairs(n)
        if isinstance(t, ast.Name) and _is_name_of_operation(v, set())
    }
    for node in nodes:
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(_is_name_of_operation(s, known) or (about_rows and _of_row(s)) for s in sides):
                yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            tests = node.func.attr in ("startswith", "endswith")
            if tests and _is_name_of_operation(node.func.value, known):
                yield node


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def collections(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a module that name two operations or more in one collection."""
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        names = _literals(value) if value is not None else []
        if len(names) > 1 and set(names) <= set(OPS):
            yield node


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _count(find: object) -> Counter[str]:
    found: Counter[str] = Counter()
    for folder in PACKAGES.values():
        for path in sorted(folder.rglob("*.py")):
            place = str(path.relative_to(ROOT))
            count = len(list(find(_parsed(path))))  # type: ignore[operator]
            found.update({place: count} if count else {})
    return found


def test_comparisons_of_operation_names_are_few_and_have_a_reason() -> None:
    assert _count(comparisons) == {place: count for place, (count, _) in REASONS.items()}
    assert sum(count for count, _ in REASONS.values()) <= LIMIT
    assert all(reason for _, reason in REASONS.values())


def test_no_set_of_operations_is_written_by_hand() -> None:
    assert _count(collections) == {}


def test_what_counts() -> None:
    """The counter sees comparisons in every form that they have had."""
    text = """from moecc.ir.ops import OpDef
name = node.op.name
a = node.op.name == "mul"
b = "mul" != step.node.op.name
c = node.op.name in ("add", "sub")
d = name not in SET
e = node.op.name.endswith("_norm")
f = entry.name == "split"
g = node.name == "mul"
SAME = frozenset(("add", "sub"))
OTHER = ("a", "b")
"""
    tree = ast.parse(text)
    assert [n.lineno for n in comparisons(tree)] == [3, 4, 5, 6, 7, 8]
    assert [n.lineno for n in collections(tree)] == [10]
