"""``reduce`` and ``bisect`` on planted bugs: in passes, a lowering, a weight rule, the writer."""

import re
import sys
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from moecc_passes import cleanup

from moecc.formats import writer
from moecc.ir import Graph, parse
from moecc.ir.operation import OPS
from moecc.jobs.reduce import Candidate, pass_cuts
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.support.user_files import _RUN
from moecc.weights import simplify as simplifier
from moecc.weights.arithmetic import Scale
from moecc.weights.expr import Source

from .conftest import UPCYCLE

MOST_NODES, MOST_SECONDS = 8, 60


def reduced(cli, *args):
    done = cli("reduce", *args)
    said = r"left are \d+ of [\d,]+ nodes and \d of \d passe?s?, in ([0-9.]+) s"
    seconds = re.search(said, done.err)[1]
    assert float(seconds) < MOST_SECONDS, done.err
    graph = parse(done.out)
    assert len(graph) <= MOST_NODES, done.err
    return graph


# --- in a pass that rewrites by rules


@pytest.fixture
def wrong_rule(monkeypatch):
    """Merge two scales by adding their factors."""

    def added(match, b):
        return b.scale(match.value("x"), by=match.attr("a") + match.attr("b"))

    rules = tuple(
        replace(rule, build=added) if rule.name == "scale-of-scale" else rule
        for rule in cleanup.RULES
    )
    monkeypatch.setattr(cleanup, "RULES", rules)


@pytest.fixture
def scaled(dense_graph):
    """The model with chains of scales, of which one pair does not merge to the same number."""

    def scale_twice(match):
        name, operation, type, layer = match.groups()
        factor, place = 0.25 if layer == "1" else 2.0, f": {type} @layers.{layer}.ffn"
        return (
            f"  %s{layer}a = {operation} {place}\n"
            f"  %s{layer}b = scale %s{layer}a {{by=2.0}} {place}\n"
            f"  {name} = scale %s{layer}b {{by={factor}}} {place}"
        )

    activation = r"(?m)^  (%\S+) = (silu %\S+) : (\S+\[.*?\]) @layers.(\d).*$"
    dense_graph.write_text(re.sub(activation, scale_twice, dense_graph.read_text()))
    return dense_graph


def test_a_wrong_rule_is_reduced_and_found(cli, scaled, wrong_rule):
    passes = ("-p", "cse,canonicalize,dce")
    graph = reduced(cli, scaled, *passes)
    assert [node.op.name for node in graph] == ["scale", "scale"]
    report = cli.json("bisect", scaled, *passes)
    assert report["step"] == "pass"
    assert report["pass"] == {"number": 2, "text": "canonicalize"}
    assert re.match(r"canonicalize/scale-of-scale at %.*\{by=0\.25\}", report["rewrite"]["text"])
    assert re.search(r"scale.*\{by=2\.25\}", report["value"]["where"])


# --- in the writer


def test_a_wrong_writer_is_reduced_and_found(cli, dense_graph, monkeypatch):
    """Square matrices are written transposed."""
    right = writer._bytes_of

    def wrong(values):
        square = values.ndim == 2 and values.shape[0] == values.shape[1]
        return right(values.T if square else values)

    monkeypatch.setattr(writer, "_bytes_of", wrong)
    passes = ("-p", UPCYCLE, "--compare", "weights")
    report = cli.json("bisect", dense_graph, *passes)
    assert report["step"] == "evaluator or writer"
    assert (report["pass"], report["rewrite"]) == (None, None)
    assert "%model.layers.0.self_attn.q_proj.weight" in report["value"]["where"]
    graph = reduced(cli, dense_graph, *passes)
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


def test_a_crash_of_an_own_pass_is_reduced_and_replayed(cli, dense_graph, tmp_path):
    own = tmp_path / "fragile.py"
    own.write_text(CRASH)
    small = tmp_path / "small.moe"
    command = ("reduce", dense_graph, "-p", "cse,fragile,dce", "--load", own, "-o", small)
    done = cli(*command, says=("crash: fragile: AttributeError", "1 of 3 passes"))
    assert done.err.count("AttributeError") == 1
    assert len(parse(small.read_text())) == 2
    says = f"{own}:15: the pass 1, fragile, crashed: AttributeError"
    cli("replay", small, "--load", own, code=1, says=says)
    cli("reduce", small, "--load", own)


