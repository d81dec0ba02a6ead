"""Small logs by hand: one that is a proof, and others that are none."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from .corruptions import Proof, is_accepted

TEXT = """moecc 1
graph g {{
  input %x : f32[a=2, b=3]
{}
  output y = %y
}}
"""
BEFORE = TEXT.format("  %y = scale %x {by=2.0} : f32[a=2, b=3]")
JOINED = """moecc 1
graph g {{
  input %s : f32[]
  input %v : f32[a=2]
  input %w : f32[a=4]
  %x = broadcast %s, %w : f32[a=4]
  %z = broadcast %s, %v : f32[a=2]
  %y = join %v, {} {{axis=a, parts=2}} : f32[a=4]
  output y = %y
}}
"""
AFTER = TEXT.format("  %y = add %x, %x : f32[a=2, b=3]")


def log_of(before: str, after: str, fields: dict[str, Any] | None = None) -> Proof:
    """Return a log without steps of two texts, and with some fields."""
    log = {
        "schema": "moecc.proof/1",
        "exact": False,
        "rolled": False,
        "fractions": False,
        "before": sha256(before.encode()).hexdigest(),
        "after": sha256(after.encode()).hexdigest(),
        "terms": [],
        "outputs": ["y"],
        "lemmas": {},
        "steps": [],
    }
    return {**log, **(fields or {})}, before, after


CUT = {
    "terms": [["sum", []]],
    "steps": [["cut factor", 0, ["group"]]],
    "lemmas": {"cut factor": 1},
}
WINDOW = """moecc 1
graph g {{
  input %x : f32[seq=S, key=S]
  %v = rename %x {{axis={old}, to={new}}} : f32[{axes}]
  %p = positions %v {{axis={axis}}} : i32[{axis}=S]
  %k = positions %v {{axis={keys}}} : i32[{keys}=S]
  %n = constant {{value={width}.0, dtype=i32}} : i32[]
  %q = add %p, %n : i32[{axis}=S]
  %s = causal %q, %k {{window=5}} : pred[{axis}=S, {keys}=S]
  %m = mask %v, %s : f32[{axes}]
  %z = softmax %m {{axis={keys}}} : f32[{axes}]
  %y = rename %z {{axis={new}, to={old}}} : f32[seq=S, key=S]
  output y = %y
}}
"""
BY_KEY = {"old": "key", "new": "a", "axes": "seq=S, a=S", "axis": "seq", "keys": "a", "width": 2}
BY_QUERY = {"old": "seq", "new": "b", "axes": "b=S, key=S", "axis": "b", "keys": "key", "width": 2}
"""Ways to name the axes of two positions of which each is within two of the other."""

TRANSPOSED = """moecc 1
graph g {{
  input %x : f32[a=4, b=4]
  %u = rename %x {{axis=a, to=c}} : f32[c=4, b=4]
  %v = rename %u {{axis=b, to=a}} : f32[c=4, a=4]
  %t = rename %v {{axis=c, to=b}} : f32[b=4, a=4]
  %m = mul {} : f32[a=4, b=4]
  %s = tanh %m : f32[a=4, b=4]
  %y = mul %s, %{} : f32[a=4, b=4]
  output y = %y
}}
"""

CAST = """moecc 1
graph g {{
  input %x : f32[a=2, b=3]
  input %k : pred[a=2, b=3]
  %v = mul %x, %x : f32[a=2, b=3]
{}
  %y = cast %m {{dtype=f32}} : f32[a=2, b=3]
  output y = %y
}}
"""
NARROW = "  %m = mask %v, %k {fill=-inf} : f32[a=2, b=3]"
WIDE = """  %d = cast %v {dtype=f64} : f64[a=2, b=3]
  %m = mask %d, %k {fill=-inf} : f64[a=2, b=3]"""

OWN = """moecc 1
graph g {{
  input %x : bf16[a=2, b=3]
  input %z : bf16[a=2, b=3]
  {} : {}[a=2, b=3]
  %y = {} : f32[a=2, b=3]
  output y = %y
}}
"""
WIDENED = OWN.format("%w = cast %x {dtype=f32}", "f32", "own %w")
"""An operation of the user's own, at one element type and at another."""


