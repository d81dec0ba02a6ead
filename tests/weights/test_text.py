"""The text of weight expressions, and what is said about text that is not one."""

import pytest

from moecc.support.scan import ParseError
from moecc.types import BF16, F32, tensor
from moecc.weights.arithmetic import Cast, Moment, Scale
from moecc.weights.draws import Normal, Uniform
from moecc.weights.expr import MAX_DEPTH, Full, Source
from moecc.weights.movement import (
    Permute,
    Split,
    Stack,
    Tile,
)
from moecc.weights.text import parse_expr

W = Source("model.up.weight", tensor(BF16, mlp=6, embed=4))
TEXT = 'source("model.up.weight" : bf16[mlp=6, embed=4])'
F = tensor(F32, expert=2)

EXAMPLES = [
    (W, TEXT),
    (Tile(W, "expert", 8, 1), f"tile({TEXT}, expert=8, position=1)"),
    (Tile(W, "position", 8, 1), f"tile({TEXT}, position=8, position=1)"),
    (Stack((W,), "axis", 2), f"stack({TEXT}, axis=axis, position=2)"),
    (
        Stack(tuple(Source(f"l.{i}.w", W.type) for i in (3, 5)), "layer", 1),
        'each(layer=3..5..2, source("l.{layer}.w" : bf16[mlp=6, embed=4]), position=1)',
    ),
    (
        Stack(
            tuple(
                Stack(tuple(Source(f"{i}, {j})", W.type) for j in (0, 1)), "expert")
                for i in range(11)
            ),
            "layer",
        ),
        'each(layer=0..10, each(expert=0..1, source("{layer}, {expert})" : bf16[mlp=6, embed=4])))',
    ),
    (
        Stack(tuple(Source(f"a{i}b{2 * i}", tensor(F32)) for i in (1, 2)), "layer"),
        'stack(source("a1b2" : f32[]), source("a2b4" : f32[]), axis=layer)',
    ),
    (
        Stack(tuple(Source(f"{{layer}}{i}", tensor(F32)) for i in (1, 2)), "layer"),
        'stack(source("{layer}1" : f32[]), source("{layer}2" : f32[]), axis=layer)',
    ),
    (Split(W, "mlp", (("g", 2), ("mlp", 3))), f"split({TEXT}, mlp=(g=2, mlp=3))"),
    (Permute(W, ("embed", "mlp")), f"permute({TEXT}, (embed, mlp))"),
    (Scale(W, 2**0.5), f"scale({TEXT}, 1.4142135623730951)"),
    (Cast(W, F32), f"cast({TEXT}, f32)"),
    (Moment("mean", W), f"mean({TEXT})"),
    (Full(-0.0, F), "full(-0.0 : f32[expert=2])"),
    (Normal(F, 0.02, 0, -1.5), "normal(f32[expert=2], std=0.02, mean=-1.5, key=0x0)"),
    (
        Uniform(F, -0.5, 1e22, 2**128 - 1),
        f"uniform(f32[expert=2], low=-0.5, high=1e+22, key=0x{'f' * 32})",
    ),
]


@pytest.mark.parametrize(("expr", "text"), EXAMPLES)
def test_each_kind_reads_well_and_comes_back(expr, text):
    assert str(expr) == text
    assert parse_expr(text) == (expr, len(text))


@pytest.mark.parametrize(
    ("text", "message", "at"),
    [
        ("", "expected an expression such as source(…), found the end of the text", 0),
        ("  tyle(1)", "unknown weight expression 'tyle'", 2),
        ("tile", "expected (, found the end of the text", 4),
        (f"tile({TEXT}, expert=)", "expected a whole number, found ')'", len(TEXT) + 14),
        (f"tile({TEXT}, expert=8", "expected ), found the end of the text", len(TEXT) + 15),
        ('source("a : f32[])', "expected a string in double quotes", 7),
        ('source("\\x" : f32[])', "not a string", 7),
        ('source("a" : f33[])', "unknown element type", 13),
        ('source("a" : f32[a=1, a=2])', "two axes have the same name", 13),
        ('source("a" : f32[a=ragged(%p)])', "fixed sizes only", 13),
        ('source("a" : f32)', "expected a type such as f32[mlp=8]", 13),
        ("full(1e999 : f32[])", "too large", 5),
        ("full(nan : f32[])", "expected a number", 5),
        ('cast(source("a" : f32[]), f31)', "unknown element type 'f31'", 26),
        ("normal(f32[], std=1, key=31)", "expected a key", 25),
        (f"normal(f32[], std=1, key=0x{'1' * 33})", "expected a key", 25),
        ("normal(f32[], key=0x1)", "expected std=", 14),
        ('each(a=0..2, source("{a}" : f33[]))', ": f33[])': unknown element type", 13),
        ("each(a=0..2, full(1.0 : f32[]) x)", "in 'full(1.0 : f32[]) x': more than one", 13),
        ("each(a=2..1, full({a} : f32[]))", "a range must rise in equal steps", 7),
        ("each(a=0..2..3, full({a} : f32[]))", "a range must rise in equal steps", 7),
        ("each(a=0, full({a} : f32[]))", "expected a range, 0..29", 7),
        ("each(a=0..999999999, full({a} : f32[]))", "expands to more than 100,000", 7),
        ("each(a=0..999, each(b=0..999, full({a} : f32[])))", "more than 100,000", 15),
        ("each(a=0..2, full({a} : f32[])", "expected ), found the end of the text", 30),
        ('index(source("a" : f32[a=4]), a=1234567890123456789)', "a whole number", 32),
    ],
)
def test_wrong_text_is_pointed_at(text, message, at):
    with pytest.raises(ParseError) as caught:
        parse_expr(text)
    assert message in str(caught.value)
    assert caught.value.offset == at


@pytest.mark.parametrize("count", [MAX_DEPTH, 100_000])
def test_deep_text_is_refused(count):
    text = "scale(" * count + TEXT + ", 3.0)" * count
    with pytest.raises(ParseError, match="nests deeper"):
        parse_expr(text)


@pytest.mark.parametrize(
    "body",
    [
        'source("layers.{layer}.w" : f32[mlp=6])',
        'each(expert=0..2, source("layers.{layer}.experts.{expert}.w" : f32[mlp=6]))',
        'add(source("a" : f32[mlp=6]), scale(source("{layer}.{layer}" : f32[mlp=6]), 2.0))',
        "normal(f32[mlp=6], std=0.1, key=0x{layer})",
        'source("layers.\\u007blayer}.w" : f32[mlp=6])',
    ],
)
def test_each_is_the_stack_of_its_texts(body):
    texts = ", ".join(body.replace("{layer}", str(number)) for number in (1, 3, 5))
    expanded, _ = parse_expr(f"each(layer=1..5..2, {body})")
    assert expanded is parse_expr(f"stack({texts}, axis=layer)")[0]
