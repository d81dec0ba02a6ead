"""How a training goes: a line on a terminal that changes, or lines now and then."""

from __future__ import annotations

import sys
import time

from moecc.cli.console import is_quiet, say, use_colour
from moecc.support.process import Closing
from moecc.support.text import count_text
from moecc.train.events import Evaluated, Event, Exported, Saved, Skipped, Stepped, Stopped, Watch

LINE_SECONDS = 10.0
"""Where the standard error is no terminal: at most a line of steps in so many seconds."""

_REFRESH_SECONDS = 0.2
_FORGETTING = 0.9


class TrainProgress(Closing):
    """Shows the events of a training on the standard error.

    Args:
      steps: of the whole run.
      quiet: whether nothing is shown, as in all processes but the first.
      predicted: tokens a second of a plan, of which the share that is reached is shown.
    """

    def __init__(self, steps: int, *, quiet: bool = False, predicted: float | None = None) -> None:
        self._steps, self._quiet, self._predicted = steps, quiet or is_quiet(), predicted
        self._is_live = sys.stderr.isatty() and use_colour()
        self._shown_seconds = -LINE_SECONDS
        self._tokens = 0
        self._rate = 0.0
        self._step_seconds = 0.0
        self._watch = Watch()
        self._is_open = False

    def close(self) -> None:
        """End the line that is rewritten."""
        self._end_line()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if self._quiet:
            return
        match event:
            case Stepped():
                self._stepped(event)
            case Skipped() if event.back_to is not None:
                gone = ", ".join(map(str, event.left_out))
                self._say(f"back to step {event.back_to:,}; left out: batches {gone}")
            case Skipped():
                self._say(f"step {event.step:,} skipped: {'; '.join(map(str, event.faults))}")
            case Evaluated():
                each = ", ".join(f"{name} {loss:.4f}" for name, loss in event.losses.items())
                self._say(f"step {event.step:,}: held out {each}")
            case Saved():
                best = ", the best" if event.best else ""
                self._say(f"step {event.step:,}: saved to {event.folder}{best}")
            case Exported():
                self._say(f"step {event.step:,}: exported to {event.folder}")
            case Stopped():
                self._end_line()

    def _stepped(self, event: Stepped) -> None:
        for alarm in self._watch(event.step, event.metrics):
            self._say(f"alarm: {alarm}")
        is_first = not self._tokens
        tokens, self._tokens = event.tokens - self._tokens, event.tokens
        if not is_first:
            self._keep_pace(tokens, event.seconds)
        now = time.monotonic()
        wait = _REFRESH_SECONDS if self._is_live else LINE_SECONDS
        if now - self._shown_seconds < wait and event.step != self._steps:
            return
        self._shown_seconds = now
        loss = event.metrics.get("loss")
        shown = f"{loss:.4f}" if isinstance(loss, float) else str(loss)
        pace = f"{_duration(event.seconds)} with its compilation" if is_first else self._pace(event)
        text = f"step {event.step:,} of {self._steps:,}  loss {shown}  {pace}"
        if not self._is_live:
            say(text)
            return
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        self._is_open = True

    def _keep_pace(self, tokens: int, seconds: float) -> None:
        """Let a step, but for the first, count for the rate."""
        weight = _FORGETTING if self._rate else 0.0
        self._rate = weight * self._rate + (1 - weight) * tokens / max(seconds, 1e-9)
        self._step_seconds = weight * self._step_seconds + (1 - weight) * seconds

    def _pace(self, event: Stepped) -> str:
        left = _duration((self._steps - event.step) * self._step_seconds)
        return f"{count_text(round(self._rate))} tokens/s{self._share()}  {left} left"

    def _share(self) -> str:
        """Return which share of a plan's tokens a second is reached, if there is a plan."""
        if self._predicted is None:
            return ""
        return f" ({self._rate / self._predicted:.0%} of the plan)"

    def _say(self, text: str) -> None:
        self._end_line()
        say(text)

    def _end_line(self) -> None:
        if self._is_open:
            print(file=sys.stderr)
        self._is_open = False


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
