"""Operations of the user's own have the traits that they declare, or a counterexample is shown."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import moecc_check
import numpy as np
import pytest

from moecc.errors import InputError
from moecc.ir import OPS
from moecc.ir.arrays import Array, together
from moecc.ir.operation import Op, operation
from moecc.ir.ops.rules import by_name, float_elementwise
from moecc.ir.text import parse, print_graph
from moecc.ir.traits import CollectiveKind, powers
from moecc.prove import Prover
from moecc.prove.log import digest, write_proof
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing import laws
from moecc.testing.traits import false_traits
from moecc.types import BF16
from tests.ir.operations import applied


class UnaryOp(Op):
    """An operation of one operand, whose type the result has."""

    def infer(self, x):
        return float_elementwise((x,), self.attrs)


NOT_SAMPLED = {name for name, row in OPS.items() if row.opaque or row.collective or row.has_body}


@pytest.mark.parametrize("name", sorted(OPS.keys() - NOT_SAMPLED))
def test_every_row_of_the_table_has_the_traits_that_it_declares(name):
    assert false_traits(applied(OPS[name])) == []


TYPE = "f32[batch=2, embed=4]"
FALSE = {
    "elementwise": ("softmax", {"axis": "embed"}, {"elementwise": True}),
    "mixes": ("softmax", {"axis": "embed"}, {"mixes": lambda operands, attrs: ()}),
    "linear": ("square", {}, {"linear": (0,)}),
    "homogeneous": ("square", {}, {"homogeneous": powers(1.0)}),
    "normalises": ("silu", {}, {"normalises": True}),
    "alias": ("softmax", {"axis": "embed"}, {"alias": True}),
    "blocks_gradient": ("neg", {}, {"blocks_gradient": True}),
    "commutative": ("sub", {}, {"commutative": True}),
    "jointly": ("mul", {}, {"jointly": True}),
    "function": ("neg", {}, {"meaning": lambda arrays, attrs: _doubled(arrays[0])}),
}  # fmt: skip


def _doubled(x):
    x.data[...] *= 2
    return x


@pytest.mark.parametrize("trait", FALSE)
def test_a_false_trait_is_refuted_with_a_counterexample(trait):
    name, attrs, columns = FALSE[trait]
    with patch.dict(OPS, {name: replace(OPS[name], **columns)}):
        operands = [TYPE] * len(OPS[name].operands)
        word = {"mixes": "mixes an axis that", "function": "no function", "jointly": "linear"}
        law = rf"{word.get(trait, f'declares {trait}, which')}(.|\n)*found: .* at batch=\d"
        with pytest.raises(AssertionError, match=law):
            laws.check_operation(name, *operands, **attrs)
    laws.check_operation(name, *operands, **attrs)


def _clipped(limit):
    return lambda arrays, attrs: arrays[0].map(lambda data: np.clip(data, -limit, limit))


def _of_axes(count):
    return lambda arrays, attrs: arrays[0].map(lambda data: data * count(arrays[0].axes))


def _sum_if_alike(x, y):
    axes, (a, b) = together(x, y)
    return Array(a + b if x.axes == y.axes else a - b, axes)


def _of_width(x):
    return x.map(lambda data: data / np.sqrt(data.shape[-1]))


def _summed_if_long(x):
    return x.map(lambda data: np.cumsum(data, -1) if data.shape[-1] > 16 else data)


def _sum_if_small(x, y):
    axes, (a, b) = together(x, y)
    return Array(np.where(np.abs(a) > 6, a, a + b), axes)


HIDDEN = {
    "width": ("neg", {"meaning": lambda arrays, attrs: _of_width(arrays[0])}, "elementwise"),
    "length": ("neg", {"meaning": lambda arrays, attrs: _summed_if_long(arrays[0])}, "elementwise"),
    "names": ("neg", {"meaning": _of_axes(lambda axes: 1 + ("embed" in axes))}, "elementwise"),
    "number of axes": ("neg", {"meaning": _of_axes(len)}, "elementwise"),
    "linear": ("neg", {"meaning": _clipped(100), "alias": False}, "linear"),
    "blocks_gradient": ("stop_gradient", {"meaning": _clipped(8)}, "blocks_gradient"),
    "homogeneous": ("relu", {"meaning": _clipped(20)}, "homogeneous"),
    "commutative": ("add", {"meaning": lambda arrays, attrs: _sum_if_small(*arrays)},
                    "commutative"),
}  # fmt: skip
"""Meanings with a trait at a few places, for some axes and near 1 alone."""


@pytest.mark.parametrize("case", HIDDEN)
def test_a_trait_is_sampled_at_further_sizes_magnitudes_and_axes(case):
    name, columns, trait = HIDDEN[case]
    row, law = replace(OPS[name], **columns), f"{name} declares {trait}, which its meaning"
    with patch.dict(OPS, {name: row}), pytest.raises(AssertionError, match=law):
        laws.check_operation(name, *[TYPE] * len(row.operands))


def test_an_operand_that_lacks_axes_is_sampled_with_them():
    columns = {"meaning": lambda arrays, attrs: _sum_if_alike(*arrays), "commutative": False}
    with patch.dict(OPS, {"add": replace(OPS["add"], **columns)}):
        laws.check_operation("add", TYPE, TYPE)
        with pytest.raises(AssertionError, match=r"(?s)elementwise.*axes that they lack"):
            laws.check_operation("add", TYPE, "f32[embed=4]")


def test_the_sizes_that_are_given_are_sampled():
    columns = {"meaning": lambda arrays, attrs: _odd_if_wide(arrays[0])}
    with patch.dict(OPS, {"neg": replace(OPS["neg"], **columns)}):
        laws.check_operation("neg", "f32[batch=2, embed=4]")
        with pytest.raises(AssertionError, match="neg declares elementwise"):
            laws.check_operation("neg", "f32[batch=2, embed=512]")


def _odd_if_wide(x):
    return x.map(lambda data: data[..., ::-1] if data.shape[-1] > 256 else -data)


def lerp(**traits):
    """Declare an operation that is linear in both operands together, and no more."""

    @operation("lerp", "x y", elementwise=True, sharding=by_name, **traits)
    class LerpOp(Op):
        """x + (y − x) / 4."""

        def infer(self, x, y):
            return float_elementwise((x, y), self.attrs)

        def meaning(self, x, y):
            axes, (a, b) = together(x, y)
            return Array(a + (b - a) / 4, axes)


def test_of_an_operation_that_declares_nothing_nothing_is_assumed(table):
    @operation("own", "x")
    class OwnOp(Op):
        """x."""

        def infer(self, x):
            return x.type

    node = parse(WHOLE).outputs["y"].node
    assert node.mixes == ("batch", "embed")
    assert node.op.source.startswith(__file__)


WHOLE = """moecc 1
graph g {
  input %x : f32[batch=B, embed=8]
  %y = own %x : f32[batch=B, embed=8]
  output y = %y
}
"""
GRAPH = """moecc 1
graph g {
  input %x : f32[batch=B, embed=8]
  input %z : f32[batch=B, embed=8]
  %y = lerp %OPERANDS : f32[batch=B, embed=8]
  output y = %y
}
"""


@pytest.fixture
def table():
    with patch.dict(OPS):
        yield


def test_the_prover_believes_a_trait_that_holds_and_says_so(table):
    lerp(linear=(0, 1), jointly=True)
    here, there = (parse(GRAPH.replace("OPERANDS", pair)) for pair in ("x, %z", "z, %x"))
    verdict = Prover().prove(here, here)
    believed = f"lerp ({Path(__file__).name}) is a function of its operands, element by element"
    assert verdict.assumptions[-1] == f"{believed} at any size, and shards compute shards"
    assert Prover().prove(here, there).status == "refuted"


UNARY = """moecc 1
graph g {
  input %x : bf16[batch=B, embed=4]
  %w = FIRST : TYPE[batch=B, embed=4]
  %y = SECOND : f32[batch=B, embed=4]
  output y = %y
}
"""


def test_no_term_of_ones_own_is_believed_and_no_other_element_type(table):
    @operation("own", "x", elementwise=True, sharding=by_name)
    class OwnOp(UnaryOp):
        """max(x, a lowest number of its type) + 1, with a false term: x."""

        def meaning(self, x):
            lowest = {"bf16": -0.1, "f32": -0.01}[x.dtype.name]
            return x.map(lambda data: np.maximum(data, lowest) + 1)

        def term(self, algebra, x):
            return x

    wide, narrow, plain = (
        parse(UNARY.replace("FIRST", first).replace("SECOND", second).replace("TYPE", type))
        for first, type, second in (
            ("cast %x {dtype=f32}", "f32", "own %w"),
            ("own %x", "bf16", "cast %w {dtype=f32}"),
            ("cast %x {dtype=f32}", "f32", "stop_gradient %w"),
        )
    )
    assert Prover().prove(wide, wide)
    assert Prover().prove(wide, narrow).status == Prover().prove(wide, plain).status == "refuted"


def test_the_checker_knows_which_operands_may_be_exchanged(table):
    @operation("lerp", "x y", commutative=True)
    class LerpOp(Op):
        """The sum of both, added up along the last axis."""

        def infer(self, x, y):
            return float_elementwise((x, y), self.attrs)

        def meaning(self, x, y):
            axes, (a, b) = together(x, y)
            return Array(np.cumsum(a + b, -1), axes)

    here, there = (parse(GRAPH.replace("OPERANDS", pair)) for pair in ("x, %z", "z, %x"))
    verdict = Prover().prove(here, there)
    assert verdict
    moecc_check.accepted(verdict.log, print_graph(here), print_graph(there))


BLOCK = """moecc 1
graph g {
  input %x : f32[batch=B, embed=4]
  param %up : f32[mlp=8, embed=4] = source("up" : f32[mlp=8, embed=4])
  param %down : f32[mlp=8, embed=4] = source("down" : f32[mlp=8, embed=4])
  %a = contract %x, %up {over=embed} : f32[batch=B, mlp=8] @layers.0.ffn
  %s = share %a : f32[batch=B, mlp=8] @layers.0.ffn
  %y = contract %s, %down {over=mlp} : f32[batch=B, embed=4] @layers.0.ffn
  output y = %y
}
"""


def test_a_proof_with_an_operation_of_ones_own_has_a_log(table, tmp_path):
    # It has the name of a head of moecc's lemmas, and is none.
    @operation("share", "x", elementwise=True, sharding=by_name)
    class ShareOp(UnaryOp):
        """x³."""

        def meaning(self, x):
            return x.map(lambda data: data**3)

    before, after = parse(BLOCK), parse(BLOCK)
    run_pipeline(after, Pipeline.parse("upcycle{experts=4}"))
    verdict = Prover().prove(before, after)
    write_proof(verdict.log, before, after, tmp_path / "proof.json")
    assert verdict.log["elementwise"] == ["share"]
    texts = print_graph(before), print_graph(after)
    log = json.loads((tmp_path / "proof.json").read_text())
    for stated in ([], ["contract", "share"], ["relu", "share"]):
        with pytest.raises(moecc_check.Rejected):
            moecc_check.accepted(log | {"elementwise": stated}, *texts)


PAIR = """moecc 1
graph g {
  attr mesh = {"model": 2}
  input %x : f32[batch=B, embedMESH=8]
  %a, %b = pair %x : f32[batch=B, embedMESH=8], f32[batch=B, embedMESH=8]
  %y = LAST : f32[batch=B, embedMESH=8]
  output y = %y
}
"""


@pytest.mark.parametrize("mesh", ["", "@model"])
def test_the_results_of_an_operation_element_by_element_are_functions_each(table, mesh):
    @operation("pair", "x", elementwise=True, sharding=by_name)
    class PairOp(Op):
        """x² and x³."""

        def infer(self, x):
            return (float_elementwise((x,), self.attrs),) * 2

        def meaning(self, x):
            return x.map(np.square), x.map(lambda data: data**3)

    first, same, other = (
        parse(PAIR.replace("MESH", mesh).replace("LAST", last))
        for last in ("sub %a, %b", "sub %a, %b", "sub %b, %a")
    )
    verdict = Prover().prove(first, same)
    moecc_check.accepted(verdict.log, print_graph(first), print_graph(same))
    assert Prover().prove(first, other).status == "refuted"
    log = verdict.log | {"after": digest(other)}
    with pytest.raises(moecc_check.Rejected):
        moecc_check.accepted(log, print_graph(first), print_graph(other))


OF_A_PART = """moecc 1
graph g {
  input %x : f32[batch=B, embed=8]
  FIRST
  SECOND
  %y = cast %b {dtype=f32} : f32[batch=B, embed=4]
  output y = %y
}
"""


def test_results_of_another_type_are_another_function(table):
    @operation("narrow", "x", elementwise=True)
    class NarrowOp(Op):
        """x, of a type that depends on its size."""

        def infer(self, x):
            return x.type.with_dtype(BF16) if x.type["embed"].size == 4 else x.type

        def meaning(self, x):
            return x

    cut = "slice %{} {{axis=embed, start=0, stop=4}} : f32[batch=B, embed=4]"
    before, after = (
        parse(OF_A_PART.replace("FIRST", f"%a = {a}").replace("SECOND", f"%b = {b}"))
        for a, b in (
            (cut.format("x"), "narrow %a : bf16[batch=B, embed=4]"),
            ("narrow %x : f32[batch=B, embed=8]", cut.format("a")),
        )
    )
    assert Prover().prove(before, after, refute=False).status == "unknown"


@pytest.mark.parametrize("number", [0, 1])
def test_results_of_other_axes_are_not_element_by_element(table, number):
    # Without a meaning there is nothing to sample.
    @operation("pair", "x", elementwise=True)
    class PairOp(Op):
        """Two results, one of them without the last axis."""

        def infer(self, x):
            types = x.type, x.type.with_axes(x.type.axes[:-1])
            return types[::-1] if number else types

    with pytest.raises(InputError, match=r"elementwise, which its type rule(.|\n)*embed=8"):
        parse(PAIR.replace("MESH", "").replace("LAST", "sub %a, %b"))


ON_MESH = """moecc 1
graph g {
  attr mesh = {"model": 2}
  input %x : f32[batch=B, embed@model=8]
  %y = share %x : f32[batch=B, embed@model=8]
  output y = %y
}
"""


def test_devices_are_sampled_where_a_meaning_depends_on_sizes(table):
    @operation("share", "x", elementwise=True, sharding=by_name)
    class ShareOp(UnaryOp):
        """x, but of four elements along embed, which no trait is sampled at, twice x."""

        def meaning(self, x):
            return x.map(lambda data: data * (1 + (x.size("embed") == 4)))

    graph = parse(ON_MESH)
    assert Prover().prove(graph, graph).status == "refuted"
    whole = parse(ON_MESH.replace("@model", ""))
    assert Prover().prove(whole, whole)


DECLARATIONS = {
    "trait": ({"linaer": (0,)}, Op, "no trait 'linaer'; did you mean 'linear'?"),
    "position": ({"linear": 0}, Op, r"positions of operands, \(0,\) of the first: 0"),
    "range": ({"linear": (1,)}, Op, r"of the first: \(1,\)"),
    "class": ({}, object, "is no subclass of Op"),
    "infer": ({}, None, r"no type rule: def infer\(self"),
    "operands": ({"operands": ["x"]}, Op, "no text such as 'x y'"),
    "collective": ({"collective": CollectiveKind.ANY}, Op, "own operations alone: leave out coll"),
    "slots": (
        {"assigns_slots": True},
        Op,
        "of moecc's own operations alone: leave out assigns_slots",
    ),
    "mixes": ({"elementwise": True, "mixes": None}, Op, "elementwise, but has mixes"),
    "no operands": ({"operands": "", "elementwise": True}, Op, "elementwise, but has no operands"),
}


@pytest.mark.parametrize("case", DECLARATIONS)
def test_a_faulty_declaration_is_refused(table, case):
    traits, base, words = DECLARATIONS[case]
    members = {} if base is None else {"infer": lambda self, x: x.type}
    with pytest.raises(TypeError, match=words):
        operation("own", **{"operands": "x"} | traits)(type("OwnOp", (base or Op,), members))


def test_one_mixed_axis_needs_no_comma(table):
    @operation("own", "x")
    class OwnOp(Op):
        """x."""

        def infer(self, x):
            return x.type

        def mixes(self, x):
            return "embed"

    assert parse(WHOLE).outputs["y"].node.mixes == ("embed",)


LOADED = '''
from moecc.ir.arrays import Array, together
from moecc.ir.operation import Op, operation
from moecc.ir.ops.rules import by_name, float_elementwise

@operation("lerp", "x y", elementwise=True, commutative=True, sharding=by_name)
class LerpOp(Op):
    """x + (y - x) / 4."""

    def infer(self, x, y):
        return float_elementwise((x, y), self.attrs)

    def meaning(self, x, y):
        axes, (a, b) = together(x, y)
        return Array(a + (b - a) / 4, axes)
'''
FAILING = {
    "false": ("", "", ":6: lerp declares commutative, which its meaning refutes"),
    "raises": ("(b - a) / 4", "b.nope", "lerp fails at {file}:15: AttributeError"),
    "shape": ("(b - a) / 4", "b.mean(-1, keepdims=True)[:, :1, None]", "another shape"),
    "raw": ("Array(a + (b - a) / 4, axes)", "a", "returns no array with named axes"),
    "type raises": ("float_elementwise((x, y)", "float_elementwise((x.typ, y)",
                    "type rule of lerp fails at {file}:11: AttributeError"),
    "no type": ("return float_elementwise((x, y), self.attrs)", "pass", "returns no type"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_check_names_the_operation_that_is_wrong(table, tmp_path, capsys, case):
    from tests.support.commands import Moecc

    old, new, words = FAILING[case]
    file, graph = tmp_path / "own.py", tmp_path / "graph.moe"
    file.write_text(LOADED.replace(old, new) if old else LOADED)
    graph.write_text(GRAPH.replace("OPERANDS", "x, %z"))
    done = Moecc(capsys)("opt", graph, "-p", "canonicalize", "--check", "--load", file)
    assert done.code == 1, done.err
    assert words.format(file=file) in done.err
