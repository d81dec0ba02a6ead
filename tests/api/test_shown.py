"""What a prompt and a notebook show: a line for each object, a table or a text, no graph."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moecc
from moecc.support.text import brief, facts_table

DENSE = Path(__file__).parents[1] / "golden" / "llama_gqa"
LINE = 400


@pytest.fixture(scope="module")
def sparse() -> moecc.Model:
    return moecc.open(DENSE).upcycle(experts=4, top_k=2)


@pytest.fixture(scope="module")
def shown(sparse: moecc.Model) -> dict[str, object]:
    plan = moecc.open("preset:smollm2-135m").plan("h100x8", mesh="fsdp=8", batch_tokens=32768)
    return {
        "model": sparse, "graph": sparse.graph, "params": sparse.params(), "facts": sparse.facts,
        "step plan": plan, "conversion": sparse.prepare("mixtral", check=False),
        "verdict": sparse.verify(DENSE),
    }  # fmt: skip


WORDS = {
    "model": ("family llama", "4 experts, top-2"),
    "graph": ("nodes 100", "inputs tokens", "outputs logits"),
    "params": ("33", "17.6 K elements"),
    "facts": ("expert layers 3", "20.0 K per token"),
    "step plan": ("preset:smollm2-135m on gpu:h100:8", "mesh fsdp=8", "of 84.94 GB"),
    "conversion": ("as mixtral", "60 tensors", "vLLM ✓"),
    "verdict": ("passed", "at most 1e-05"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_line_at_a_prompt(shown: dict[str, object], name: str) -> None:
    line = repr(shown[name])
    assert line.startswith("<moecc.")
    assert "\n" not in line
    assert len(line) < LINE
    assert [word for word in WORDS[name] if word not in line] == []


@pytest.mark.parametrize("name", WORDS)
def test_a_table_or_a_text_in_a_notebook(shown: dict[str, object], name: str) -> None:
    text = getattr(shown[name], "_repr_html_")()  # noqa: B009
    assert text.startswith(("<table>", "<pre>"))
    assert len(text) < 30_000
    for tag in ("table", "tr", "th", "td", "pre"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>")


def test_a_long_graph_is_no_longer_line() -> None:
    graph = moecc.open("preset:mixtral-8x7b").graph
    assert len(graph) > 500
    assert len(repr(graph)) < LINE
    assert len(graph._repr_html_()) < 2000
    assert "contract × " in graph._repr_html_()


def test_a_plan_is_printed_whole_and_shown_in_a_line(shown: dict[str, object]) -> None:
    lines = str(shown["step plan"]).splitlines()
    assert any(line.startswith("  memory ") for line in lines)
    assert max(map(len, lines)) <= 100


def test_texts_are_escaped_and_empty_ones_left_out() -> None:
    rows = [("", "a"), ("b", "<script>"), ("c", "")]
    assert brief("moecc.X", rows) == "<moecc.X a, b <script>>"
    assert facts_table(rows).count("<tr>") == 2
    assert "&lt;script&gt;" in facts_table(rows)
