"""What the docstrings of passes show is true."""

import inspect
import re

import pytest

from moecc.ir import equal, parse
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import installed


def graph_text(lines):
    """Return a graph of the lines that a docstring shows, its loose ends declared."""
    defined = re.findall(r"^(?:param )?(%\w+)", lines, re.M)
    used = re.findall(r"%\w+", re.sub(r"(?m)^(?:param )?%\w+ [:=]", "", lines))
    inputs = [f"input {v} : f32[batch=B, embed=4]" for v in dict.fromkeys(used) if v not in defined]
    outputs = [] if "output" in lines else [f"output y = {defined[-1]}"]
    return "\n".join(["moecc 1", "graph model {", *inputs, lines, *outputs, "}"])


@pytest.mark.parametrize("name", ["canonicalize", "cse", "dce"])
def test_before_and_after_are_true(name):
    cls = installed().get(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    before, after = re.findall(r"(?:Before|After)::\n\n((?:    .*\n?)+)", text)
    graph = parse(graph_text(inspect.cleandoc(before)))
    expected = parse(graph_text(inspect.cleandoc(after)))
    cls().apply(graph, Context())
    assert equal(graph, expected)