def exchanged(op: str, *rest: str) -> tuple[str, str]:
    """Return two texts with an operation on operands in both orders, and on the rest."""
    orders = (("x", "z"), ("z", "x"))
    lines = (f"%w = {op} {', '.join(f'%{v}' for v in (*order, *rest))}" for order in orders)
    first, second = (OWN.format(line, "bf16", "cast %w {dtype=f32}") for line in lines)
    return first, second


EXACT, COMMUTATIVE = {"exact": True}, {"commutative": ["own"]}

PROOFS = [
    log_of(WIDENED, WIDENED, {"elementwise": ["own"]}),
    log_of(*exchanged("own"), COMMUTATIVE),
    log_of(*exchanged("add"), EXACT),
    log_of(BEFORE, AFTER),
    log_of(BEFORE, AFTER, CUT),
    log_of(WINDOW.format(**BY_KEY), WINDOW.format(**BY_QUERY)),
    log_of(TRANSPOSED.format("%x, %t", "x"), TRANSPOSED.format("%t, %x", "x")),
]

ROWS: dict[str, list[Any]] = {
    "of no kind": [["sum", []], ["sort", [], 0]],
    "a variable of no size": [["variable", "i", 0]],
    "a variable of a fraction": [["variable", "i", 1.5]],
    "a sum of a sum": [["sum", []], ["sum", [["1", 0]]]],
    "a product over a sum": [["sum", []], ["product", [0], []]],
    "a product of a sum": [["sum", []], ["product", [], [0]]],
    "a function of a sum": [["sum", []], ["function", [0], 0]],
    "a function to a product": [["product", [], []], ["function", [], 0]],
    "a remainder by no number": [["sum", []], ["apply", "mod", [-3], [], [0]]],
    "a remainder by a fraction": [["sum", []], ["apply", "mod", [2.5], [], [0]]],
    "a quotient by 0": [["sum", []], ["apply", "div", [0], [], [0]]],
    "a permutation of nothing": [["sum", []], ["apply", "permutation", ["S"], [], [0]]],
    "choices of other sizes": [
        ["sum", []],
        ["variable", "i", 8],
        ["function", [1], 0],
        ["apply", "experts", [4, 2, "logits"], [2], [0]],
    ],
    "a function as an argument": [
        ["sum", []],
        ["function", [], 0],
        ["apply", "silu", [], [], [1]],
    ],
    "an argument as a function": [["sum", []], ["apply", "max", [], [0], []]],
}
"""Rows that are no terms."""


def unlike_moecc() -> dict[str, str]:
    """Return texts of which moecc reads more, or another number, than a line shows."""
    behind = "%y = add %x, %x : f32[a=2, b=3] @l by p output z = %x"
    scales = [f"%{n} = scale %x {{by={2**53 + n}}} : f32[a=2, b=3]" for n in (1, 3)]
    digits = "\n  ".join((*scales, "%y = sub %3, %1 : f32[a=2, b=3]"))
    return {
        "a statement behind an origin": TEXT.format(f"  {behind}"),
        "a statement behind a name": AFTER.replace("graph g {", "graph g { output z = %y #"),
        "a mesh without blanks": AFTER.replace("  input", '  attr mesh={"m": 2}\n  input'),
        "a note twice": AFTER.replace("  input", "  attr n = 1\n  attr n = 2\n  input"),
        "digits that a float lacks": TEXT.format(f"  {digits}"),
    }


def weighted(weight: str, *lines: str) -> str:
    """Return the text of a product with a weight, after further lines."""
    types = "f32[a=2, b=3]"
    product = f"%y = mul %x, %{'v' if lines else 'w'} : {types}"
    return TEXT.format(
        "\n".join(f"  {x}" for x in (f"param %w : {types} = {weight}", *lines, product))
    )


def ordered(*layers: int) -> str:
    """Return a stack of vectors, each in the order of neurons of a layer."""

    def source(name: str) -> str:
        return f'source("{name}" : f32[b=3])'

    vectors = [
        f"take({source(f'x{at}')}, b=aligned({source(f'p{n}')}, {source(f'q{n}')}, axis=b))"
        for at, n in enumerate(layers)
    ]
    return f"stack({', '.join(vectors)}, axis=a)"