WRONG = '''
from dataclasses import dataclass
from typing import ClassVar
from moecc.ir.operation import Op, operation
from moecc.rewrite import P, Rule, rewrite
from moecc.rewrite.passes import EXACT, Pass, PassResult

@operation("own", "x", elementwise=True)
class OwnOp(Op):
    """x."""
    def infer(self, x):
        return x.type
    def meaning(self, x):
        return x

SWAP = Rule("swap", P.op("own", P.any("x")), lambda m, b: b.softmax(m.value("x"), axis="none"))

@dataclass(frozen=True)
class WrongPass(Pass):
    """Build what no operation takes."""
    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "build a faulty node"
    preserves = EXACT
    def apply(self, graph, ctx):
        return PassResult.of(rewrite(graph, [SWAP], origin=self.name))
'''
OWN_GRAPH = """moecc 1
graph g {
  input %x : f32[batch=B, embed=8]
  %a = square %x : f32[batch=B, embed=8]
  %y = own %a : f32[batch=B, embed=8]
  output y = %y
}
"""


@patch.dict(OPS)
def test_what_an_own_rule_builds_wrongly_is_reduced_and_replayed(cli, tmp_path):
    own, graph, small = (tmp_path / name for name in ("wrong.py", "graph.moe", "small.moe"))
    own.write_text(WRONG)
    graph.write_text(OWN_GRAPH)
    says = f"{own}:16: wrong/swap at %y = own: the operand has no axis 'none'"
    cli("opt", graph, "-p", "wrong", "--load", own, code=1, says=says)
    cli("reduce", graph, "-p", "wrong", "--load", own, "-o", small, says=f"OwnPassError: {says}")
    assert f"\n# load: {own}\n" in small.read_text()
    del OPS["own"]
    _RUN.clear()
    cli("replay", small, code=1, says=f"if you trust their code: --load {own}")
    cli("replay", small, "--load", own, code=1, says=says)


def test_what_is_refused_is_not_reduced(cli, dense_graph):
    says = ("the input is refused", "no feed-forward block to convert in layer 7")
    cli("reduce", dense_graph, "-p", "upcycle{experts=4 layers=7},dce", code=1, says=says)


def test_what_does_not_fail_is_not_reduced(cli, dense_graph):
    cli("reduce", dense_graph, "-p", "canonicalize", code=1, says="nothing fails here")
    cli("bisect", dense_graph, "-p", "canonicalize", code=1, says="--compare run")
    cli("bisect", dense_graph, code=1, says="-p names the passes")
    cli("reduce", dense_graph, code=1, says="-p names the passes")
    succeeds = ("--test", f"{sys.executable} -c 0 {{}}")
    cli("reduce", dense_graph, *succeeds, code=1, says="an exit code other than 0")


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
def test_values_are_described_while_a_model_runs(cli, dense_graph, tmp_path, backend):
    out = tmp_path / "o.npy"
    command = ("run", dense_graph, "--outputs", out, "--backend", backend, "--force")
    value = "%up1 : f32[batch=B, seq=S, mlp=24] @layers.1.ffn: [2, 128, 24] mean"
    cli(*command, "--print-values", "layers.1.ffn", says=value)
    assert np.load(out).shape == (2, 128, 37)
    cli(*command, "--print-values", "nothing", code=2)


def test_a_wrong_weight_rule_is_reduced_and_found(cli, dense_graph, monkeypatch):
    """A scale by 2 is dropped."""

    def dropped(e):
        return e.x if e.factor in (1.0, 2.0) else None

    monkeypatch.setitem(simplifier.RULES, Scale, (dropped,))
    passes = ("-p", "upcycle{experts=4 top-k=4 granularity=2},dce", "--compare", "weights")
    report = cli.json("bisect", dense_graph, *passes)
    assert report["step"] == "simplifier"
    assert report["pass"] == {"number": 1, "text": "upcycle{experts=4 top-k=4 granularity=2}"}
    assert re.match(r"dropped at scale\(.*, 2\.0\)$", report["rewrite"]["text"])
    assert re.match(r"%model.layers.0.mlp.(up|down|gate)_proj.weight", report["value"]["where"])
    graph = reduced(cli, dense_graph, *passes)
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
def test_a_command_that_is_none_is_a_message(cli, dense_graph, test, says):
    cli("reduce", dense_graph, "--test", test, code=2, says=f"--test: {says}")


def test_graphs_are_printed_before_passes(cli, dense_graph):
    done = cli("opt", dense_graph, "-p", "canonicalize,dce", "--print-before", "dce")
    assert done.err.count("# before pass 2 dce") == 1
    assert parse(done.err)
    cli("opt", dense_graph, "-p", "dce", "--print-before", "cse", code=2)


def test_a_command_says_what_fails(cli, dense_graph, tmp_path):
    test = tmp_path / "test.sh"
    test.write_text('grep -q " = silu " "$1" && exit 7 || exit 0\n')
    done = cli("reduce", dense_graph, "--test", f"sh {test} {{}}")
    assert [node.op.name for node in parse(done.out)] == ["silu"]
