"""Every label of every example as a completion of its prompt, so that the likeliest is found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moecc.train.tokens.folder import Ids, TokenFolder


@dataclass(frozen=True)
class LabelChoices:
    """A labelled folder in which each example is repeated with each label, in order.

    Attributes:
      folder: the labelled folder.
      examples: how many of its examples, the first ones.
    """

    folder: TokenFolder
    examples: int

    @property
    def labels(self) -> int:
        """The number of labels."""
        return len(self.folder.facts.labels)

    @property
    def answers(self) -> NDArray[np.int64]:
        """The label of each example."""
        return self.folder.labels[: self.examples]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where the repeated examples begin, and the end of the last one."""
        sizes = [len(document) for document in self._documents]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def completions(self) -> NDArray[np.int64]:
        """The tokens of each prompt, after which its label begins."""
        return np.repeat(self.folder.completions[: self.examples], self.labels)

    def ids(self, start: int, stop: int) -> Ids:
        """Return the ids from `start` to `stop`."""
        return self._ids[start:stop]

    @cached_property
    def _ids(self) -> Ids:
        return np.concatenate(self._documents)

    @cached_property
    def _documents(self) -> list[Ids]:
        labels = [np.asarray(label.tokens, np.int32) for label in self.folder.facts.labels]
        prompts = (
            self.folder.ids(int(start), int(start + size))
            for start, size in zip(
                self.folder.starts[: self.examples], self.folder.completions, strict=False
            )
        )
        return [np.concatenate([prompt, label]) for prompt in prompts for label in labels]
