"""Micro-batches and frozen parameters: some that are proved, and edits that are no proof."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from typing import Any

from moecc.ir.text import parse, print_graph
from moecc.prove import prove

from .corruptions import Proof, is_accepted, proof_of
from .logs import log_of

BATCH = """moecc 1
graph g {{
  attr losses = {{"parts": {parts}}}
  input %x : f32[batch=B, embed=8]
  input %c : i32[batch=B, choice=2]
  input %g : f32[batch=B, choice=2]
  param %w : f32[embed=8]
  %v = mul %x, %w : f32[batch=B, embed=8]
  %s = assign_slots %c {{tokens=batch, experts=4, groups={groups}, slots=capacity, \
capacity_factor=1.5}} : i32[batch=B, choice=2]
  %r = dispatch %v, %c, %s : f32[group={groups}, expert=4, slot=capacity(%s), embed=8]
  %e = mean %r {{axes=slot}} : f32[group={groups}, expert=4, embed=8]
  %y = combine %r, %c, %s, %g : f32[batch=B, embed=8]
  %t = sum %e {{axes=(group, expert, embed)}} : f32[]
  %m = mean %v {{axes=(batch, embed)}} : f32[]
{last}
  output y = %y
  output t = %t
  output m = %{mean}
}}
"""
WHOLE = BATCH.format(parts=1, groups=4, last="", mean="m").replace("\n\n", "\n")
PART = BATCH.format(parts=2, groups=2, last="  %n = scale %m {by=0.5} : f32[]", mean="n")

PART_EDITS = (
    ("after", "by=0.5", "by=1.0"),
    ("after", "  input %x", '  attr mesh = {"parts": 2}\n  input %x'),
    ("after", "groups=2", "groups=4"),
    ("after", "capacity_factor=1.5", "capacity_factor=3.0"),
    ("after", "%v = mul %x, %w", "%v = add %x, %w"),
    ("after", "input %x : f32[batch=B,", "input %x : f64[batch=B,"),
    ("parts", "unreduced(parts)", ""),
    ("parts", "%x : f32[batch@parts=B, embed=8]", "%x : f32[batch=B, embed@parts=8]"),
    ("parts", '"parts": 2}\n  input', '"parts": 4}\n  input'),
    ("parts", '{"parts": 2}', '{"parts": 2, "other": 1}'),
    ("parts", "%v = mul %x, %w", "%v = add %x, %w"),
    ("parts", "groups=4", "groups=2"),
    ("parts", "@parts", ""),
    ("before", "capacity_factor=1.5", "capacity_factor=3.0"),
    ("before", "%v = mul %x, %w", "%v = add %x, %w"),
)
"""The text of a graph, what stands there, and what makes it another function or no part."""

SMALL = """moecc 1
graph g {{
{mesh}  input %x : f32[batch{batch}=B, seq{seq}=S]
  param %w : f32[embed=8]
  %y = scale %{read} {{by=2.0}} : {type}
  output y = %y
}}
"""
SHARDS = {
    "a graph on devices as its part": ("x", "f32[batch@parts=B, seq=S]", "@parts", ""),
    "a part of each text": ("x", "f32[batch=B, seq@parts=S]", "", "@parts"),
    "what needs no batch": ("w", "f32[embed=8]", "@parts", ""),
}
"""An output, its type on devices, and how these have their input."""

IN_A_RUN = """moecc 1
graph g {{
{mesh}  input %x : f32[batch{at}=B]
  %t = sum %x {{axes=batch}} : f32[]{summand}
  %s = scan %t {{over=(layer=1)}} : f32[layer=1] {{
    input %c : f32[]{summand}
{total}    output r = %{read}
  }}
  %u = sum %s {{axes=layer}} : f32[]
  %y = mul %x, %u : f32[batch{at}=B]
  output y = %y
}}
"""
ALONE = IN_A_RUN.format(mesh="", at="", summand="", total="", read="c")
TOGETHER = IN_A_RUN.format(
    mesh='  attr mesh = {"parts": 2}\n',
    at="@parts",
    summand=" unreduced(parts)",
    total="    %r = all_reduce %c {mesh=parts} : f32[]\n",
    read="r",
)
"""A batch times its sum, which devices add up in a run: a micro-batch has its own sum alone."""

FROZEN = """moecc 1
graph g {{
  attr frozen = {{"groups": ["all"], "only": []}}
  input %x : f32[batch=B, embed=8]
  param %w : f32[embed=8]
{node}
  %y = mul %x, %{weight} : f32[batch=B, embed=8]
  output y = %y
}}
"""
READ = FROZEN.format(node="  %s = mul %w, %w : f32[embed=8]", weight="s")
STOPPED = FROZEN.format(
    node="  %a = stop_gradient %w : f32[embed=8]\n  %s = mul %a, %w : f32[embed=8]", weight="s"
)


def proof_of_texts(before: str, after: str) -> Proof:
    """Return the proof of two graphs, given by their texts."""
    graphs = parse(before), parse(after)
    verdict = prove(*graphs)
    assert verdict.status == "proved", (verdict.node, verdict.terms)
    return json.loads(json.dumps(verdict.log)), print_graph(graphs[0]), print_graph(graphs[1])


@cache
def right() -> tuple[Proof, Proof]:
    """Return the proof of a micro-batch, and that of a graph whose parameters are frozen."""
    return proof_of_texts(WHOLE, PART), proof_of_texts(READ, STOPPED)


@cache
def chosen() -> Proof:
    """Return the proof of a micro-batch of which experts choose tokens."""
    proof = proof_of("part", "bert_square", "upcycle{experts=4 routing=expert-choice}")
    assert proof is not None, "it is proved"
    return proof


@cache
def in_a_run() -> dict[str, Any]:
    """Return the fields of a log with a run on devices."""
    return {"parts": [TOGETHER], "devices": proof_of_texts(TOGETHER, TOGETHER)[0]["devices"]}


def edited(proof: Proof, key: str, old: str, new: str) -> Proof:
    """Return a proof of which a graph has another text."""
    log, before, after = copy.deepcopy(proof)
    texts = {"before": before, "after": after, "parts": log["parts"][0]}
    assert old in texts[key], (old, texts[key])
    texts[key] = texts[key].replace(old, new)
    log["parts"] = [texts["parts"]]
    for name in ("before", "after"):
        log[name] = sha256(texts[name].encode()).hexdigest()
    return log, texts["before"], texts["after"]


def wrong() -> Iterator[tuple[str, Proof]]:
    """Yield logs that prove nothing, and what is wrong with them."""
    part, frozen = right()
    for key, old, new in PART_EDITS:
        yield f"{key} with {new} for {old}", edited(part, key, old, new)
    log, before, after = part
    yield "no graph of devices", ({**log, "parts": []}, before, after)
    yield "two graphs of devices", ({**log, "parts": log["parts"] * 2}, before, after)
    yield "the whole batch as its part", ({**log, "after": log["before"]}, before, before)
    yield "a batch on devices", edited(part, "before", before, log["parts"][0])
    for name, (read, type, batch, seq) in SHARDS.items():
        mesh = '  attr mesh = {"parts": 2}\n'
        texts = (
            SMALL.format(mesh=m, batch=b, seq=s, read=read, type=t)
            for m, b, s, t in (("", "", "", type.replace("@parts", "")), (mesh, batch, seq, type))
        )
        whole, on_devices = texts
        is_part = name == "a graph on devices as its part"
        yield name, log_of(whole, on_devices if is_part else whole, {"parts": [on_devices]})
    yield "a sum of devices in a run", log_of(ALONE, ALONE, in_a_run())
    without = {k: v for k, v in log.items() if k != "devices"}
    yield "no steps of devices", (without, before, after)
    yield "a part with frozen parameters", ({**log, "frozen": [["%w"], ["%w"]]}, before, after)
    log, before, after = frozen
    for names in ([[], []], [["%w"], []], [[], ["%w"]], [["%x"], ["%x"]], [["%w"], ["%w", "%v"]]):
        yield f"frozen {names}", ({**log, "frozen": names}, before, after)
    plain = after.replace('  attr frozen = {"groups": ["all"], "only": []}\n', "")
    digest = sha256(plain.encode()).hexdigest()
    yield "a graph that freezes nothing", ({**log, "after": digest}, before, plain)


def misjudged_parts(checker: Any) -> Iterator[str]:
    """Yield the proofs of micro-batches and frozen parameters that a checker judges wrongly."""
    named = {"a micro-batch": right()[0], "frozen parameters": right()[1],
             "a micro-batch of which experts choose": chosen()}  # fmt: skip
    for name, proof in named.items():
        if not is_accepted(checker, proof, is_pruned=False):
            yield f"refuses {name}"
    for name, proof in wrong():
        if is_accepted(checker, proof, is_pruned=False):
            yield f"accepts {name}"
