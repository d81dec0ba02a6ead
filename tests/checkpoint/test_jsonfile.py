import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.formats.files import read_json_object
from moecc.support.documents import MAX_DEPTH, MAX_VALUES, parse_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON, st.sampled_from([None, 2]))
def test_what_json_writes_is_read_back(value, indent):
    assert parse_json(json.dumps(value, indent=indent).encode(), "x") == value


LONG = "1" * 5000
PIECES = ["{", "}", "[", "]", "]]]", ",", ":", '"a"', '"\\ud800"', LONG, f"-{LONG}", "NaN", "1e999"]
PIECES += ["0", "-", "tru", "null", '"', "\\", " ", "\n", "\0", "\ufeff", "[" * 70, '{"a":' * 70]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_hostile_pieces_give_a_value_or_an_input_error(text):
    try:
        value = parse_json(text.encode(), "x")
    except InputError:
        return
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": 1,\n "a": 2}', "x:2:2: the key 'a' appears twice"),
        ('{"b": {"a": 1, "c": [], "a": 1}}', "x:1:25: the key 'a' appears twice"),
        ('{"a": 1, "\\u0061": 2}', "x:1:10: the key 'a' appears twice"),
        ('{"a":\n NaN}', "x:2:2: NaN is not"),
        ('{"a": [1, -Infinity]}', "x:1:11: -Infinity is not"),
        ('{"a": 1e400}', 'x:1:7: the number "1e400" is not finite'),
        ('{"a": ' + "1" * 5000 + "}", "x:1:7: a number of 5,000 digits"),
        ('{"a": ' + "1" * 5000, "x:1:5007: not JSON"),
        ('{"a": ' + "1" * 5000 + "]]]", "x:1:5007: not JSON"),
        ('{"a": 1', "x:1:8: not JSON"),
        ('{"a": 1} x', "x:1:10: not JSON"),
        ('{"a": "\x01"}', "x:1:8: not JSON"),
        ("\ufeff{}", "x:1:1: not JSON"),
        ("", "x:1:1: not JSON"),
    ],
)
def test_a_fault_is_reported_with_line_and_column(text, place):
    with pytest.raises(InputError) as caught:
        parse_json(text.encode(), "x")
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused_quickly(opening):
    closing = "]" if opening == "[" else "}"
    started = time.process_time()
    for depth in (MAX_DEPTH + 1, 100_000):
        text = opening * depth + "1" + closing * depth
        with pytest.raises(InputError, match="nested more than 64 levels"):
            parse_json(text.encode(), "x")
    text = opening * MAX_DEPTH + "1" + closing * MAX_DEPTH
    assert parse_json(text.encode(), "x")
    assert time.process_time() - started < 2


def test_a_file_is_bounded_and_must_be_an_object(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert read_json_object(file, limit_bytes=8) == {"a": 1}
    with pytest.raises(InputError, match=r"too large.*\n  expected: at most 7 bytes"):
        read_json_object(file, limit_bytes=7)
    file.write_text("[1, 2]")
    with pytest.raises(InputError, match="a list of 2 values"):
        read_json_object(file, limit_bytes=100)


def test_a_long_text_is_refused_without_places_but_quickly():
    text = b'{"a": 1, "x": "' + b"x" * (8 << 20) + b'", "b": NaN, "c": 1e999, "a": 2}'
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        parse_json(text, "x")
    assert time.process_time() - started < 1
    assert [str(problem).split("\n")[0] for problem in caught.value.problems] == [
        "x: NaN is not a JSON number",
        'x: the number "1e999" is not finite',
        "x: the key 'a' appears twice in one object",
    ]


@pytest.mark.parametrize("value", ["{}", "1", "[]"])
def test_values_that_would_fill_the_memory_are_refused(value):
    text = "[" + ",".join([value] * (MAX_VALUES + 1)) + "]"
    with pytest.raises(InputError, match="too many JSON values"):
        parse_json(text.encode(), "x")
