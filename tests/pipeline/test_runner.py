"""Running pipelines: verification, passes that must match, promises, crashes."""

from __future__ import annotations

import inspect
import json

import pytest

from moecc.errors import CheckError, InputError
from moecc.ir import equal, parse
from moecc.rewrite.passes import EXACT, Context, PassCrash, Preserves, weakest
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import Instrument, run_pipeline

from .samples import REGISTRY, BadPass, negations


def run(graph, text, **more):
    return run_pipeline(graph, Pipeline.parse(text, REGISTRY), **more)


class Watching(Instrument):
    """Writes down what it is told."""

    def __init__(self):
        self.seen: list[str] = []

    def start(self, graph, pipeline):
        self.seen.append(f"start {pipeline} {len(graph)}")

    def after(self, run, graph):
        self.seen.append(f"{run.title} {len(graph)}")

    def finish(self, report):
        self.seen.append(f"finish {report.changed}")


def test_passes_run_in_order_and_instruments_watch():
    graph, watching = negations(3), Watching()
    report = run(graph, "un-neg,scale-output{by=2.0}", instruments=[watching])
    assert [n.op.name for n in graph] == ["silu", "neg", "scale"]
    assert watching.seen == [
        "start un-neg,scale-output{by=2.0} 4",
        "1 un-neg 2",
        "2 scale-output{by=2.0} 3",
        "finish True",
    ]
    assert report.changed
    assert report.runs[0].result.matched == 1


def test_a_pass_that_must_match_and_does_not_is_an_error_with_near_misses():
    with pytest.raises(InputError) as caught:
        run(negations(), "bad{way=miss}")
    text = str(caught.value)
    assert text.startswith("bad: matched nothing")
    # The nearest first, and not all of them.
    assert text.index("reason 6") < text.index("reason 5")
    assert "reason 1" not in text
    assert "and 2 more" in text
    assert "--allow-unmatched" in text
    with pytest.raises(InputError, match="found: no candidate"):
        run(negations(), "bad{way=nothing}")
    report = run(negations(), "bad{way=nothing}", context=Context(allow_unmatched=True))
    assert not report.changed


def test_a_pass_that_breaks_the_graph_is_named(monkeypatch):
    # All tests verify after each pass; here the runner shall be the one that does.
    monkeypatch.setattr(BadPass, "apply", inspect.unwrap(BadPass.apply))
    with pytest.raises(CheckError, match=r"after pass 2, bad: %v = silu @layers.0: the type") as e:
        run(negations(2), "un-neg,bad{way=break}")
    assert e.value.exit_code == 3


def test_what_a_pipeline_preserves():
    about = Preserves("approximate", "noise", 0.25)
    again = Preserves("approximate", "drops", 0.5)
    unknown = Preserves("approximate", "luck")
    sums = Preserves("reassociation", "sums")
    assert weakest([]) == EXACT
    assert weakest([EXACT, sums]) == sums
    together = Preserves("approximate", "noise; sums; drops", 0.75)
    assert weakest([about, EXACT, sums, again]) == together
    assert weakest([about, unknown]).predicted_error is None
    assert weakest([about, about]).reason == "noise"
    assert str(about) == "approximate: noise (predicted relative error 0.25)"
    assert str(EXACT) == "exact"


def test_the_report_as_json():
    data = json.loads(json.dumps(run(negations(5), "un-neg,top").as_dict()))
    assert data["changed"] is True
    exact = {"kind": "exact", "reason": "", "predicted_error": None, "up_to": ""}
    assert data["preserves"] == exact
    first, second = data["passes"]
    assert (first["pass"], first["matched"], first["statistics"]) == ("un-neg", 2, {"pair": 2})
    assert first["remarks"] == [{"where": "here", "text": "looked around"}]
    assert first["near_misses"][0]["rule"] == "pair"
    assert second["changed"] is False


def test_a_crash_leaves_a_reproducer(tmp_path):
    with pytest.raises(PassCrash) as caught:
        run(negations(), "un-neg,bad", crash_folder=lambda: tmp_path, context=Context(seed=5))
    assert caught.value.exit_code == 1, "the pass is not moecc's own"
    assert "the pass 2, bad, crashed: KeyError: 'layers.7'" in str(caught.value)
    path = tmp_path / "moecc-crash-1.moe"
    assert str(path) in str(caught.value)
    text = path.read_text("utf-8")
    assert equal(parse(text), negations())
    assert "# seed: 5\n" in text
    assert "# pipeline: un-neg,bad\n" in text
    assert "KeyError" in text
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(PassCrash, match=r"moecc-crash-2\.moe"):
        run(negations(), "bad", crash_folder=lambda: tmp_path)


def test_what_the_user_causes_is_not_a_crash(tmp_path):
    with pytest.raises(InputError, match="not with this graph"):
        run(negations(), "bad{way=refuse}", crash_folder=lambda: tmp_path)
    assert list(tmp_path.iterdir()) == []
