"""Where results lie on a mesh, and what the verifier says where operands cannot lie so."""

from dataclasses import replace

import pytest

from moecc.errors import InputError
from moecc.ir import OPS, Graph, VerifyError, parse, verify
from moecc.ir.mesh import mesh_of, parse_mesh, set_mesh
from moecc.testing import laws

from .operations import read_line

HEAD = 'moecc 1\ngraph g {\n  attr mesh = {"data": 4, "model": 2}\n'

INPUTS = {
    "x": "f32[batch@data=8, seq=4, embed=6]",
    "whole": "f32[batch=8, seq=4, embed=6]",
    "up": "f32[mlp@model=10, embed=6]",
    "down": "f32[embed=6, mlp@model=10]",
    "h": "f32[batch@data=8, seq=4, mlp@model=10]",
    "half": "f32[batch@data=8, seq=4, embed=6] unreduced(model)",
    "g": "f32[embed=6]",
    "gs": "f32[embed@model=6]",
    "table": "f32[vocab@model=12, embed=6]",
    "ids": "i32[batch@data=8, seq=4]",
    "q": "f32[batch@data=8, seq=4, q@model=12]",
    "late": "f32[batch=8, seq@data=4, embed=6]",
    "wide": "f32[batch@data=8, seq=4, expert=4]",
}


def inferred(line):
    """Return the type that follows from the operands of an operation."""
    text = "".join(f"  input %{n} : {t}\n" for n, t in INPUTS.items())
    graph = parse(f"{HEAD}{text}  output y = %x\n}}")
    op, operands, attrs = read_line(line)
    result = graph.append(op, [graph.value(name) for name in operands], attrs).result
    graph.set_output("z", result)
    laws.check_graph(graph)
    return str(result.type)


FLOWING = {
    "mul %x, %half": "f32[batch@data=8, seq=4, embed=6] unreduced(model)",
    "contract %x, %up {over=embed}": "f32[batch@data=8, seq=4, mlp@model=10]",
    "contract %h, %down {over=mlp}": "f32[batch@data=8, seq=4, embed=6] unreduced(model)",
    "add %half, %half": "f32[batch@data=8, seq=4, embed=6] unreduced(model)",
    "sum %x {axes=batch}": "f32[seq=4, embed=6] unreduced(data)",
    "mean %x {axes=(batch, seq)}": "f32[embed=6] unreduced(data)",
    "embedding %table, %ids {axis=vocab}": "f32[batch@data=8, seq=4, embed=6] unreduced(model)",
    "rename %x {axis=batch, to=row}": "f32[row@data=8, seq=4, embed=6]",
    "split %q {axis=q, into=(head=4, dim=3)}": "f32[batch@data=8, seq=4, head@model=4, dim=3]",
    "merge %x {axes=(batch, seq), into=token}": "f32[token@data=32, embed=6]",
    "positions %late {axis=seq}": "i32[seq@data=4]",
    "rms_norm %x, %g {axis=embed}": "f32[batch@data=8, seq=4, embed=6]",
    "softmax %x {axis=seq}": "f32[batch@data=8, seq=4, embed=6]",
    "keep_choices %wide {choice=seq, policy=all}": "pred[batch@data=8, seq=4, expert=4]",
    # collectives
    "all_gather %x {axis=batch, mesh=data}": "f32[batch=8, seq=4, embed=6]",
    "shard %x {axis=batch, mesh=model}": "f32[batch@data*model=8, seq=4, embed=6]",
    "all_reduce %half {mesh=model}": "f32[batch@data=8, seq=4, embed=6]",
    "reduce_scatter %half {axis=embed, mesh=model}": "f32[batch@data=8, seq=4, embed@model=6]",
    "all_to_all %x {mesh=data, split=seq, gather=batch}": "f32[batch=8, seq@data=4, embed=6]",
    'reshard %half {to="seq@model"}': "f32[batch=8, seq@model=4, embed=6]",
}


@pytest.mark.parametrize("line", FLOWING)
def test_results_lie_where_operands_say(line):
    assert inferred(line) == FLOWING[line]


