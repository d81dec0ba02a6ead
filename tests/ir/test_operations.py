"""The generated faces of the operation table: methods that build, and views of attributes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from moecc.ir import OPS, Builder, Graph, Node, attributes, tensor
from moecc.ir import generate as generator
from moecc.ir.attributes import ContractAttrs, Gates, ScaleAttrs, SlotAttrs
from moecc.ir.conventions import GATES
from moecc.ir.operation import REQUIRED, OpDef, View, register
from moecc.ir.operations import Operations
from moecc.ir.ops.rules import float_elementwise
from moecc.types import F32, I32

IR = Path(generator.__file__).parent


@pytest.mark.parametrize("name", generator.GENERATED)
def test_the_generated_modules_are_current(name: str) -> None:
    assert (IR / name).read_text("utf-8") == f"{generator.GENERATED[name]()}\n", "run: make docs"


@pytest.mark.parametrize("entry", OPS.values(), ids=str)
def test_a_method_takes_what_its_row_says(entry: OpDef) -> None:
    found = inspect.signature(getattr(Operations, entry.name)).parameters
    by_position = [p for p in found.values() if p.kind is p.POSITIONAL_ONLY]
    assert len(by_position) == 1 + len(entry.operands)
    assert any(p.kind is p.VAR_POSITIONAL for p in found.values()) == entry.variadic
    defaults = {n: p.default for n, p in found.items() if p.kind is p.KEYWORD_ONLY}
    assert defaults.pop("name") is None
    for name, spec in entry.attrs.items():
        default = defaults.pop(name)
        assert default == (inspect.Parameter.empty if spec.default is REQUIRED else spec.default)
    assert not defaults


@pytest.mark.parametrize("entry", [e for e in OPS.values() if e.attrs], ids=str)
def test_a_view_has_the_attributes_of_its_row(entry: OpDef) -> None:
    view = getattr(attributes, generator.class_name(entry.name))
    assert view.operations == {entry.name}
    assert list(inspect.get_annotations(view)) == list(entry.attrs)
    assert not set(entry.attrs) & set(dir(View)), "a name that the class itself needs"


def _scaled() -> tuple[Graph, Node]:
    graph = Graph()
    x = graph.input("x", tensor(F32, seq=4, embed=8))
    made = Builder(graph).scale(x, by=2.0, name="twice")
    assert made.name == "twice"
    assert made.node is not None
    return graph, made.node


def test_a_view_reads_the_attributes_of_its_operation_alone() -> None:
    _, node = _scaled()
    assert ScaleAttrs.of_node(node).by == 2.0
    with pytest.raises(TypeError, match="ContractAttrs views contract, not scale"):
        ContractAttrs.of_node(node)
    with pytest.raises(TypeError, match="for reading"):
        ScaleAttrs.of_node(node).by = 3.0  # type: ignore[misc]
    assert node.attrs == {"by": 2.0}


def test_a_common_view_reads_every_operation_with_the_trait() -> None:
    assert SlotAttrs.operations == {entry.name for entry in OPS.values() if entry.assigns_slots}
    graph = Graph()
    chosen = graph.input("chosen", tensor(I32, seq=4, choice=2))
    slots = Builder(graph).node(min(SlotAttrs.operations, key=len), chosen, tokens="seq", experts=4)
    assert SlotAttrs.of_node(slots).tokens == ("seq",)
    assert SlotAttrs.of_node(slots).groups == 1


def test_gates_are_the_conventions() -> None:
    assert get_args(Gates) == GATES


def test_an_operation_from_outside_is_a_method_when_it_runs() -> None:
    entry = register(OpDef("outsider", "x.", ("x",), float_elementwise, elementwise=True))
    try:
        graph, node = _scaled()
        made = getattr(Builder(graph), "outsider")(node.result, name="mine")  # noqa: B009
        assert (made.name, made.node.op) == ("mine", entry)
    finally:
        del OPS["outsider"]


SNIPPET = """
from moecc.ir import Builder, Node, Value
from moecc.ir.attributes import ContractAttrs

def build(b: Builder, x: Value, w: Value, node: Node) -> Value:
    {}
    return b.contract(x, w, over="embed", name="y")
"""

WRONG = {
    'b.contract(x, w, over=("embed",))': None,
    "b.rope(x, axis='head_dim', size=8, scaling='yarn')": None,
    "over: tuple[str, ...] = ContractAttrs.of_node(node).over": None,
    "b.contrct(x, w, over='embed')": '"Builder" has no attribute "contrct"',
    "b.contract(x, w)": 'Missing named argument "over"',
    "b.contract(x, over='embed')": "Too few arguments",
    "b.contract(x, w, over=3)": 'Argument "over" to "contract"',
    "b.contract(x, w, over='embed', under='mlp')": 'Unexpected keyword argument "under"',
    "b.rope(x, axis='head_dim', size=8, scaling='yarm')": 'Argument "scaling" to "rope"',
    "y: Value = b.route(x, top_k=2)": "Incompatible types in assignment",
    "size: int = ContractAttrs.of_node(node).over": "Incompatible types in assignment",
    "ContractAttrs.of_node(node).ovr": 'has no attribute "ovr"',
    "ContractAttrs.of_node(node).over = ()": "read-only",
}
"""Lines, and what a checker says of each; None: nothing."""


@pytest.mark.slow
def test_a_checker_finds_what_is_wrong(tmp_path: Path) -> None:
    files = [tmp_path / f"snippet_{number}.py" for number in range(len(WRONG))]
    for file, line in zip(files, WRONG, strict=True):
        file.write_text(SNIPPET.format(line))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *map(str, files)],
        cwd=IR.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    for file, (line, expected) in zip(files, WRONG.items(), strict=True):
        found = [text for text in done.stdout.splitlines() if f"{file.name}:" in text]
        errors = [text for text in found if "error:" in text]
        assert len(errors) == (expected is not None), (line, done.stdout, done.stderr)
        assert expected is None or expected in errors[0], (line, errors)
