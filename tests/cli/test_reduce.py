"""``reduce`` and ``bisect`` on planted bugs: in passes, a lowering, a weight rule, the writer."""

import re
from dataclasses import replace

import moecc_passes.cleanup as canonicalize
import numpy as np
import pytest

from moecc.formats import writer
from moecc.ir import Graph, parse
from moecc.jobs.reduce import Candidate, pass_cuts
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.weights import simplify as simplifier
from moecc.weights.arithmetic import Scale
from moecc.weights.expr import Source

from .conftest import GOLDEN

MOST_NODES, MOST_SECONDS = 8, 60


@pytest.fixture
def model(moecc, tmp_path):
    """A dense model of three layers."""
    assert moecc("import", GOLDEN / "llama_gqa", "-o", tmp_path / "dense.moe").code == 0
    return tmp_path / "dense.moe"


def reduced(moecc, *args):
    done = moecc("reduce", *args)
    assert done.code == 0, done.err
    found = re.search(r"nodes became (\d+), .* in ([0-9.]+) s", done.err)
    assert float(found[2]) < MOST_SECONDS, done.err
    graph = parse(done.out)
    assert len(graph) <= MOST_NODES, done.err
    return graph


def bisected(moecc, *args):
    done = moecc("bisect", *args, "--format", "json")
    assert done.code == 0, done.err
    return done.json()


# --- in a pass that rewrites by rules


@pytest.fixture
def wrong_rule(monkeypatch):
    """Merge two scales by adding their factors."""

    def added(match, b):
        return b.scale(match.value("x"), by=match.attr("a") + match.attr("b"))

    rules = [
        replace(r, build=added) if r.name == "scale-of-scale" else r for r in canonicalize.RULES
    ]
    monkeypatch.setattr(canonicalize, "RULES", tuple(rules))


@pytest.fixture
def scaled(model):
    """The model with chains of scales, of which one pair does not merge to the same number."""
    text = model.read_text()
    lines, number = [], 0
    for line in text.splitlines():
        found = re.match(r"  (%\S+) = (silu %\S+) : (\S+\[.*?\]) @layers.(\d)", line)
        if found is None:
            lines.append(line)
            continue
        name, operation, type, layer = found.groups()
        a, b = (2.0, 2.0) if layer != "1" else (2.0, 0.25)
        place = f": {type} @layers.{layer}.ffn"
        lines += [
            f"  %s{number}a = {operation} {place}",
            f"  %s{number}b = scale %s{number}a {{by={a}}} {place}",
            f"  {name} = scale %s{number}b {{by={b}}} {place}",
        ]
        number += 1
    model.write_text("\n".join(lines) + "\n")
    return model


def test_a_wrong_rule_is_reduced_and_found(moecc, scaled, wrong_rule):
    passes = ("-p", "cse,canonicalize,dce")
    graph = reduced(moecc, scaled, *passes)
    assert [node.op.name for node in graph] == ["scale", "scale"]
    found = bisected(moecc, scaled, *passes)
    assert found["step"] == "pass"
    assert found["pass"] == {"number": 2, "text": "canonicalize"}
    assert found["rewrite"]["text"].startswith("canonicalize/scale-of-scale at %")
    assert "{by=0.25}" in found["rewrite"]["text"]
    assert "scale" in found["value"]["where"]
    assert "{by=2.25}" in found["value"]["where"]


# --- in the writer


def test_a_wrong_writer_is_reduced_and_found(moecc, model, monkeypatch):
    """Square matrices are written transposed."""
    right = writer._bytes_of

    def wrong(values):
        square = values.ndim == 2 and values.shape[0] == values.shape[1]
        return right(values.T if square else values)

    monkeypatch.setattr(writer, "_bytes_of", wrong)
    passes = ("-p", "upcycle{experts=4 top-k=2}", "--compare", "weights")
    found = bisected(moecc, model, *passes)
    assert (found["step"], found["pass"], found["rewrite"]) == ("evaluator or writer", None, None)
    assert "%model.layers.0.self_attn.q_proj.weight" in found["value"]["where"]
    graph = reduced(moecc, model, *passes)
    assert len(graph) == 0
    (value,) = graph.params.values()
    assert isinstance(value.weight, Source)


# --- other ways to fail


CRASH = '''
from dataclasses import dataclass
from typing import ClassVar
from moecc.rewrite.passes import EXACT, Pass, PassResult

@dataclass(frozen=True)
class FragilePass(Pass):
    """Crash at the second norm."""
    name: ClassVar[str] = "fragile"
    summary: ClassVar[str] = "crash"
    preserves = EXACT
    def apply(self, graph, ctx):
        norms = [n for n in graph if n.op.is_norm]
        if len(norms) > 1:
            norms[1].gone
        return PassResult(changed=False)
'''


