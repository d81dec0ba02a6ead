"""No string that reaches a page becomes markup, an attribute or a program of it."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moecc
from moecc.jobs.opt import graph_page
from moecc.jobs.receipt import receipt_page
from moecc.jobs.report import report_page
from moecc.plan.sweeps import plan_page, sweep_page
from moecc.support.page import render
from moecc.support.text import facts_table
from moecc.train.run import RunSeries
from tests.support.pages import Parsed, script_hash
from tests.support.tiers import examples

ROOT = Path(__file__).parents[2]
DENSE = ROOT / "tests" / "golden" / "llama_gqa"
MIXTURE = "preset:smollm2-135m"

PIECES = (
    "<script>alert(1)</script>", "</script>", "<!--", "-->", "]]>", "<img src=x onerror=alert(1)>",
    "</title>", "</style>", "</textarea>", "</code></td></tr></table>", '"', "'", "`", "=", "&lt;",
    "&#60;b&#62;", "<a href='javascript:alert(1)'>", "<b>", "<", ">", "&", "{{ 7 * 7 }}",
    "{% raw %}", "{#", "%{x}", "$x$", "\\", "\u2028", "\ud800", "\0", "\r\n", "\\u003c",
    "\" onload=\"alert(1)", "' onload='alert(1)",
)  # fmt: skip
HOSTILE = st.lists(
    st.sampled_from(PIECES) | st.text(min_size=1, max_size=5), min_size=1, max_size=4
).map("".join)


def replaced(value, suffix, *, keys=()):
    """Return JSON values with a suffix on every string, and on the keys of tables named `keys`."""
    if isinstance(value, str):
        return suffix(value)
    if isinstance(value, list | tuple):
        return [replaced(item, suffix, keys=keys) for item in value]
    if isinstance(value, dict):
        return {
            name: {suffix(k): replaced(v, suffix, keys=keys) for k, v in item.items()}
            if name in keys
            else replaced(item, suffix, keys=keys)
            for name, item in value.items()
        }
    return value


@pytest.fixture(scope="module", autouse=True)
def short_plotly():
    """Leave the 4 MB of plotly.js out of the pages, which would be most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moecc.support.page._plotly", lambda: "const Plotly = {};")
        yield


RECEIPT = {
    "promised": {"kind": "approximate", "reason": "a reason", "predicted_error": 1e-3},
    "checked": [
        {"pass": "upcycle", "promised": {"kind": "exact", "reason": "why"}, "measured_error": 1e-7}
    ],
    "verified": {
        "output": "logits", "compute_dtype": "f32", "tolerance": 1e-5, "layers": 2,
        "difference": {"max_relative": 1e-7, "kl_nats": 1e-9, "top1_agreement": 1.0},
    },
    "engines": [
        {"engine": "vLLM", "version": "1", "runs": True, "note": "a note"},
        {"engine": "mlx-lm", "version": "1", "runs": False, "reasons": ["one", "two"]},
    ],
    "versions": {"moecc": "0.1", "numpy": "2"},
}  # fmt: skip


@cache
def plans():
    model = moecc.open(MIXTURE)
    step = {"batch_tokens": 4096, "sequence": 512}
    plan = model.upcycle(experts=4, top_k=2).plan("cpu:4", **step)
    sweep = model.upcycle(experts=2, top_k=2).sweep("cpu:2", experts=[2, 4], top_k=[2, 3], **step)
    return plan.report, sweep.report


def plan_of(suffix):
    report = plans()[0]
    hostile = replaced(report, suffix, keys={"mesh", "collectives"})
    return plan_page(hostile, [hostile["best"], *hostile["others"]], suffix("pipeline"))


def sweep_of(suffix):
    report = plans()[1]
    return sweep_page(replaced(report, suffix, keys={"mesh"}), suffix("pipeline"))


def runs_of(suffix):
    layer, text = suffix("layers.1.ffn"), suffix("held")
    lines = [
        {"step": s, "tokens": 8 * s, "loss": 1.0, f"metric.{layer}.loads": [1.0, 0.0],
         f"metric.{layer}.entropy": 1.0}
        for s in range(1, 200)
    ]  # fmt: skip
    lines.append({"step": 199, "held_out": {text: 2.0}, "spread": {layer: [1.0, 2.0]}})
    run = RunSeries(suffix("run"), tuple(lines), {suffix("recipe"): suffix("value")})
    tokens = {"share": 0.5, "tokens": [{"token": suffix("token"), "part": 0.5}]}
    specialised = {
        "layer": layer, "explained": 0.5, "untrained": 0.5, "by_chance": 0.5,
        "sentinel_entropy": None, "other_entropy": 1.0, "experts": [tokens],
    }  # fmt: skip
    return report_page([run], {suffix("run"): [specialised]})


@cache
def opened():
    graph = moecc.open(DENSE).upcycle(experts=4, top_k=2).graph
    return graph, [(node.loc, node.origin or "") for node in graph.every_node()]


def graph_of(suffix):
    graph, places = opened()
    graph.name = suffix("graph")
    for node, (loc, origin) in zip(graph.every_node(), places, strict=True):
        node.loc, node.origin = suffix(loc), suffix(origin)
    return graph_page(graph, graph, suffix("pipeline"), [suffix("remark")])


def same_tree(page, hostile):
    """Check that hostile strings leave the elements, attributes and programs of a page alone."""
    # As long, since boxes are as wide as their texts, and with dots and numbers, which part paths.
    harmless = re.sub(r"[^.\d]", "x", hostile)
    benign = Parsed(page(lambda text: f"{text}{harmless}"))
    parsed = Parsed(page(lambda text: f"{text}{hostile}"))
    assert parsed.elements == benign.elements
    assert parsed.scripts == benign.scripts
    assert len(parsed.figures) == len(benign.figures)
    strings = re.findall(r"[<>]", json.dumps(parsed.figures))
    assert strings == [], "plotly would read it as its own markup"
    allowed = [*map(script_hash, parsed.scripts)] or ["'none'"]
    assert parsed.policy["script-src"] == allowed
    assert parsed.policy["default-src"] == ["'none'"]


@settings(max_examples=examples(20, 1000), deadline=None)
@given(hostile=HOSTILE)
def test_a_receipt(hostile):
    same_tree(
        lambda suffix: receipt_page(suffix("name"), replaced(RECEIPT, suffix, keys={"versions"})),
        hostile,
    )
    unchecked = {**RECEIPT, "checked": [], "unchecked": "none", "verified": None}
    same_tree(lambda suffix: receipt_page("name", replaced(unchecked, suffix)), hostile)


@settings(max_examples=examples(3, 200), deadline=None)
@given(hostile=HOSTILE)
@pytest.mark.parametrize("page", [plan_of, sweep_of, runs_of], ids=["plan", "sweep", "runs"])
def test_a_page_with_figures(page, hostile):
    pytest.importorskip("plotly")
    same_tree(page, hostile)


@settings(max_examples=examples(3, 200), deadline=None)
@given(hostile=HOSTILE)
def test_a_graph(hostile):
    same_tree(graph_of, hostile)


@given(name=HOSTILE, text=HOSTILE)
def test_what_a_notebook_shows(name, text):
    cells = Parsed(facts_table([(name, text)]))
    assert cells.elements == Parsed(facts_table([("a", "b")])).elements
    assert Parsed(render("text.html", text=text)).elements == [("pre", ()), ("/pre", ())]


def test_a_value_that_a_template_lacks_is_an_error():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        render("text.html")
