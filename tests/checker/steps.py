"""Steps of generation: one that is proved, and edits of it, or of the text too, that are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .corruptions import Proof, is_accepted
from .logs import log_of

GRAPH = """moecc 1
graph g {{
  input %tokens : i32[batch=B, seq=S]
{inputs}
  param %e : f32[vocab=8, embed=4]
  param %r : f32[embed=4, expert=2] = source("r" : f32[embed=4, expert=2])
  param %w : f32[expert=2, embed=4]
  param %z0 : f32[expert=2, embed=4]
  %x = embedding %e, %tokens {{axis=vocab}} : f32[batch=B, seq=S, embed=4]
{positions}
  %c = causal %p, %q : pred[seq=S, kv={keys}]
  %n = rename %x {{axis=seq, to=kv}} : f32[batch=B, kv=S, embed=4]
  %x2 = neg %x : f32[batch=B, seq=S, embed=4]
  %n2 = rename %x2 {{axis=seq, to=kv}} : f32[batch=B, kv=S, embed=4]
{cache}
  %s = contract %x, {k} {{over=embed}} : f32[batch=B, seq=S, kv={keys}]
  %t = scale %s {{by=2.0}} : f32[batch=B, seq=S, kv={keys}]
  %c2 = less %t, %s : pred[batch=B, seq=S, kv={keys}]
  %m1 = mask %t, %c : f32[batch=B, seq=S, kv={keys}]
  %m = mask %m1, %c2 : f32[batch=B, seq=S, kv={keys}]
  %a = softmax %m {{axis=kv}} : f32[batch=B, seq=S, kv={keys}]
  %o = scale %a {{by=3.0}} : f32[batch=B, seq=S, kv={keys}]
  %z = contract %o, {v} {{over=kv}} : f32[batch=B, seq=S, embed=4]
  %seen = cast %c {{dtype=f32}} : f32[batch=B, seq=S, kv={keys}]
  %past = contract %seen, {k} {{over=kv}} : f32[batch=B, seq=S, embed=4]
  %h0 = sum {k} {{axes=embed}} : f32[batch=B, kv={keys}]
  %rule = delta_rule %x, {k}, %h0, %h0, %h0, %c {{over=embed, along=kv}} : f32[batch=B, seq=S]
  %u = logsumexp %m {{axes=kv}} : f32[batch=B, seq=S]
  %v = silu %z : f32[batch=B, seq=S, embed=4]
  %l = contract %v, %r {{over=embed}} : f32[batch=B, seq=S, expert=2]
  %i, %g = route %l {{top_k=1}} : i32[batch=B, seq=S, choice=1], f32[batch=B, seq=S, choice=1]
  %j, %f = route %l {{top_k=2}} : i32[batch=B, seq=S, choice=2], f32[batch=B, seq=S, choice=2]
  %d = assign_slots %i {{tokens=(batch, seq), experts=2}} : i32[batch=B, seq=S, choice=1]
  %b = assign_slots %j {{tokens=(batch, seq), experts=2}} : i32[batch=B, seq=S, choice=2]
  %h = dispatch %v, %i, %d : f32[group=1, expert=2, slot=ragged(%d), embed=4]
  %k2 = dispatch %v, %j, %b : f32[group=1, expert=2, slot=ragged(%b), embed=4]
  %h2 = mul %h, %w : f32[group=1, expert=2, slot=ragged(%d), embed=4]
  %y = combine %h2, %i, %d, %g : f32[batch=B, seq=S, embed=4]
  %y2 = combine %k2, %j, %b, %f : f32[batch=B, seq=S, embed=4]
  output u = %u
  output past = %past
  output y = %y
  output other = %y2
  output rule = %rule
{outputs}}}
"""
TEXT = GRAPH.format(
    inputs="",
    positions="  %p = positions %tokens {axis=seq} : i32[seq=S]\n"
    "  %q = rename %p {axis=seq, to=kv} : i32[kv=S]",
    keys="S",
    cache="",
    k="%n",
    v="%n2",
    outputs="",
).replace("\n\n", "\n")
STEP = (
    GRAPH.replace("%p, %q", "%positions, %key_positions")
    .format(
        inputs="  input %positions : i32[batch=B, seq=S]\n"
        "  input %key_positions : i32[batch=B, kv=C]\n"
        "  input %cache.k : f32[batch=B, kv=C, embed=4]\n"
        "  input %cache.v : f32[batch=B, kv=C, embed=4]\n"
        "  input %start : i32[]",
        positions="",
        keys="C",
        cache="  %k = update_slice %cache.k, %n, %start {axis=kv} : f32[batch=B, kv=C, embed=4]\n"
        "  %v0 = update_slice %cache.v, %n2, %start {axis=kv} : f32[batch=B, kv=C, embed=4]",
        k="%k",
        v="%v0",
        outputs="  output cache.k = %k\n  output cache.v = %v0\n",
    )
    .replace("\n\n", "\n")
    .replace("pred[seq=S", "pred[batch=B, seq=S")
)
OF_BOTH = (
    ("mask %t, %c :", "scale %t {by=1.0} :"),
    ("mask %t, %c :", "mask %t, %c2 :"),
    ("%h0, %c {", "%h0, %c2 {"),
    ("mask %m1, %c2 :", "mask %m1, %c2 {fill=0.0} :"),
    ("softmax %m {axis=kv}", "softmax %m {axis=batch}"),
    ("  %u = logsumexp %m {axes=kv}",
     "  %u1 = logsumexp %m {axes=(kv, seq)} : f32[batch=B]\n  %u = broadcast %u1, %tokens"),
    ("rename %x {axis=seq, to=kv}", "rename %x {axis=embed, to=kv}"),
    ("rename %x {axis=seq, to=kv}", "rename %x {axis=seq, to=key}"),
    ("combine %h2, %i, %d", "gather_rows %h2, %i, %d"),
    ("  %y2 = combine %k2, %j, %b, %f",
     "  %d3 = dispatch %v, %i, %d : f32[group=1, expert=2, slot=3, embed=4]\n"
     "  %d4 = sum %d3 {axes=(group, expert, slot)} : f32[embed=4]\n  %y2 = add %v, %d4"),
    ("  %y2 = combine %k2, %j, %b, %f",
     "  %y3 = combine %k2, %j, %b, %f : f32[embed=4]\n  %y2 = add %v, %y3"),
    ("output other = %y2", "output other = %y3"),
    ("mask %t, %c :", "mask %t, %c {fill=-10000.0} :"),
    ("mask %t, %c :", "mask %t, %c {fill=0.0} :"),
    ("softmax %m {axis=kv}", "softmax %m {axis=seq}"),
    ("softmax %m {axis=kv}", "softmax %t {axis=kv}"),
    ("softmax %m {axis=kv}", "exp %t"),
    ("logsumexp %m {axes=kv}", "logsumexp %t {axes=kv}"),
    ("logsumexp %m {axes=kv}", "sum %t {axes=kv}"),
    ("logsumexp %m {axes=kv}", "sum %a {axes=kv}"),
    ("logsumexp %m {axes=kv}", "max %o {axes=kv}"),
    ("contract %o,", "contract %t,"),
    ("contract %o,", "contract %m,"),
    ("scale %a {by=3.0}", "exp %a"),
    ("scale %a {by=3.0}", "add %a, %t"),
    ("scale %a {by=3.0}", "softmax %a {axis=seq}"),
    ("silu %z", "softmax %z {axis=seq}"),
    ("mul %h, %w", "softmax %h {axis=slot}"),
    ("mul %h, %w", "softmax %h {axis=expert}"),
    ("mul %h, %w", "softmax %h {axis=group}"),
    ("mul %h, %w", "mul %h, %k2"),
    ("mul %h, %w", "mul %h, %z"),
    ("combine %h2, %i, %d", "combine %h2, %j, %d"),
    ("combine %h2, %i, %d", "combine %k2, %i, %d"),
    ("combine %h2, %i, %d, %g", "combine %h2, %i, %d, %d"),
    ("combine %h2, %i, %d, %g", "combine %h2, %i, %d, %w"),
    ("combine %h2, %i, %d, %g", "group_sum %v, %i, %d, %g"),
    ("dispatch %v, %i, %d", "dispatch %v, %j, %d"),
    ("dispatch %v, %i, %d", "dispatch %v, %i, %b"),
    ("dispatch %v, %i, %d", "dispatch %m, %i, %d"),
    ("dispatch %v, %i, %d", "dispatch %w, %i, %d"),
    ("combine %h2, %i, %d, %g : f32[batch=B, seq=S, embed=4]",
     "mul %v, %d : f32[batch=B, seq=S, embed=4, choice=1]"),
    ("tokens=(batch, seq), experts=2} : i32[batch=B, seq=S, choice=1]",
     "tokens=(batch, seq), experts=2, slots=capacity} : i32[batch=B, seq=S, choice=1]"),
    ("tokens=(batch, seq), experts=2} : i32[batch=B, seq=S, choice=1]",
     "tokens=(batch, seq), experts=2, using=keep} : i32[batch=B, seq=S, choice=1]"),
    ("tokens=(batch, seq), experts=2} : i32[batch=B, seq=S, choice=1]",
     "tokens=batch, experts=2} : i32[batch=B, seq=S, choice=1]"),
    ("assign_slots %i", "assign_slots %w"),
    ("rename %x {axis=seq, to=kv}", "rename %e {axis=seq, to=kv}"),
    ("param %w : f32[expert=2, embed=4]", "param %w : f32[seq=S, embed=4]"),
    ("batch=B", "batch=S"),
    ("cast %c {dtype=f32}", "cast %c2 {dtype=f32}"),
    ("cast %c {dtype=f32}", "sigmoid %c"),
    ("  output other = %y2\n", "  output other = %a\n"),
    ("  output other = %y2\n", "  output other = %w\n"),
    ("  output other = %y2\n", "  output other = %n\n"),
)  # fmt: skip
"""What stands in both graphs, and what makes rows of the text depend on others."""
OF_STEP = (
    ("causal %positions, %key_positions", "causal %key_positions, %positions"),
    ("update_slice %cache.k, %n, %start", "update_slice %k0, %n, %start"),
    ("update_slice %cache.k, %n, %start", "update_slice %cache.k, %n, %first"),
    ("update_slice %cache.k, %n, %start", "update_slice %cache.k, %x, %start"),
    ("%start {axis=kv}", "%start {axis=batch}"),
    ("%n, %start", "%n, %positions"),
    ("  output other = %y2\n", "  output other = %l\n"),
    ("embed=4]\n  output u", "embed=5]\n  output u"),
    ("f32[batch=B, seq=S, embed=4]\n  output u", "f64[batch=B, seq=S, embed=4]\n  output u"),
    ("f32[batch=B, seq=S, embed=4]\n  output u", "f32[batch=B, embed=4, seq=S]\n  output u"),
    ("contract %v, %r", "contract %v, %w"),
    ("  %s = contract %x, %k",
     "  %n3 = rename %x {axis=seq, to=kv} : f32[batch=B, kv=C, embed=4]\n"
     "  %s = contract %x, %n3"),
    ("  output cache.k = %k\n", "  output cache.k = %cache.k\n"),
    ("  output cache.k = %k\n", ""),
    ("  output cache.k = %k\n", "  output cache.k = %n\n"),
    ("  output other = %y2\n", "  output other = %y\n"),
    ("  output other = %y2\n", ""),
    ("  output other = %y2\n", "  output other = %y2\n  output more = %y\n"),
    ("  output other = %y2\n", "  output other = %y2\n  output cache.n = %k\n"),
    ("  input %start", "  input %cache.n : f32[batch=B, kv=C, embed=4]\n  input %start"),
    ("contract %x, %k", "contract %x, %cache.k"),
    ("contract %x, %k", "contract %x, %n"),
    ("contract %o, %v0", "contract %o, %n2"),
    ("cache.k : f32[batch=B, kv=C, embed=4]", "cache.k : f32[batch=B, embed=4, kv=C]"),
    ("input %start : i32[]", "input %begin : i32[]"),
    ("kv=C", "kv=S"),
    ("kv=C", "kv=16"),
    ("softmax %m", "softmax %s"),
    ("scale %s {by=2.0}", "scale %s {by=3.0}"),
    ("param %w : f32[expert=2, embed=4]", "param %w : f64[expert=2, embed=4]"),
    ("param %w : f32[expert=2, embed=4]",
     'param %w : f32[expert=2, embed=4] = source("w" : f32[expert=2, embed=4])'),
    ('source("r"', 'source("s"'),
    ("mul %h, %w", "mul %h, %z0"),
    ("graph g {\n", 'graph g {\n  attr mesh = {"a": 2}\n'),
    ("  %y = combine", "  %p = positions %tokens {axis=seq} : i32[seq=S]\n  %y = combine"),
    ("%u = logsumexp %m", "%u = logsumexp %start"),
)  # fmt: skip
"""What stands in the graph of the step, and what makes it no step of the text."""

RUN = """  %w{} = scan %w {{over=(layer=1), carries=1}} : f32[expert=2, embed=4] {{
    input %a0 : f32[expert=2, embed=4]
    %a1 = {} %a0 : f32[expert=2, embed=4]
    output a = %a1
  }}
