"""Write the journals of a run while its events pass by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from moecc.checkpoint.run.layout import METRICS, SPEED, saved_steps
from moecc.train.events import Event, Reason, Saved, Stepped, Stopped
from moecc.train.job import Training, TrainJob
from moecc.train.journal import Journal, cut_back


def followed(
    job: TrainJob, training: Training, stop: Callable[[], Reason | None]
) -> Iterator[Event]:
    """Yield the events of a training, each after it is in the journals of its run.

    Args:
      job: what is trained.
      training: on its devices.
      stop: returns why to stop after the step, or None.

    Raises:
      As `moecc.train.job.Training.events`.
    """
    with ExitStack() as opened:
        journals = _Journals(job, opened) if training.writes else None
        for event in training.events(stop):
            if journals is not None:
                journals.record(event)
            yield event


class _Journals:
    """What a recipe decides, and how fast it went: two files, since only the first is repeatable.

    Args:
      job: of the run, whose journals are cut back to its last checkpoint.
      opened: closes them.
    """

    def __init__(self, job: TrainJob, opened: ExitStack) -> None:
        steps = saved_steps(job.run)
        last = steps[-1].number if steps else 0
        for name in (METRICS, SPEED):
            cut_back(job.run / name, last)
        self._every = job.recipe.run.log_steps
        self._metrics = opened.enter_context(Journal(job.run / METRICS))
        self._speed = opened.enter_context(Journal(job.run / SPEED))

    def record(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step % self._every:
            return
        self._metrics.record(event)
        match event:
            case Stepped():
                self._speed.write({"step": event.step, "seconds": round(event.seconds, 6)})
            case Saved():
                self._metrics.synchronise()
                line = {"step": event.step, "saved_seconds": round(event.seconds, 3)}
                self._speed.write({**line, "at": round(time.time(), 3)})
            case Stopped():
                self._metrics.synchronise()
