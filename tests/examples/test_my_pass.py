"""The property test of ``examples/my_pass.py``: what the test of your own pass could look like."""

from pathlib import Path

import pytest
from hypothesis import given, settings

from moecc.cli.main import main
from moecc.rewrite.pipeline import installed
from moecc.testing import graphs, laws
from moecc.testing.steps import SIMPLE

FILE = Path(__file__).parents[2] / "examples" / "my_pass.py"
MyPass = installed().with_file(FILE).get("my-pass")


def swish(g):
    """Append what the pass looks for: random operations alone would seldom make it."""
    x = g.find_float()
    if x is not None:
        other = g.find_within(x.type) if g.chance(20) else x
        g.emit("mul", *(x, g.emit("sigmoid", other)) if other else (x, x))


def twice(g):
    x = g.find_float()
    if x is not None:
        g.emit("relu", g.emit("relu", x))


STEPS = [*SIMPLE, swish, twice, swish, twice]


@settings(max_examples=60)
@given(graphs(steps=STEPS))
def test_it_keeps_its_promises(graph):
    laws.check_pass(MyPass(), graph)


@pytest.mark.parametrize(("options", "operation"), [("", "silu"), ("{exact}", "mul")])
def test_the_command_line_takes_it(tmp_path, capsys, options, operation):
    source = tmp_path / "g.moe"
    lines = ["%s = sigmoid %x : f32[a=4]", "%m = mul %x, %s : f32[a=4]", "output z = %m"]
    source.write_text(
        "moecc 1\ngraph g {\n  input %x : f32[a=4]\n  " + "\n  ".join(lines) + "\n}\n"
    )
    command = ["opt", str(source), "--load", str(FILE), "-p", f"my-pass{options}", "--check"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{operation} %x" in out
    assert ("sigmoid" in out) == (operation == "mul")