"""
OF_SEVERAL = {
    "runs of another body": (
        [("  %h2 = mul", RUN.format(1, "neg") + RUN.format(2, "sigmoid") + "  %h2 = mul"),
         ("mul %h, %w ", "mul %h, %w2 ")],
        [("  %h2 = mul", RUN.format(1, "neg") + RUN.format(2, "neg") + "  %h2 = mul"),
         ("mul %h, %w ", "mul %h, %w2 ")],
    ),
    "a cache that is written twice": (
        [],
        [("update_slice %cache.k,", "update_slice %cache.v,"), ("  output cache.k = %k\n", ""),
         ("  input %cache.k : f32[batch=B, kv=C, embed=4]\n", "")],
    ),
    "old keys as new values": (
        [("contract %o, %n2", "contract %o, %n")],
        [("update_slice %cache.v, %n2", "update_slice %cache.v, %k")],
    ),
    "keys as new ones": (
        [("contract %o, %n2", "contract %o, %n")],
        [("cache.k : f32[batch=B, kv=C", "cache.k : f32[batch=B, kv=S"),
         ("%n, %start {axis=kv} : f32[batch=B, kv=C", "%n, %start {axis=kv} : f32[batch=B, kv=S"),
         ("update_slice %cache.v, %n2", "update_slice %cache.v, %k"),
         ("contract %x, %k", "contract %x, %v0")],
    ),
    "a text on a mesh": ([("graph g {\n", 'graph g {\n  attr mesh = {"a": 2}\n')], []),
}  # fmt: skip
"""Changes of the text and of the step."""

ALONE = {"exact": True, "frozen": [["%w"], ["%w"]], "parts": [TEXT], "step": False}
"""Fields that no log of a step has."""


def step_log(before: str, after: str, fields: dict[str, Any] | None = None) -> Proof:
    """Return a log of a step."""
    return log_of(
        before,
        after,
        {"step": True, "outputs": ["other", "past", "rule", "u", "y"], **(fields or {})},
    )


def wrong_steps() -> Iterator[tuple[str, Proof]]:
    """Yield what is wrong and a log of a step that proves nothing."""
    for old, new in OF_BOTH:
        assert min(TEXT.count(old), STEP.count(old)) > 0, old
        yield f"{new} for {old}", step_log(TEXT.replace(old, new), STEP.replace(old, new))
    for old, new in OF_STEP:
        assert old in STEP, old
        assert STEP.replace(old, new) != STEP, old
        yield f"{new} for {old} in the step", step_log(TEXT, STEP.replace(old, new))
    for name, changes in OF_SEVERAL.items():
        texts = [TEXT, STEP]
        for at, pairs in enumerate(changes):
            for old, new in pairs:
                texts[at] = texts[at].replace(old, new)
        yield name, step_log(*texts)
    outputs = "  output u = %u\n  output past = %past\n  output y = %y\n  output other = %y2\n"
    outputs += "  output rule = %rule\n"
    yield "no output", step_log(TEXT, STEP.replace(outputs, ""), {"outputs": []})
    for key, value in ALONE.items():
        yield f"a step with {key}", step_log(TEXT, STEP, {key: value})
    for outputs in ([], ["y"], ["other", "past", "u", "y", "cache.k"]):
        yield f"outputs {outputs}", step_log(TEXT, STEP, {"outputs": outputs})
    yield "a text as its step", step_log(TEXT, TEXT)
    yield "a step of a step", step_log(STEP, STEP)


def misjudged_steps(checker: Any) -> Iterator[str]:
    """Yield the logs of steps that a checker judges in another way than it should."""
    if not is_accepted(checker, step_log(TEXT, STEP)):
        yield "refuses a step"
    for name, log in wrong_steps():
        if is_accepted(checker, log):
            yield f"accepts {name}"