def wrong_logs() -> Iterator[tuple[str, Proof]]:
    """Yield what is wrong and a log that is no proof."""
    for name, rows in ROWS.items():
        yield name, log_of(BEFORE, AFTER, {"terms": rows})
    for key in ("before", "after"):
        yield f"another {key}", log_of(BEFORE, AFTER, {key: "0" * 64})
    yield "another schema", log_of(BEFORE, AFTER, {"schema": "moecc.proof/0"})
    yield "another count", log_of(BEFORE, AFTER, {"lemmas": {"range": 1}})
    yield "no output", log_of(BEFORE, AFTER, {"outputs": []})
    yield "another output", log_of(BEFORE, AFTER, {"outputs": ["y", "z"]})
    steps = {"terms": [["product", [], []]], "steps": [["sort", 0, []]], "lemmas": {"sort": 1}}
    yield "no lemma", log_of(BEFORE, AFTER, steps)
    for name, line in {
        "another function": "  %y = scale %x {by=3.0} : f32[a=2, b=3]",
        "another order of axes": "  %y = add %x, %x : f32[b=3, a=2]",
        "another type": "  %y = add %x, %x : f64[a=2, b=3]",
        "a summand": "  %y = add %x, %x : f32[a=2, b=3] unreduced(m)",
        "an attribute of no meaning": "  %y = add %x, %x {by=2.0} : f32[a=2, b=3]",
        "another input": "  input %z : f32[a=2]\n  %y = add %x, %x : f32[a=2, b=3]",
        "axes that are none": "  %y = add %x, %x : f32[a=2, b=4]",
        "a statement that is none": "  sort\n  %y = add %x, %x : f32[a=2, b=3]",
    }.items():
        yield name, log_of(BEFORE, TEXT.format(line))
    narrow = OWN.format("%w = own %x", "bf16", "cast %w {dtype=f32}")
    yield "another element type", log_of(WIDENED, narrow, {"elementwise": ["own"]})
    yield "exchanged operands", log_of(*exchanged("own"))
    yield "exchanged operands of a difference", log_of(*exchanged("sub"), EXACT)
    yield "a difference that commutes", log_of(*exchanged("sub"), {"commutative": ["sub"]})
    yield "exchanged operands of three", log_of(*exchanged("own", "x"), COMMUTATIVE)
    yield "a belief bit for bit", log_of(*exchanged("own"), EXACT | COMMUTATIVE)
    for width in (1, 3):  # a window is to the left of its middle, and the other to the right
        windows = WINDOW.format(**BY_KEY), WINDOW.format(**{**BY_QUERY, "width": width})
        yield f"a window from {width}", log_of(*windows)
    keys = {**BY_QUERY, "axis": "key", "keys": "b"}
    once = TRANSPOSED.format("%x, %t", "x")
    yield "a transposed factor", log_of(once, TRANSPOSED.format("%x, %t", "t"))
    yield "a transposed square", log_of(once, TRANSPOSED.format("%x, %x", "x"))
    yield "shares of queries", log_of(WINDOW.format(**BY_KEY), WINDOW.format(**keys))
    joined = JOINED.format("%x"), JOINED.format("%z")
    yield "a join of chunks of two sizes", log_of(*joined)
    yield "a cast from another type", log_of(CAST.format(NARROW), CAST.format(WIDE))
    summand = TEXT.format("  %y = scale %x {by=2.0} : f32[a=2, b=3] unreduced(m)")
    yield "a summand on no mesh", log_of(summand, summand)
    for name, text in unlike_moecc().items():
        yield name, log_of(BEFORE, text)
    source = 'source("stopped" : f32[a=2, b=3])'
    twin = "%v = stop_gradient %w : f32[a=2, b=3]"
    yield "a tensor named as a mark", log_of(weighted(source), weighted(source, twin))
    yield "the order of another layer", log_of(weighted(ordered(0, 1)), weighted(ordered(0, 0)))
    full, narrow = "full(0.3 : f32[a=2, b=3])", "cast(full(0.3 : f8e5m2[a=2, b=3]), f32)"
    yield "a rounded number", log_of(weighted(full), weighted(narrow), {"fractions": True})
    yield "text after the graph", log_of(BEFORE, AFTER + "}\n")
    yield "a graph without an end", log_of(BEFORE, AFTER[:-2])


def misjudged(checker: Any) -> Iterator[str]:
    """Yield the logs that a checker judges in another way than it should."""
    if not all(is_accepted(checker, log, is_pruned=False) for log in PROOFS):
        yield "refuses a proof"
    for name, log in wrong_logs():
        if is_accepted(checker, log, is_pruned=False):
            yield f"accepts {name}"
