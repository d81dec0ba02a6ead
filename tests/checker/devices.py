"""Graphs on a mesh: some whose devices compute their values, and edits after which they do not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from typing import Any

from moecc.ir.graph import Graph
from moecc.ir.text import parse, print_graph
from moecc.prove import prove

from .corruptions import Proof, is_accepted
from .logs import log_of

TEXT = """moecc 1
graph g {
  attr mesh = {"a": 2, "b": 2, "c": 1}
%s
  output y = %%y
}
"""

GRAPHS = {
    "sum": """
  input %x : f32[batch@a=B, embed@b=8]
  %s = sum %x {axes=embed} : f32[batch@a=B] unreduced(b)
  %y = all_reduce %s {mesh=b} : f32[batch@a=B]""",
    "mean": """
  input %x : f32[batch=B, embed@a*b=8]
  %s = mean %x {axes=embed} : f32[batch=B] unreduced(a, b)
  %y = all_reduce %s {mesh=(a, b)} : f32[batch=B]""",
    "scatter": """
  input %x : f32[batch=8, embed@a=8]
  %s = sum %x {axes=embed} : f32[batch=8] unreduced(a)
  %y = reduce_scatter %s {axis=batch, mesh=a} : f32[batch@a=8]""",
    "gather": """
  input %x : f32[batch@a*b=8, embed=8]
  %y = all_gather %x {axis=batch, mesh=b} : f32[batch@a=8, embed=8]""",
    "gather of an open size": """
  input %x : f32[batch@a*b=B, embed=8]
  %y = all_gather %x {axis=batch, mesh=(a, b)} : f32[batch=B, embed=8]""",
    "exchange": """
  input %x : f32[batch@a*b=B, embed=8]
  %y = all_to_all %x {mesh=b, split=embed, gather=batch} : f32[batch@a=B, embed@b=8]""",
    "shard": """
  input %x : f32[batch@a=8, embed=8]
  %y = shard %x {axis=embed, mesh=b} : f32[batch@a=8, embed@b=8]""",
    "reshard": """
  input %x : f32[batch@a=8, embed=8]
  %y = reshard %x {to="embed@b"} : f32[batch=8, embed@b=8]""",
    "positions": """
  input %x : f32[batch@a=B, embed=8]
  %y = positions %x {axis=batch} : i32[batch@a=B]""",
    "broadcast": """
  input %x : f32[batch@a=8]
  input %z : f32[]
  %y = broadcast %z, %x : f32[batch@a=8]""",
    "embedding": """
  input %x : i32[batch@b=B]
  param %w : f32[vocab@a=8, embed=4]
  %z = embedding %w, %x {axis=vocab} : f32[batch@b=B, embed=4] unreduced(a)
  %y = all_reduce %z {mesh=a} : f32[batch@b=B, embed=4]""",
    "embedding of an id for each row": """
  input %x : i32[vocab@b=8]
  param %w : f32[vocab=8, embed=4]
  %y = embedding %w, %x {axis=vocab} : f32[vocab@b=8, embed=4]""",
    "contraction": """
  input %x : f32[batch@a=B, embed@b=8]
  param %w : f32[mlp=4, embed@b=8]
  %z = contract %x, %w {over=embed} : f32[batch@a=B, mlp=4] unreduced(b)
  %y = all_reduce %z {mesh=b} : f32[batch@a=B, mlp=4]""",
    "windows": """
  input %x : f32[batch@a=B, place=4, channel=2]
  param %w : f32[tap=2, channel=2, e@b=4]
  %y = convolve %x, %w {over=channel, along=place, taps=tap} : f32[batch@a=B, place=3, e@b=4]""",
    "update": """
  input %x : f32[batch=8, embed@a=8]
  input %u : f32[batch=8, embed@a=8]
  input %i : i32[]
  %y = update_slice %x, %u, %i {axis=batch} : f32[batch=8, embed@a=8]""",
    "chunks": """
  input %x : f32[mlp@a=16, embed=4]
  %u = chunk %x {axis=mlp, at=0, of=2, parts=4} : f32[mlp@a=8, embed=4]
  %v = chunk %x {axis=mlp, at=1, of=2, parts=4} : f32[mlp@a=8, embed=4]
  %y = join %v, %u {axis=mlp, parts=4} : f32[mlp@a=16, embed=4]""",
    "joined": """
  input %x : f32[mlp@a=4, embed=4]
  %y = join %x, %x {axis=mlp, parts=2} : f32[mlp@a=8, embed=4]""",
    "split": """
  input %x : f32[embed@a=8]
  %y = split %x {axis=embed, into=(head=4, inner=2)} : f32[head@a=4, inner=2]""",
    "scan": """
  input %x : f32[batch@a=B, embed=8]
  param %w : f32[layer=2, embed=8]
  %y = scan %x, %w {over=(layer=2), carries=1, stacked=1} : f32[batch@a=B, embed=8] {
    input %h : f32[batch@a=B, embed=8]
    input %v : f32[embed=8]
    %z = mul %h, %v : f32[batch@a=B, embed=8]
    output h = %z
  }""",
    "mean in a scan": """
  input %x : f32[batch=B, embed@a=8]
  input %k : pred[batch=B, embed@a=8]
  %y = scan %x, %k {over=(layer=2), carries=1} : f32[batch=B, embed@a=8] {
    input %h : f32[batch=B, embed@a=8]
    input %c : pred[batch=B, embed@a=8]
    %m = mean %h {axes=embed} : f32[batch=B] unreduced(a)
    %r = all_reduce %m {mesh=a} : f32[batch=B]
    %d = broadcast %r, %h : f32[batch=B, embed@a=8]
    %z = mask %d, %c {fill=0.0} : f32[batch=B, embed@a=8]
    output h = %z
  }""",
    "values of a scan": """
  input %x : f32[embed@a=8]
  input %k : pred[embed@a=8]
  %i = mask %x, %k {fill=0.0} : f32[embed@a=8]
  %u, %v = scan %i {over=(layer=2), carries=1} : f32[embed@a=8], f32[layer=2, embed@a=8] {
    input %h : f32[embed@a=8]
    %z = sigmoid %h : f32[embed@a=8]
    output h = %z
    output all = %h
  }
  %m = mean %v {axes=embed} : f32[layer=2] unreduced(a)
  %y = all_reduce %m {mesh=a} : f32[layer=2]""",
    "noise": """
  input %k : key[]
  input %x : f32[batch@a=8]
  %y = random_normal %k, %x : f32[batch@a=8]""",
    "slots": """
  input %x : f32[batch@a*b=B, embed=4]
  input %c : i32[batch@a*b=B, choice=2]
  input %d : i32[batch@a*b=B, choice=2]
  input %g : f32[batch@a*b=B, choice=2]
  %s = assign_slots %c {tokens=batch, experts=4, groups=4} : i32[batch@a*b=B, choice=2]
  %t = assign_slots %d {tokens=batch, experts=4, groups=4} : i32[batch@a*b=B, choice=2]
  %r = dispatch %x, %c, %s : f32[group@a*b=4, expert=4, slot=ragged(%s), embed=4]
  %q = dispatch %x, %d, %t : f32[group@a*b=4, expert=4, slot=ragged(%t), embed=4]
  %z = combine %r, %c, %s, %g : f32[batch@a*b=B, embed=4]
  %w = combine %q, %d, %t, %g : f32[batch@a*b=B, embed=4]
  %y = add %z, %w : f32[batch@a*b=B, embed=4]""",
    "part of the experts": """
  input %x : f32[batch@a=B, embed=4]
  input %c : i32[batch@a=B, choice=2]
  input %g : f32[batch@a=B, choice=2]
  %s = assign_slots %c {tokens=batch, experts=4, groups=2} : i32[batch@a=B, choice=2]
  %r = dispatch %x, %c, %s : f32[group@a=2, expert=4, slot=ragged(%s), embed=4]
  %q = shard %r {axis=expert, mesh=b} : f32[group@a=2, expert@b=4, slot=ragged(%s), embed=4]
  %z = combine %q, %c, %s, %g : f32[batch@a=B, embed=4] unreduced(b)
  %y = all_reduce %z {mesh=b} : f32[batch@a=B, embed=4]""",
    "sum over one device": """
  input %x : f32[batch@a=B, embed@c=8]
  %s = sum %x {axes=embed} : f32[batch@a=B] unreduced(c)
  %y = all_reduce %s {mesh=c} : f32[batch@a=B]""",
    "itself": """
  input %y : f32[batch@a=8, embed=8]""",
}
"""Graphs on two by two by one devices, by what they show."""

EDITS = (
    ("sum", "unreduced(b)", ""),
    ("sum", "{mesh=b}", "{mesh=a}"),
    ("sum", '  attr mesh = {"a": 2, "b": 2, "c": 1}\n', ""),
    (
        "sum",
        '  attr mesh = {"a": 2, "b": 2, "c": 1}\n',
        '  attr mesh = {"a": 2, "b": 2, "c": 1}\n' * 2,
    ),
    ("sum", '"b": 2', '"b": 3'),
    ("sum", '"b": 2', '"b": 2.0'),
    ("sum", '"b": 2', '"d": 2'),
    ("mean", "unreduced(a, b)", "unreduced(a)"),
    ("mean", "{mesh=(a, b)}", "{mesh=a}"),
    ("mean", "{mesh=(a, b)}", "{mesh=(a, b, a)}"),
    ("scatter", "batch@a=8", "batch=8"),
    ("scatter", "batch@a=8", "batch@b=8"),
    ("gather", "f32[batch@a=8, embed=8]", "f32[batch@b=8, embed=8]"),
    ("gather", "mesh=b", "mesh=a"),
    ("gather", "batch@a*b", "batch@b*a"),
    ("gather of an open size", "mesh=(a, b)", "mesh=(b, a)"),
    ("gather of an open size", "batch=B, embed=8]\n", "batch@a=B, embed=8]\n"),
    ("exchange", "embed@b=8", "embed@a=8"),
    ("exchange", "split=embed, gather=batch", "split=batch, gather=embed"),
    ("shard", "batch@a=8, embed@b=8", "batch@b=8, embed@a=8"),
    ("shard", "mesh=b", "mesh=a"),
    (
        "shard",
        "axis=embed, mesh=b} : f32[batch@a=8, embed@b",
        "axis=embed, mesh=a} : f32[batch@a=8, embed@a",
    ),
    ("positions", "i32[batch@a=B]", "i32[batch=B]"),
    ("broadcast", "%x : f32[batch@a=8]\n  output", "%x : f32[batch=8]\n  output"),
    ("embedding", "unreduced(a)", ""),
    ("embedding", "param %w : f32[vocab@a", "param %w : f32[vocab@b"),
    ("contraction", "%w : f32[mlp=4, embed@b=8]", "%w : f32[mlp=4, embed@a=8]"),
    ("contraction", "%w : f32[mlp=4, embed@b=8]", "%w : f32[mlp=4, embed=8]"),
    ("windows", "tap=2", "tap@a=2"),
    ("windows", "f32[batch@a=B, place=4, channel=2]", "f32[batch=B, place@a=4, channel=2]"),
    ("windows", "batch@a=B, place=4, channel=2", "batch@a=B, place=4, channel@b=2"),
    ("windows", "place=3, e@b=4", "place=3, e=4"),
    ("update", "axis=batch", "axis=embed"),
    ("chunks", "of=2, parts=4", "of=2, parts=1"),
    ("chunks", "of=2, parts=4", "of=2"),
    ("chunks", "{axis=mlp, parts=4}", "{axis=mlp}"),
    ("joined", "{axis=mlp, parts=2}", "{axis=mlp}"),
    ("split", "head@a=4, inner=2", "head=4, inner@a=2"),
    ("scan", "input %h : f32[batch@a=B", "input %h : f32[batch=B"),
    ("scan", "%w : f32[layer=2", "%w : f32[layer@b=2"),
    ("scan", "%z = mul %h, %v : f32[batch@a=B", "%z = mul %h, %v : f32[batch@b=B"),
    ("scan", "stacked=1} : f32[batch@a=B", "stacked=1} : f32[batch=B"),
    ("scan", "%x : f32[batch@a=B", "%x : f32[batch=B"),
    ("mean in a scan", " {fill=0.0}", ""),  # the mean of a later run is infinite
    ("values of a scan", " {fill=0.0}", ""),  # the mean of the first run is infinite
    (
        "noise",
        "%y = random_normal %k, %x : f32[batch@a=8]",
        "%y = random_normal %k, %x : f32[batch=8]",
    ),
    ("slots", "groups=4", "groups=1"),
    ("slots", "combine %r, %c, %s", "combine %r, %d, %s"),
    ("slots", "combine %r, %c, %s", "combine %q, %c, %s"),
    ("slots", "combine %r, %c, %s", "combine %r, %c, %c"),
    ("slots", "dispatch %x, %c, %s", "dispatch %x, %d, %s"),
    (
        "part of the experts",
        "{axis=expert, mesh=b} : f32[group@a=2, expert@b=4",
        "{axis=expert, mesh=a} : f32[group=2, expert@a=4",
    ),
    ("part of the experts", "unreduced(b)", ""),
    ("itself", '  attr mesh = {"a": 2, "b": 2, "c": 1}\n', ""),
    ("itself", "embed=8]", "embed@a=8]"),
    ("itself", "embed=8]", "embed=8] unreduced(b)"),
    ("itself", "batch@a=8", "batch@a=7"),
)
"""A graph, a part of its text, and the text with which its devices compute another value."""

LAID_OTHERWISE = (
    ("itself", '"b": 2', '"b": 4'),
    ("itself", "batch@a=8", "batch@b=8"),
    ("sum", "output y = %y", "output y = %s"),
    (
        "reshard",
        '{to="embed@b"} : f32[batch=8, embed@b=8]',
        '{to="batch@b"} : f32[batch@b=8, embed=8]',
    ),
)
"""A graph, and another whose devices compute the same, but that lies otherwise on them."""


@cache
def right() -> dict[str, Proof]:
    """Return the proofs of the graphs, each that it is itself."""
    return {
        name: proof_on_devices(parse(TEXT % text.removeprefix("\n")))
        for name, text in GRAPHS.items()
    }


def proof_on_devices(graph: Graph) -> Proof:
    """Return the proof that a graph is itself, and of what devices compute."""
    verdict = prove(graph, graph)
    assert verdict.status == "proved", (verdict.node, verdict.terms)
    text = print_graph(graph)
    return json.loads(json.dumps(verdict.log)), text, text


def edited(proof: Proof, old: str, new: str, *, of_both: bool = True) -> Proof:
    """Return a proof of which both graphs have another text, or the second."""
    log, text, _ = proof
    assert old in text, (old, text)
    after = text.replace(old, new, 1)
    before = after if of_both else text
    digests = (sha256(t.encode()).hexdigest() for t in (before, after))
    digests_by_key = dict(zip(("before", "after"), digests, strict=True))
    return {**log, "rolled": False, **digests_by_key}, before, after


def misjudged_on_devices(checker: Any) -> Iterator[str]:
    """Yield the graphs on a mesh that a checker judges in another way than it should."""
    for name, proof in right().items():
        if not is_accepted(checker, proof, is_pruned=False):
            yield f"refuses {name}"
    for name, old, new in EDITS:
        if is_accepted(checker, edited(right()[name], old, new), is_pruned=False):
            yield f"accepts {name} with {new} for {old}"
    text = right()["itself"][1]
    on_one_device = re.sub(r"@[a-z]+|  attr mesh.*\n", "", text)
    if not is_accepted(checker, log_of(on_one_device, text), is_pruned=False):
        yield "refuses a graph and itself on a mesh"
    for name, old, new in LAID_OTHERWISE:
        if is_accepted(checker, edited(right()[name], old, new, of_both=False), is_pruned=False):
            yield f"accepts {name} and {new} for {old}"
        if not is_accepted(checker, edited(right()[name], old, new), is_pruned=False):
            yield f"refuses {name} with {new}"
