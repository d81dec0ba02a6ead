"""Patterns of strangers: what `re` matches, in linear time, or no pattern."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.formats.adapter import LONGEST, UnsupportedPattern, parse_pattern

ATOMS = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "1", "^", "$"]


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.sampled_from(["(", "(?:"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.builds("{}{}|{})".format, group, inner, inner),
        st.builds("{}{}){}".format, group, inner, st.sampled_from(["", "*", "+", "?"])),
    )


SIMPLE = st.builds(
    "{}{}".format, st.sampled_from(ATOMS[:-2]), st.sampled_from(["", "", "*", "+", "?"])
)
PATTERNS = st.recursive(st.sampled_from(ATOMS) | SIMPLE, grown, max_leaves=6)


@given(PATTERNS, st.text("ab1.", max_size=6))
def test_what_is_matched_is_what_re_matches(pattern, name):
    try:
        parsed = parse_pattern(pattern)
    except UnsupportedPattern:
        assert re.search(r"[*+?]\)?.*[*+]", pattern)
        return
    # As PEFT looks a module up.
    assert parsed.matches(name) == bool(re.fullmatch(rf"(.*\.)?({pattern})", name))


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("q_proj", "model.layers.3.self_attn.q_proj", True),
        ("proj", "model.layers.3.self_attn.q_proj", False),
        ("self_attn.q_proj", "model.layers.3.self_attn.q_proj", True),
        (r"model\.layers\.(1|3)\..*\.(q|k)_proj", "model.layers.3.self_attn.q_proj", True),
        (r"layers\.\d+\.mlp\.experts\.\d+\.w1", "model.layers.11.mlp.experts.7.w1", True),
        (r"layers.[0-4].mlp", "model.layers.5.mlp", False),
        ("", "a.", True),
    ],
)
def test_names_of_modules(pattern, name, is_match):
    assert parse_pattern(pattern).matches(name) is is_match


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(a*)*", "(?=a)a", r"(a)\1", "a{2,9}", "a*?", "a++", "*a", "(a", "a)", "[a",
        "[b-a]", "(?P<x>a)", "\\", "a" * (LONGEST + 1), "(" * 200 + "a" + ")" * 200,
    ],
)  # fmt: skip
def test_what_may_backtrack_or_is_no_pattern_is_refused(pattern):
    with pytest.raises(UnsupportedPattern):
        parse_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(a|a)" * 150 + "b", "a?" * 400 + "b", ".*a" * 200 + "b"])
def test_a_pattern_takes_no_longer_than_its_length(pattern):
    name = "a" * 300
    started = time.process_time()
    assert not parse_pattern(pattern).matches(name)
    assert time.process_time() - started < 5.0
