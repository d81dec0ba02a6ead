"""Metrics of a run for TensorBoard and Weights & Biases, as its events pass by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from moecc.errors import MachineError
from moecc.support.extras import install_hint
from moecc.support.untyped import Json
from moecc.train.events import METRIC, Evaluated, Event, Metric, Stepped

MOST_EXPERTS = 16
"""Of more experts the largest and the smallest value are shown."""


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def tracked(events: Iterable[Event], trackers: Iterable[Tracker], every: int) -> Iterator[Event]:
    """Yield `events`, after `trackers` had what they measure: steps every so many, evaluations."""
    opened = list(trackers)
    try:
        for event in events:
            if not isinstance(event, Stepped) or event.step % every == 0:
                values = scalars(event)
                for tracker in opened if values else ():
                    tracker.log(event.step, values)
            yield event
    finally:
        for tracker in opened:
            tracker.close()


def scalars(event: Event) -> dict[str, float]:
    """Return what an event measures, as numbers by the names that trackers show."""
    match event:
        case Stepped():
            speed = {"train/tokens": float(event.tokens), "train/seconds": event.seconds}
            return {**speed, **dict(_named(event.metrics))}
        case Evaluated():
            losses = {f"held_out/{name}": loss for name, loss in event.losses.items()}
            spreads = {f"{METRIC}{layer}.spread": s for layer, s in event.spread.items()}
            return {**losses, **dict(_named(spreads))}
    return {}


def _named(metrics: Mapping[str, Metric]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        layer, _, kind = name.removeprefix(METRIC).rpartition(".")
        title = f"{layer}/{kind}" if name.startswith(METRIC) else f"train/{name}"
        if not isinstance(value, list):
            yield title, value
        elif len(value) <= MOST_EXPERTS:
            yield from ((f"{title}/{number}", entry) for number, entry in enumerate(value))
        else:
            yield from ((f"{title}/largest", max(value)), (f"{title}/smallest", min(value)))


class TensorBoard:
    """Event files that TensorBoard reads, in the folder ``tensorboard`` of a run.

    Args:
      run: the folder of the run.
      step: where it goes on; what was logged later is hidden.

    Raises:
      MachineError: tensorboardX is missing.
    """

    def __init__(self, run: Path, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise MachineError(
                "TensorBoard needs tensorboardX", hint=install_hint("tensorboard")
            ) from None
        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which goes on when this one does.

    Args:
      run: the folder of the run.
      project: where it belongs.
      recipe: shown as its configuration.

    Raises:
      MachineError: wandb is missing.
    """

    def __init__(self, run: Path, project: str, recipe: Json) -> None:
        try:
            import wandb
        except ImportError:
            raise MachineError("Weights & Biases needs wandb", hint=install_hint("wandb")) from None
        folder = run / "wandb"
        folder.mkdir(exist_ok=True)
        path = folder / "id"
        identity = path.read_text("utf-8") if path.is_file() else wandb.util.generate_id()
        path.write_text(identity, "utf-8")
        self._run: Any = wandb.init(
            project=project, name=run.name, dir=str(run), id=identity, resume="allow",
            config=dict(recipe),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()
