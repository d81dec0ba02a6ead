"""The bar of what takes long: what is left is predicted from the rate."""

from __future__ import annotations

from moecc.support.console import Bar


def test_a_bar_predicts_the_end_from_the_last_minute() -> None:
    now = [0.0]
    progress, task = Bar("writing")._open(10_000)
    try:
        progress.get_time = lambda: now[0]
        done = 0
        for second in range(1, 11):
            now[0], done = float(second), done + 200
            progress.update(task, completed=done)
        assert progress.tasks[0].time_remaining == (10_000 - 2_000) / 200
        # The disk's cache is full: a minute later nothing is left of the rate before.
        for second in range(11, 81):
            now[0], done = float(second), done + 50
            progress.update(task, completed=done)
        assert progress.tasks[0].time_remaining == (10_000 - 5_500) / 50
        shown = [type(column).__name__ for column in progress.columns]
        assert "TimeRemainingColumn" in shown
    finally:
        progress.stop()