REFUSED = {
    "softmax %x {axis=batch}": (
        "softmax does not accept a sharded axis 'batch' of %x",
        "batch@data",
    ),
    "add %x, %whole": ("the axis 'batch' of %whole is sharded unlike that of %x", "batch"),
    "mul %half, %half": ("mul does not accept %half, an unreduced sum", "unreduced(model)"),
    "silu %half": ("silu does not accept %half, an unreduced sum", "unreduced(model)"),
    "mul %half, %gs": ("'embed' of %gs is sharded unlike that of %half", "embed@model"),
    "contract %late, %x {over=embed}": ("is sharded unlike", "batch@data"),
    "mul %h, %gs": ("no operand has all axes", "embed@model"),
    "merge %late {axes=(batch, seq), into=token}": (
        "does not accept a sharded axis 'seq' of %late",
        "seq",
    ),
    "assign_slots %ids {tokens=(batch), experts=4}": ("groups do not divide over the mesh", "1"),
    "all_gather %x {axis=seq, mesh=data}": ("is not sharded, innermost, over data", "seq"),
    "shard %x {axis=embed, mesh=data}": (
        "is sharded over the mesh axis 'data' already",
        "batch@data",
    ),
    "all_reduce %x {mesh=model}": ("not an unreduced sum over model", "batch@data"),
    "all_to_all %x {mesh=data, split=batch, gather=batch}": ("split and gathered", "batch"),
    "ragged_all_to_all %x {mesh=data, split=seq, gather=batch}": ("ragged rows", "batch@data"),
    'reshard %x {to="expert@data"}': ("there is no axis 'expert'", "batch@data"),
    'reshard %x {to="seq@data,batch@model"}': ("in their order", "seq@data"),
    'reshard %x {to="batch"}': ("not a sharding", "batch"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_lie_so_is_refused(line):
    what, found = REFUSED[line]
    with pytest.raises(InputError) as caught:
        inferred(line)
    (problem,) = caught.value.problems
    assert what in problem.message
    assert found in (problem.found or "")


ROUTED = """  input %x : f32[b@data=8, s=4, d=6]
  input %l : f32[b@data=8, s=4, expert=4]
  param %w : f32[expert@data=4, mlp@model=10, d=6]
  param %o : f32[expert@data=4, d=6, mlp@model=10]
  %e, %g = route %l {top_k=2, choice=k} : i32[b@data=8, s=4, k=2], f32[b@data=8, s=4, k=2]
  %p = assign_slots %e {tokens=(b, s), experts=4, groups=4, SLOTS} : i32[b@data=8, s=4, k=2]
  %r = dispatch %x, %e, %p : f32[group@data=4, expert=4, slot=KIND, d=6]
  %r1 = A2A %r {mesh=data, split=expert, gather=group} : f32[group=4, expert@data=4, slot=KIND, d=6]
  %h = contract %r1, %w {over=d} : f32[group=4, expert@data=4, slot=KIND, mlp@model=10]
  %h1 = silu %h : f32[group=4, expert@data=4, slot=KIND, mlp@model=10]
  %d = contract %h1, %o {over=mlp} : f32[group=4, expert@data=4, slot=KIND, d=6] unreduced(model)
  %d1 = all_reduce %d {mesh=model} : f32[group=4, expert@data=4, slot=KIND, d=6]
  %c = A2A %d1 {mesh=data, split=group, gather=expert} : f32[group@data=4, expert=4, slot=KIND, d=6]
  %y = combine %c, %e, %p, %g : f32[b@data=8, s=4, d=6]
  output y = %y
}
"""


@pytest.mark.parametrize(
    ("kind", "slots", "exchange"),
    [
        ("capacity", "slots=capacity, capacity_factor=2.0", "all_to_all"),
        ("ragged", "slots=ragged", "ragged_all_to_all"),
    ],
)
def test_an_expert_parallel_layer(kind, slots, exchange):
    text = HEAD + ROUTED.replace("KIND", f"{kind}(%p)").replace("SLOTS", slots)
    laws.check_graph(parse(text.replace("A2A", exchange)))


def test_an_operation_without_a_rule_takes_whole_operands(monkeypatch):
    monkeypatch.setitem(OPS, "silu", replace(OPS["silu"], sharding=None))
    with pytest.raises(InputError, match="silu does not accept a sharded axis 'batch' of %x"):
        inferred("silu %x")
    assert inferred("silu %whole") == "f32[batch=8, seq=4, embed=6]"


@pytest.mark.parametrize(
    ("type", "message", "expected", "hint"),
    [
        (
            "f32[embed@data=6]",
            "does not divide",
            "a multiple of 4 (data:4)",
            "3 parts would, or a size of 8",
        ),
        (
            "f32[embed@date=8]",
            "the mesh has no axis 'date'",
            "data:4,model:2",
            "did you mean 'data'?",
        ),
        ("f32[embed@data=8] unreduced(data)", "'data' is used twice", None, "no hint"),
        (
            "f32[a@data*model=12]",
            "does not divide",
            "a multiple of 8 (data:4*model:2)",
            "6 parts would",
        ),
    ],
)
def test_a_type_that_does_not_lie_on_the_mesh(type, message, expected, hint):
    graph = parse(f"{HEAD}  input %x : {type}\n  output y = %x\n}}")
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert (problem.where, problem.expected) == ("%x", expected)
    assert hint in (problem.hint or "no hint")


def test_a_placed_type_needs_a_mesh():
    graph = parse("moecc 1\ngraph g {\n  input %x : f32[a@data=8]\n  output y = %x\n}")
    with pytest.raises(VerifyError, match="the graph has no mesh"):
        verify(graph)
    graph.attrs["mesh"] = "data"
    with pytest.raises(VerifyError, match="attribute mesh: the attribute mesh is not a mesh"):
        verify(graph)
    graph.attrs["mesh"] = {"data": 8}
    verify(graph)


def test_a_mesh_numbers_its_devices():
    mesh = parse_mesh("data:2, model:3")
    assert str(mesh) == "data:2,model:3"
    assert parse_mesh("data=2,model=3") == mesh
    assert mesh.devices == 6
    devices = list(mesh.coordinates())
    assert devices[4] == (1, 1)
    assert mesh.part((1, 1), ("model", "data")) == 3
    assert mesh.peers((1, 1), ("model",)) == [(1, 0), (1, 1), (1, 2)]
    with pytest.raises(InputError, match="the mesh has no axis 'mode'"):
        mesh.size(("mode",))
    graph = Graph()
    assert mesh_of(graph) is None
    set_mesh(graph, mesh)
    assert mesh_of(graph) == mesh
    set_mesh(graph, None)
    assert graph.attrs == {}
