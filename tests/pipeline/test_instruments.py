"""What the instruments show."""

import io
import re

import pytest

from moecc.ir import equal, parse
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import (
    DiffAfter,
    DumpFolder,
    PrintAfter,
    Remarks,
    StatisticsTable,
    Timing,
    run_pipeline,
)

from .samples import REGISTRY, negations


def shown(make, text, negated=4, registry=REGISTRY):
    stream = io.StringIO()
    pipeline = Pipeline.parse(text, registry)
    context = Context(allow_unmatched=True)
    run_pipeline(negations(negated), pipeline, context=context, instruments=[make(stream)])
    return stream.getvalue()


PIPELINE = "un-neg,top,scale-output{by=2.0}"


@pytest.mark.parametrize(
    ("which", "titles"),
    [
        ("all", ["1 un-neg", "2 top", "3 scale-output{by=2.0}"]),
        ("changed", ["1 un-neg", "3 scale-output{by=2.0}"]),
        (frozenset({"top"}), ["2 top"]),
    ],
)
def test_print_after(which, titles):
    text = shown(lambda s: PrintAfter(which, s), PIPELINE)
    assert re.findall("# after pass (.*)", text) == titles
    for graph in re.split("(?m)^# after pass .*\n", text)[1:]:
        parse(graph)


def test_dump_folder(tmp_path):
    folder = tmp_path / "deep" / "dump"
    shown(lambda _: DumpFolder(folder), PIPELINE)
    names = ["000_input.moe", "001_un-neg.moe", "002_top.moe", "003_scale-output.moe"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert equal(parse((folder / names[0]).read_text("utf-8")), negations())
    assert len(parse((folder / names[3]).read_text("utf-8"))) == 2


def test_dump_folder_deletes_only_what_it_recognises(tmp_path):
    shown(lambda _: DumpFolder(tmp_path), PIPELINE)
    kept = ["001_mine.moe", "notes.txt", "000_input.moe.orig"]
    for name in kept:
        (tmp_path / name).write_text("moecc 1\n", encoding="utf-8")
    (tmp_path / "004_folder.moe").mkdir()
    shown(lambda _: DumpFolder(tmp_path), "top")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted([*kept, "004_folder.moe", "000_input.moe", "001_top.moe"])


def test_timing():
    lines = shown(Timing, PIPELINE).splitlines()
    assert lines[0].split() == ["pass", "seconds", "verify", "share"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "total"]
    *passes, total = [re.findall(r"[\d.]+", line)[-3:] for line in lines[1:]]
    columns = [sum(map(float, column)) for column in zip(*passes, strict=True)]
    assert [float(cell) for cell in total] == [pytest.approx(s, abs=2e-4) for s in columns[:2]] + [
        100
    ]
    assert 98 <= columns[2] <= 102


def test_diff():
    text = shown(DiffAfter, PIPELINE)
    assert text.startswith("--- input\n+++ 1 un-neg\n")
    assert "-  %v2 = neg %v1" in text
    assert text.count("2 top") == 1, "what changes nothing has no difference to show"
    assert "--- 2 top\n+++ 3 scale-output{by=2.0}\n" in text
    assert "+  %v5 = scale %v {by=2.0}" in text


def test_statistics():
    text = shown(StatisticsTable, PIPELINE)
    assert "pass 1 un-neg: changed, 2 matched\n" in text
    assert re.search(r"pair +2 hits +\d+ attempts +[\d.]+ ms", text)
    assert "pass 2 top: unchanged, 0 matched\n" in text


def test_remarks_and_near_misses():
    text = shown(Remarks, "un-neg,bad{way=miss}", negated=1)
    assert text.startswith("remark: un-neg: here: looked around\n")
    assert "missed: un-neg: pair: not at %v1 = neg @layers.0: %v is defined by silu" in text
    assert text.count("missed: bad: ffn") == 7


def test_a_pass_that_matches_nothing_has_a_reason():
    assert shown(Remarks, "top") == "missed: top: no candidate\n"
    # Its nearest miss, although only the root of the pattern matched.
    assert shown(Remarks, "canonicalize", 1, registry=None) == (
        "missed: canonicalize: double-neg: not at %v1 = neg @layers.0: "
        "%v is defined by silu @layers.0, expected neg\n"
    )
