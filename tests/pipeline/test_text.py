"""Pipeline strings: what they mean, how they print, and what is said of faulty ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import UsageError
from moecc.rewrite.pipeline import Pipeline

from .samples import REGISTRY, EveryKindPass, TopPass, UnNegPass

whole = st.integers(-(10**15), 10**15)
number = st.floats(allow_nan=False)
text = st.text(max_size=8) | st.sampled_from(
    ("none", "true", "3", "1e5", "()", "auto", "a,b", "a b", '"', "\\", "}", "{", "=", ",", "x=y")
)
# What a tuple of numbers would be read from belongs to the tuple.
layers = st.lists(whole, max_size=3).map(tuple) | st.sampled_from(
    ("all", "every:4", "first:half", "layers.1*.ffn", "a,b", "two words")
)
every_kind = st.builds(
    EveryKindPass,
    count=whole,
    share=number,
    flag=st.booleans(),
    on=st.booleans(),
    word=text,
    kind=st.sampled_from(("copy", "noise", "drop-half")),
    numbers=st.lists(whole, max_size=3).map(tuple),
    words=st.lists(text, max_size=3).map(tuple),
    pair=st.tuples(whole, number),
    maybe=st.none() | whole,
    maybe_word=st.none() | text,
    auto=st.just("auto") | number,
    layers=layers,
)
passes = every_kind | st.builds(TopPass) | st.builds(UnNegPass)
pipelines = st.lists(passes, max_size=3).map(lambda p: Pipeline(tuple(p)))


def parse(source):
    return Pipeline.parse(source, REGISTRY)


@given(pipeline=pipelines)
def test_prints_back(pipeline):
    again = parse(str(pipeline))
    assert again == pipeline
    assert str(again) == str(pipeline)


@given(source=st.text(alphabet='every-kindtop{}=, "count12\\\n', max_size=40))
def test_any_text_parses_or_is_refused_with_its_places(source):
    try:
        pipeline = parse(source)
    except UsageError:
        assert all(p.startswith("pipeline:") and "^" in p for p in problems(source))
    else:
        assert parse(str(pipeline)) == pipeline


def test_examples():
    source = "un-neg,every-kind{count=3 share=1e-05 layers=3,7,11 flag on=false maybe-word=none}"
    pipeline = parse(source)
    assert pipeline.passes == (
        UnNegPass(),
        EveryKindPass(3, share=1e-5, layers=(3, 7, 11), flag=True, on=False, maybe_word=None),
    )
    assert str(pipeline) == "un-neg,every-kind{count=3 share=1e-05 flag on=false layers=3,7,11}"
    assert len(pipeline) == 2
    assert list(pipeline) == list(pipeline.passes)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("share=-.5", -0.5),
        ("share=inf", float("inf")),
        ("layers=3", (3,)),
        ('layers="3"', "3"),
        ("layers=()", ()),
        ('word="two words"', "two words"),
        ("word=()", "()"),
        ('words=a,"b,c",d', ("a", "b,c", "d")),
        ("auto=auto", "auto"),
        ('maybe-word="none"', "none"),
        ("pair=3,4", (3, 4.0)),
    ],
)
def test_values(option, expected):
    (item,) = parse(f"every-kind{{count=1 {option}}}")
    name, _, _ = option.partition("=")
    value = getattr(item, name.replace("-", "_"))
    assert value == expected
    assert type(value) is type(expected)


def problems(source):
    with pytest.raises(UsageError) as caught:
        parse(source)
    return [str(p) for p in caught.value.problems]


def test_every_problem_at_once_with_its_place():
    found = problems(
        "un-nog,top{top_k=2 experts=many},every-kind{flag=maybe},top{experts=3 top-k=4}"
    )
    heads = [line.splitlines()[0] for line in found]
    assert heads == [
        "pipeline:1:1: unknown pass 'un-nog'",
        "pipeline:1:12: top has no option 'top_k'",
        "pipeline:1:20: option 'experts' has a value of another type",
        "pipeline:1:45: option 'flag' has a value of another type",
        "pipeline:1:34: every-kind needs the option 'count'",
        "pipeline:1:71: more choices than experts",
        "pipeline:1:57: an odd number of experts",
    ]
    assert "did you mean 'un-neg'" in found[0]
    assert "did you mean 'top-k'" in found[1]
    assert "expected: a whole number\n  found: many" in found[2]
    assert "hint: experts=16" in found[5]
    lines = found[5].splitlines()
    assert lines[1][lines[2].index("^")] == "t"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("top{", "expected the name of an option, or }, found the end of the text"),
        ("top}", "expected a comma before the next pass, found '}'"),
        ("top,", "expected the name of a pass, found the end of the text"),
        ("top{experts=}", "expected a value, found '}'"),
        ("top{experts=1,,2}", "expected a value without spaces, or in quotes, found ','"),
        ('top{experts="1}', "expected a value, found '\"'"),
        ("top{experts:1}", "expected =, a space or }, found ':'"),
        ("top top", "expected a comma before the next pass, found 'top'"),
        ("top{experts=1 experts=2}", "option 'experts' is defined twice"),
        ("every-kind{count}", "found: no value"),
        ("every-kind{count=1 kind=nois}", "did you mean 'noise'"),
        ("every-kind{count=1 auto=fast}", "one of auto or a number"),
        ("every-kind{count=1.5}", "expected: a whole number"),
        ("every-kind{count=1 numbers=1,b}", "a list, separated by commas, each a whole number"),
        ("every-kind{count=1 pair=1}", "2 values separated by commas: a whole number, a number"),
        ("every-kind{count=1 share=nan}", "expected: a number"),
    ],
)
def test_faulty(source, expected):
    assert any(expected in p for p in problems(source))


def test_control_characters_are_shown_escaped():
    assert not any("\x1b" in found for found in problems("un-neg{\x1b}"))
