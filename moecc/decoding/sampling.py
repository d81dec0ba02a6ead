"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecc.errors import Problem, UsageError
from moecc.types.arrays import Array, Doubles


@dataclass(frozen=True)
class Sampling:
    """Which tokens are drawn.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only so many of the likeliest tokens are drawn; 0 for all.
      top_p: only the likeliest tokens that have this probability together (Holtzman et al. 2020).
      seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for a number that is none of its kind."""
        rules = (
            (0 <= self.temperature < float("inf"), "a temperature", "temperature", "0 or more"),
            (self.top_k >= 0, "a number of tokens", "top-k", "0 or more"),
            (0 < self.top_p <= 1, "a probability", "top-p", "above 0, at most 1"),
            (self.seed >= 0, "a seed of draws", "seed", "0 or more"),
        )
        found = [
            Problem(f"not {what}", f"--{name}", wanted, str(getattr(self, name.replace("-", "_"))))
            for holds, what, name, wanted in rules
            if not holds
        ]
        if found:
            raise UsageError(found)

    def generators(self, count: int) -> list[np.random.Generator]:
        """Return the source of draws of each text: what a text gets does not depend on others."""
        return [np.random.default_rng((self.seed, n) if n else self.seed) for n in range(count)]

    def choose(self, logits: Array, rng: np.random.Generator) -> int:
        """Return the next token for logits ``[vocab]``."""
        if self.temperature == 0:
            return int(logits.argmax())
        share = self._shares(logits.astype(np.float64))
        return int(rng.choice(len(share), p=share))

    def _shares(self, logits: Doubles) -> Doubles:
        # The maximum is subtracted before dividing: a tiny temperature must not make it infinite.
        with np.errstate(over="ignore"):
            share: Doubles = np.exp((logits - logits.max()) / self.temperature)
        if 0 < self.top_k < len(share):
            share[np.argsort(-share, kind="stable")[self.top_k :]] = 0
        share /= share.sum()
        if self.top_p < 1:
            order = np.argsort(-share, kind="stable")
            before = np.cumsum(share[order]) - share[order]
            share[order[before >= self.top_p]] = 0
            share /= share.sum()
        return share
