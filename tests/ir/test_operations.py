"""The declarations of operations: methods that build them, and typed attributes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from moecc.ir import OPS, Builder, Graph, tensor
from moecc.ir.generate import STUB, render
from moecc.ir.operation import REQUIRED, OpDef
from moecc.ir.ops.slots import SlotsOp
from moecc.types import I32


def test_the_stub_is_current() -> None:
    assert STUB.read_text("utf-8") == render(), "run: make docs"


METHODS = {
    method.name: method.args
    for cls in ast.parse(STUB.read_text("utf-8")).body
    if isinstance(cls, ast.ClassDef)
    for method in cls.body
    if isinstance(method, ast.FunctionDef)
}


@pytest.mark.parametrize("entry", OPS.values(), ids=str)
def test_a_method_takes_what_its_row_says(entry: OpDef) -> None:
    arguments = METHODS[entry.name]
    assert len(arguments.posonlyargs) == 1 + len(entry.operands)
    assert (arguments.vararg is not None) == entry.variadic
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required = {argument.arg: default is None for argument, default in pairs}
    expected = {name: spec.default is REQUIRED for name, spec in entry.attrs.items()}
    assert required == {**expected, "name": False}


def test_a_common_class_reads_every_operation_with_the_trait() -> None:
    classes = {entry.name: entry.declared for entry in OPS.values()}
    assigning = {n for n, c in classes.items() if c is not None and issubclass(c, SlotsOp)}
    assert assigning == {entry.name for entry in OPS.values() if entry.assigns_slots}
    graph = Graph()
    chosen = graph.input("chosen", tensor(I32, seq=4, choice=2))
    slots = Builder(graph).node("assign_slots", chosen, tokens="seq", experts=4)
    assert SlotsOp.of_node(slots).tokens == ("seq",)
    assert SlotsOp.of_node(slots).groups == 1


SNIPPET = """
from moecc.ir import Builder, Node, Value
from moecc.ir.ops.contraction import ContractOp

def build(b: Builder, x: Value, w: Value, node: Node) -> Value:
    {}
    return b.contract(x, w, over="embed", name="y")
"""

WRONG = {
    'b.contract(x, w, over=("embed",))': None,
    "b.rope(x, axis='head_dim', size=8, scaling='yarn')": None,
    "over: tuple[str, ...] = ContractOp.of_node(node).over": None,
    "b.contrct(x, w, over='embed')": '"Builder" has no attribute "contrct"',
    "b.contract(x, w)": 'Missing named argument "over"',
    "b.contract(x, over='embed')": "Too few arguments",
    "b.contract(x, w, over=3)": 'Argument "over" to "contract"',
    "b.contract(x, w, over='embed', under='mlp')": 'Unexpected keyword argument "under"',
    "b.rope(x, axis='head_dim', size=8, scaling='yarm')": 'Argument "scaling" to "rope"',
    "y: Value = b.route(x, top_k=2)": "Incompatible types in assignment",
    "size: int = ContractOp.of_node(node).over": "Incompatible types in assignment",
    "ContractOp.of_node(node).ovr": 'has no attribute "ovr"',
    "ContractOp.of_node(node).over = ()": "Incompatible types in assignment",
}
"""Lines, and what a checker says of each; None: nothing."""


@pytest.mark.slow
def test_a_checker_finds_what_is_wrong(tmp_path: Path) -> None:
    files = [tmp_path / f"snippet_{number}.py" for number in range(len(WRONG))]
    for file, line in zip(files, WRONG, strict=True):
        file.write_text(SNIPPET.format(line))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *map(str, files)],
        cwd=STUB.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    for file, (line, expected) in zip(files, WRONG.items(), strict=True):
        texts = [text for text in done.stdout.splitlines() if f"{file.name}:" in text]
        errors = [text for text in texts if "error:" in text]
        assert len(errors) == (expected is not None), (line, done.stdout, done.stderr)
        assert expected is None or expected in errors[0], (line, errors)
