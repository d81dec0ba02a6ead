"""Records read and written by their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest

from moecc.errors import SHOWN_PROBLEMS, InputError
from moecc.support.record import (
    Check,
    Count,
    RecordReader,
    read_record,
    stored,
    to_json,
    toml_reader,
)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    name: str = "origin"


@dataclass(frozen=True, kw_only=True)
class Picture:
    schema: str = "picture/2"
    size: Count
    colour: Colour = Colour.RED
    mode: Literal["flat", 3] = "flat"
    points: tuple[Point, ...] = ()
    named: Mapping[Annotated[str, Check(str.isalpha, "letters")], Point] = field(
        default_factory=dict, metadata=stored(omit_default=True)
    )
    above: Point | None = field(default=None, metadata=stored(key="class"))
    extra: Any = 1


FULL = Picture(
    size=2, colour=Colour.BLUE, mode=3, points=(Point(1.5), Point(2, "b")), named={"a": Point(0)},
    above=Point(3.0), extra=[{"a": None}],
)  # fmt: skip


def read(document: object, **options: Any) -> Picture:
    return read_record(Picture, document, "f", **options)


def test_a_record_is_read_back_as_written():
    document = to_json(FULL)
    assert list(document) == [
        "schema", "size", "colour", "mode", "points", "named", "class", "extra"
    ]  # fmt: skip
    assert document["colour"] == "blue"
    assert type(document["colour"]) is str
    assert read(document) == FULL
    small = Picture(size=0)
    assert "named" not in to_json(small)
    assert to_json(small)["class"] is None
    assert read(to_json(small)) == small


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"size": None}, "size: a value of another type"),
        ({"size": True}, "size: a value of another type"),
        ({"size": -1}, "size: a wrong value\n  expected: a whole number, 0 or more"),
        ({"size": 1 << 63}, "size: too large"),
        ({"colour": "rod"}, "colour: no such choice\n  expected: red | blue"),
        ({"mode": True}, "mode: no such choice"),
        ({"mode": 3.0}, "mode: no such choice"),
        ({"points": {}}, "points: not a list"),
        ({"points": [{"x": 1}, {"x": "1"}]}, "points.1.x: a value of another type"),
        ({"points": [{}]}, "points.0.x: a key is missing"),
        ({"points": [{"x": float("nan")}]}, "points.0.x: not a finite number"),
        ({"points": [{"x": 1 << 63}]}, "points.0.x: "),
        ({"named": {"7": {"x": 1}}}, "named.7: a wrong value\n  expected: letters"),
        ({"named": [1]}, "named: not an object"),
        ({"above": None}, "above: no such key"),
        ({"class": 1}, "class: not a table"),
        ({"extras": 1}, "extras: no such key\n  hint: did you mean 'extra'?"),
    ],
)
def test_what_is_wrong_is_named_with_its_keys(change, place):
    with pytest.raises(InputError) as caught:
        read({**to_json(FULL), **change})
    (problem,) = caught.value.problems
    assert f"f: {place}" in str(problem)


def test_all_problems_are_reported_at_once_and_in_bounded_length():
    with pytest.raises(InputError) as caught:
        read({"schema": "picture/2", "colour": 1, "points": [{"x": ""}]})
    assert [str(p).split(":")[1].strip() for p in caught.value.problems] == [
        "size", "colour", "points.0.x"
    ]  # fmt: skip
    with pytest.raises(InputError) as caught_many:
        read({**to_json(FULL), "points": [1] * 1000})
    assert len(caught_many.value.problems) == SHOWN_PROBLEMS + 1
    assert "and 800 more problems" in str(caught_many.value.problems[-1])


@pytest.mark.parametrize("schema", [None, "picture/1", 2, True])
def test_another_version_is_the_only_problem(schema):
    with pytest.raises(InputError, match='expected: "schema": "picture/2"') as caught:
        read({"schema": schema, "colour": 1})
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError):
        read([])
    assert read({"schema": "picture/1", "size": 1}, versions=("picture/1",)).schema == "picture/1"


def test_a_field_that_is_wrong_has_its_default_and_what_is_right_is_kept():
    reader = RecordReader(lambda path: "f")
    document = {"schema": "", "colour": "blue", "mode": 4, "class": {"x": "", "name": "n"}}
    picture = reader.section(Picture, document)
    assert (picture.size, picture.colour, picture.mode) == (0, Colour.BLUE, "flat")
    assert picture.above is None
    assert [path for path, _ in reader.problems] == [("size",), ("mode",), ("class", "x")]


def test_problems_of_toml_have_lines():
    table, reader = toml_reader("size = 1\n[[points]]\nx = 1\n[[points]]\nx = 'a'\n", "f.toml")
    reader.section(Picture, table)
    with pytest.raises(InputError, match=r"f\.toml:5: points\.1\.x: "):
        reader.raise_if_any()