def test_a_crash_of_an_own_pass_is_reduced_and_replayed(moecc, model, tmp_path):
    own = tmp_path / "fragile.py"
    own.write_text(CRASH)
    small = tmp_path / "small.moe"
    done = moecc("reduce", model, "-p", "cse,fragile,dce", "--load", own, "-o", small)
    assert done.code == 0, done.err
    assert "crash: fragile: AttributeError" in done.err
    assert done.err.count("AttributeError") == 1
    assert "3 passes 1" in done.err
    assert len(parse(small.read_text())) == 2
    again = moecc("replay", small, "--load", own)
    assert again.code == 1
    assert f"{own}:15: the pass 1, fragile, crashed: AttributeError" in again.err
    done = moecc("reduce", small, "--load", own)
    assert done.code == 0, done.err


def test_what_does_not_fail_is_not_reduced(moecc, model):
    done = moecc("reduce", model, "-p", "canonicalize")
    assert done.code == 1
    assert "nothing fails here" in done.err
    done = moecc("bisect", model, "-p", "canonicalize")
    assert done.code == 1


# --- looking inside


def test_options_that_are_required_are_not_cut():
    shard = "annotate-sharding{mesh=data:2 rules=data-parallel}"
    whole = Candidate(Graph("empty"), Pipeline.parse(f"upcycle{{experts=4}},{shard}"))
    # The first two apply passes, which an empty graph is not for.
    texts = [str(cut().pipeline) for cut in list(pass_cuts(whole, Context()))[2:]]
    assert len(texts) > 2
    assert all(
        text in shard or text.endswith(shard) or text == "upcycle{experts=4}" for text in texts
    )


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_values_are_described_while_a_model_runs(moecc, model, tmp_path, backend):
    out = tmp_path / "o.npy"
    done = moecc("run", model, "--outputs", out, "--backend", backend,
                 "--print-values", "layers.1.ffn")  # fmt: skip
    assert done.code == 0, done.err
    assert re.search(r"%up1 : f32\[batch=B, seq=S, mlp=24\] @layers.1.ffn: \[2, 128, 24\] mean",
                     done.err)  # fmt: skip
    assert np.load(out).shape == (2, 128, 37)
    assert moecc("run", model, "--outputs", out, "--force", "--print-values", "nothing").code == 2


def test_a_wrong_weight_rule_is_reduced_and_found(moecc, model, monkeypatch):
    """A scale by 2 is dropped."""

    def dropped(e):
        return e.x if e.factor in (1.0, 2.0) else None

    monkeypatch.setitem(simplifier.RULES, Scale, (dropped,))
    passes = ("-p", "upcycle{experts=4 top-k=4 granularity=2},dce", "--compare", "weights")
    found = bisected(moecc, model, *passes)
    assert found["step"] == "simplifier"
    assert found["pass"] == {"number": 1, "text": "upcycle{experts=4 top-k=4 granularity=2}"}
    assert re.match(r"dropped at scale\(.*, 2\.0\)$", found["rewrite"]["text"])
    assert re.match(r"%model.layers.0.mlp.(up|down|gate)_proj.weight", found["value"]["where"])
    graph = reduced(moecc, model, *passes)
    assert len(graph) == 0
    (value,) = graph.params.values()
    assert isinstance(value.weight, Scale)
    assert isinstance(value.weight.x, Source)


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ("sh -c '{}", "the command cannot be run"),
        ("/nothing/there {}", "the command cannot be run"),
        ("grep -q relu", "the command reads neither graph nor pipeline"),
    ],
)
def test_a_command_that_is_none_is_a_message(moecc, model, test, says):
    done = moecc("reduce", model, "--test", test)
    assert done.code == 2, done.err
    assert f"--test: {says}" in done.err


def test_graphs_are_printed_before_passes(moecc, model):
    done = moecc("opt", model, "-p", "canonicalize,dce", "--print-before", "dce")
    assert done.err.count("# before pass 2 dce") == 1
    assert parse(done.err)
    assert moecc("opt", model, "-p", "dce", "--print-before", "cse").code == 2


def test_a_command_says_what_fails(moecc, model, tmp_path):
    test = tmp_path / "test.sh"
    test.write_text('grep -q " = silu " "$1" && exit 7 || exit 0\n')
    done = moecc("reduce", model, "--test", f"sh {test} {{}}")
    assert done.code == 0, done.err
    assert [node.op.name for node in parse(done.out)] == ["silu"]
