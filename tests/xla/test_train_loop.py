"""The loop: when it evaluates, saves, skips, returns and stops; on a step that only counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from moecc_backends.xla.train.loop import Loop

from moecc.errors import MachineError
from moecc.train.events import Evaluated, GuardFault, Reason, Skipped, Stepped, Stopped
from moecc.train.recipe import GuardSection, RunSection
from moecc.train.run import Position

NOT_FINITE = (GuardFault("gradient_norm", inf),)
TWO_SKIPS = GuardSection(skips=2)


@dataclass
class Counting:
    """A step that adds the numbers of its batches; it skips those of `bad`."""

    bad: Collection[int] = ()

    def step(self, state, batch, key, rate):
        number = int(batch["number"])
        is_bad = number in self.bad
        metrics = {
            "loss": jnp.float32(number), "tokens": 10, "guard.skipped": is_bad,
            "gradient_norm": jnp.float32(jnp.inf if is_bad else 1), "guard.limit": jnp.float32(99),
        }  # fmt: skip
        return state if is_bad else (*state, number), metrics

    def entered(self, state, done):
        return state

    def model_params(self, state):
        return state

    def evaluate(self, state, batch):
        return {"loss.sum": jnp.float32(100 - len(state)), "tokens": jnp.float32(10)}


@dataclass
class Numbers:
    held_out: Mapping[str, int] = field(default_factory=dict)

    def train(self, number):
        return {"number": number}

    def evaluate(self, name, number):
        return {}


@dataclass
class InMemory:
    kept: list[tuple[Any, Position, float | None]] = field(default_factory=list)
    is_unevaluated: bool = False

    def begin(self):
        losses = [loss for _, _, loss in self.kept if loss is not None]
        state, at, _ = self.kept[-1] if self.kept else ((), Position(), None)
        return state, at, min(losses, default=None), self.is_unevaluated

    def record_loss(self, step, loss):
        state, at, _ = self.kept[-1]
        assert at.step == step
        self.kept[-1], self.is_unevaluated = (state, at, loss), False

    def save(self, state, at, loss, is_unevaluated):
        self.kept.append((state, at, loss))
        self.is_unevaluated = is_unevaluated
        return []

    def finished(self):
        return []

    wait = finished

    @property
    def steps(self):
        return [at.step for _, at, _ in self.kept]


def loop(program=Counting(), feed=Numbers(), checkpoints=None, stop=lambda: None,  # noqa: B008
         clock=lambda: 0.0, **section):  # fmt: skip
    """Return the events of a run, and its checkpoints."""
    store = InMemory() if checkpoints is None else checkpoints
    run = RunSection(**section)
    return list(Loop(program, feed, store, run, lambda s: 0.1, stop, clock).events()), store


def kinds(events):
    return "".join(type(e).__name__[:2] for e in events)


def test_a_run_steps_to_its_end_and_is_saved():
    events, store = loop(steps=3)
    assert [e.step for e in events] == [1, 2, 3, 3]
    assert events[-1] == Stopped(3, Reason.DONE)
    assert [e.tokens for e in events if isinstance(e, Stepped)] == [10, 20, 30]
    assert store.kept == [((0, 1, 2), Position(3, 30), None)]


def test_it_is_saved_by_steps_and_by_time():
    assert loop(steps=7, save_steps=3)[1].steps == [3, 6, 7]
    ticks = iter(range(100))
    _, store = loop(steps=7, save_minutes=0.05, clock=lambda: float(next(ticks)))
    assert len(store.steps) > 2
    assert store.steps[-1] == 7


def test_it_is_evaluated_by_steps_and_at_the_end_and_the_best_is_saved():
    feed = Numbers({"a": 2})
    events, store = loop(steps=5, evaluate_steps=2, feed=feed)
    losses = [(e.step, e.losses["a"]) for e in events if isinstance(e, Evaluated)]
    assert losses == [(2, 9.8), (4, 9.6), (5, 9.5)]
    assert store.steps == [2, 4, 5]
    again, _ = loop(steps=8, evaluate_steps=2, feed=feed, checkpoints=store)
    assert [e.step for e in again if isinstance(e, Evaluated)] == [6, 8]


def test_a_resumed_run_goes_on_with_the_next_batch():
    _, store = loop(steps=3)
    events, _ = loop(steps=5, checkpoints=store)
    assert [e.step for e in events] == [4, 5, 5]
    assert store.kept[-1] == ((0, 1, 2, 3, 4), Position(5, 50), None)
    assert kinds(loop(steps=5, checkpoints=store)[0]) == "St"
    assert store.steps == [3, 5]


def test_a_skipped_step_counts_and_trains_on_nothing():
    events, store = loop(Counting({1}), steps=4, guard=TWO_SKIPS)
    assert [type(e) for e in events] == [Stepped, Skipped, Stepped, Stepped, Stopped]
    assert store.kept[-1] == ((0, 2, 3), Position(4, 30), None)
    assert events[1].faults == NOT_FINITE


def test_too_many_skips_return_to_the_checkpoint_and_leave_their_batches_out():
    events, store = loop(Counting({3, 4}), steps=6, save_steps=2, guard=TWO_SKIPS)
    back = next(e for e in events if isinstance(e, Skipped) and e.back_to is not None)
    # Batch 2 made the parameters that batches 3 and 4 are skipped with.
    assert (back.back_to, back.left_out) == (2, (2, 3, 4))
    assert store.kept[-1][:2] == ((0, 1, 5, 6, 7, 8), Position(6, 60, (2, 3, 4)))
    # No checkpoint lies between skipped steps.
    assert store.steps == [2, 4, 6]


def test_a_second_streak_after_the_same_checkpoint_stops_the_run():
    events, store = loop(Counting({3, 4, 5, 6}), steps=9, save_steps=2, guard=TWO_SKIPS)
    assert events[-1] == Stopped(2, Reason.GUARD, NOT_FINITE)
    assert store.steps == [2]


def test_what_is_not_finite_from_the_first_step_stops_the_run():
    events, store = loop(Counting(range(100)), steps=20, guard=GuardSection(skips=3))
    assert kinds(events) == "Sk" * 7 + "St"
    assert events[-1] == Stopped(0, Reason.GUARD, NOT_FINITE)
    assert store.kept == []


def test_a_request_to_stop_is_honoured_after_the_step_and_saved():
    asked = iter([None, None, Reason.TERMINATED])
    events, store = loop(steps=9, stop=lambda: next(asked))
    assert [e.step for e in events] == [1, 2, 3, 3]
    assert events[-1] == Stopped(3, Reason.TERMINATED)
    assert store.steps == [3]
    rest, _ = loop(steps=9, checkpoints=store)
    assert isinstance(rest[-1], Stopped)
    assert store.kept[-1][0] == tuple(range(9))


@pytest.mark.parametrize("asked", [3, 4], ids=["in the step", "in the evaluation"])
@pytest.mark.parametrize("steps", [2, 5], ids=["last", "between"])
def test_a_request_to_stop_is_saved_before_the_evaluation_that_is_due(asked, steps):
    """The run that goes on evaluates first, and the two are as one that was not stopped."""
    run = partial(loop, feed=Numbers({"a": 2}), steps=steps, save_steps=9, evaluate_steps=2)
    whole, alone = run()
    calls = iter([*[None] * (asked - 2), *[Reason.TERMINATED] * 2])
    events, store = run(stop=lambda: next(calls))
    assert kinds(events) == "StStSt"
    assert events[-1] == Stopped(2, Reason.TERMINATED)
    assert store.kept == [((0, 1), Position(2, 20), None)]
    again, _ = run(checkpoints=store, stop=lambda: Reason.TERMINATED)
    assert again == [Stopped(2, Reason.TERMINATED)]
    resumed, _ = run(checkpoints=store)
    assert kinds([*events[:2], *resumed]) == kinds(whole)
    assert resumed[0] == whole[2]
    assert store.kept == alone.kept


def test_a_failed_save_reaches_the_reader_of_the_events():
    class Full(InMemory):
        def save(self, state, at, loss, is_unevaluated):
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        loop(steps=2, save_steps=1, checkpoints=Full())


def test_memory_that_is_too_small_is_an_error_of_the_machine():
    class TooLarge(Counting):
        def step(self, state, batch, key, rate):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
            )

    with pytest.raises(MachineError, match="memory of a device is too small") as error:
        loop(TooLarge(), steps=3)
    assert "run.micro_batches" in str(error.value)
