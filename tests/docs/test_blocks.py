"""What the pages show is true: graphs parse and verify, expressions have types, Python runs."""

import re
import runpy
import subprocess
import sys

import pytest

from moecc.ir import parse, print_graph, verify
from moecc.ir.operation import OPS
from moecc.plan.machines import find_machine
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.recipe_text import parse_recipe
from moecc.weights.text import parse_expr

from .pages import ROOT, blocks, blocks_of

_KEY = re.compile(r"key=0x[0-9a-f]+")
"""How keys are derived from seed and place is not what the page is about."""


@pytest.mark.parametrize("block", blocks("moe"), ids=str)
def test_graphs_parse_verify_and_print_as_they_stand(block):
    graph = parse(block.text, str(block))
    verify(graph)
    assert print_graph(graph) == block.text


@pytest.mark.parametrize("block", blocks("moe weights"), ids=str)
def test_weight_expressions_have_types_and_print_as_they_stand(block):
    for line in block.text.splitlines():
        text = line.split("  #")[0].rstrip()
        expr, end = parse_expr(text)
        assert end == len(text)
        assert str(expr) == text


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_recipes_are_valid(block):
    parse_recipe(block.text, str(block))


@pytest.mark.parametrize("block", blocks("toml machine"), ids=str)
def test_machines_are_valid(block, tmp_path):
    path = tmp_path / "ours.toml"
    path.write_text(block.text)
    assert find_machine(str(path)).devices


@pytest.mark.parametrize(
    "block",
    [
        *blocks("python"),
        # They train, draw many graphs or convert.
        *(pytest.param(block, marks=pytest.mark.slow) for block in blocks("python long")),
    ],
    ids=str,
)
def test_python_runs(block, tmp_path, monkeypatch):
    """With jax in this process, since to import it costs most; else in one of its own.

    Families and passes that a page registers stay there.
    """
    for name in ("tests", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = tmp_path / "block.py"
    script.write_text(block.text)
    if "jax" in block.text:
        monkeypatch.chdir(tmp_path)
        known = set(OPS)
        try:
            runpy.run_path(str(script), run_name="block")
        finally:
            for name in OPS.keys() - known:  # an operation from outside, of this page alone
                del OPS[name]
        return
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_sparse_block_is_the_dense_one_upcycled():
    shown_there = (b for b in blocks_of(ROOT / "docs" / "ir.md") if b.info == "moe")
    dense, sparse, *_ = (parse(b.text) for b in shown_there)
    run_pipeline(dense, Pipeline.parse("upcycle{experts=4}"))
    shown, made = (_KEY.sub("key=0x1", print_graph(g)) for g in (sparse, dense))
    assert shown == made
