"""The journal holds the same bytes however often a run was resumed."""

from math import inf, nan

import pytest

from moecc.errors import InputError
from moecc.jobs.train import TrainProgress
from moecc.train.events import (
    Evaluated,
    Skipped,
    Stepped,
    guard_faults,
)
from moecc.train.run import Journal, Position, batch_of, cut_back, read_journal


def stepped(step):
    return Stepped(step, {"loss": 1.0 / step, "load": [0.5, 0.5]}, 10 * step, 0.1 * step)


def record(path, events):
    with Journal(path) as journal:
        for event in events:
            journal.record(event)


@pytest.mark.parametrize("rest", [b"", b'{"step":3,"lo', b"\xff", b'{"step":2}'])
def test_a_resumed_run_has_the_bytes_of_one_that_was_not_killed(tmp_path, rest):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    events = [stepped(1), stepped(2), Evaluated(2, {"a": 1.0}), stepped(3)]
    record(whole, events)
    record(killed, events)
    with killed.open("ab") as file:
        file.write(rest)
    cut_back(killed, 2)
    assert len(list(read_journal(killed))) == 3
    record(killed, [stepped(3)])
    assert killed.read_bytes() == whole.read_bytes()


def test_an_evaluation_that_the_checkpoint_lacks_is_made_again(tmp_path):
    journal = tmp_path / "journal"
    record(journal, [stepped(1), Evaluated(1, {"a": 1.0}), stepped(2), Evaluated(2, {"a": 1.0})])
    cut_back(journal, 2, is_unevaluated=True)
    assert [("held_out" in line) for line in read_journal(journal)] == [False, True, False]


def test_a_damaged_line_takes_no_later_one_with_it(tmp_path):
    journal = tmp_path / "journal"
    record(journal, [stepped(1), stepped(2), stepped(3)])
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(InputError, match="journal:2"):
        cut_back(journal, 3)
    cut_back(journal, 2)
    assert journal.read_bytes() == lines[0]


def test_a_return_is_told_once_whether_or_not_it_was_interrupted(tmp_path):
    streak = [Skipped(4, {"loss": 9.0}, 3), Skipped(5, {"loss": 9.0}, 4)]
    back = Skipped(3, {}, 4, 3, (3, 4))
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = [stepped(1), stepped(2), stepped(3)]
    record(once, [*first, *streak, back, stepped(4)])
    record(twice, [*first, *streak, back])
    cut_back(twice, 3)
    record(twice, [*streak, back, stepped(4)])
    assert once.read_bytes() == twice.read_bytes()
    assert {"step": 4, "left_out": [3, 4]} in read_journal(once)


@pytest.mark.parametrize(
    ("metrics", "line", "text"),
    [
        (
            {"loss": 2.0, "gradient_norm": inf},
            {"quantity": "gradient_norm", "value": "inf", "limit": None},
            "gradient norm inf, where a finite number is needed",
        ),
        (
            {"loss": nan, "gradient_norm": 1.0},
            {"quantity": "loss", "value": "nan", "limit": None},
            "loss nan, where a finite number is needed",
        ),
        (
            {"loss": 9.0, "gradient_norm": 1.0},
            {"quantity": "loss", "value": 9.0, "limit": 3.5},
            "loss 9, above its limit 3.5",
        ),
    ],
    ids=["gradient", "loss", "spike"],
)
def test_a_skipped_step_has_the_quantity_at_fault(
    tmp_path, capsys,
    metrics, line, text,
):  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    skipped = Skipped(1, metrics, 0, faults=guard_faults(metrics, 3.5))
    record(path, [skipped])
    assert next(read_journal(path))["faults"] == [line]
    with TrainProgress(2) as show:
        show(skipped)
    assert f"step 1 skipped: {text}" in capsys.readouterr().err


def test_batches_that_are_left_out_are_passed_over():
    assert [batch_of(step, (2, 3, 6)) for step in range(5)] == [0, 1, 4, 5, 7]
    at = Position(2, 50).without((2, 3)).without((6,))
    assert at.batch == 4
    assert at.after(5) == Position(3, 55, (2, 3, 6))
