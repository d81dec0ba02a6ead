"""Where a run is in its data: steps done, and the batches that are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Attributes:
      step: steps done.
      tokens: trained on, padding left out.
      left_out: numbers of batches that the guard left out for good, rising.
    """

    step: int = 0
    tokens: int = 0
    left_out: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """The number of the next batch: the steps take the batches in order, but for some."""
        return batch_of(self.step, self.left_out)

    def after(self, tokens: int) -> Position:
        """Return the position after one more step on `tokens`."""
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens)

    def without(self, batches: tuple[int, ...]) -> Position:
        """Return this position with `batches` left out as well."""
        return replace(self, left_out=tuple(sorted({*self.left_out, *batches})))


def batch_of(step: int, left_out: tuple[int, ...]) -> int:
    """Return the number of the batch of a step: the step-th number that is not left out."""
    number = step
    for gone in left_out:
        if gone <= number:
            number += 1
    return number
