"""What a model has to restore: spans behind sentinels (T5), single tokens behind a mask (BERT)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Numbers = NDArray[np.int64]

MASKED, RANDOM = 0.8, 0.1
"""Of the tokens that BERT predicts: the shares that are masked, and replaced by any token."""


@dataclass(frozen=True)
class Spans:
    """Span corruption (Raffel et al. 2020, §3.1.4), the pre-training of ST-MoE.

    A sequence alternates between what is kept and what is hidden, and begins with what is kept.
    Encoder: what is kept, a sentinel for each span, and the end.  Decoder: each sentinel and its
    span, and the end.

    Attributes:
      density: the share of tokens that is hidden.
      mean: the mean length of a span.
      sentinels: the ids of sentinels, in order.
      end: the id of the end; None without one.
    """

    density: float
    mean: float
    sentinels: tuple[int, ...]
    end: int | None

    def counts(self, lengths: Numbers) -> tuple[Numbers, Numbers]:
        """Return the hidden tokens and the spans of sequences of `lengths`, each at least 2."""
        hidden = np.clip(np.round(lengths * self.density).astype(np.int64), 1, lengths - 1)
        spans = np.maximum(np.round(hidden / self.mean).astype(np.int64), 1)
        most = np.minimum(np.minimum(hidden, lengths - hidden), len(self.sentinels))
        return hidden, np.minimum(spans, most)

    def sizes(self, lengths: Numbers) -> tuple[Numbers, Numbers]:
        """Return the tokens of encoder and decoder for sequences of `lengths`, each at least 2."""
        hidden, spans = self.counts(lengths)
        ends = 0 if self.end is None else 1
        return lengths - hidden + spans + ends, hidden + spans + ends

    def apply(self, ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Return the tokens of encoder and decoder for a sequence of at least 2 tokens."""
        hidden, spans = (int(n[0]) for n in self.counts(np.asarray([len(ids)])))
        kept_lengths = _partition(len(ids) - hidden, spans, rng)
        hidden_lengths = _partition(hidden, spans, rng)
        encoder: list[Ids] = []
        decoder: list[Ids] = []
        at = 0
        for kept, gone, sentinel in zip(
            kept_lengths, hidden_lengths, self.sentinels[:spans], strict=True
        ):
            mark = np.asarray([sentinel], np.int32)
            encoder += [ids[at : at + kept], mark]
            decoder += [mark, ids[at + kept : at + kept + gone]]
            at += kept + gone
        end = np.asarray([] if self.end is None else [self.end], np.int32)
        return np.concatenate([*encoder, end]), np.concatenate([*decoder, end])


def restored(encoder: Ids, decoder: Ids, sentinels: tuple[int, ...], end: int | None) -> Ids:
    """Return the sequence that spans were hidden of: the inverse of `Spans.apply`."""
    marks = set(sentinels)
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in decoder.tolist():
        if token in marks:
            current = spans.setdefault(token, [])
        elif token != end:
            current.append(token)
    found: list[int] = []
    for token in encoder.tolist():
        if token != end:
            found += spans.get(token, [token] if token not in marks else [])
    return np.asarray(found, np.int32)


def _partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Return `parts` positive lengths that add up to `total`, every such choice equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    edges = np.concatenate([[0], cuts, [total]])
    return [int(n) for n in np.diff(edges)]


@dataclass(frozen=True)
class Masking:
    """Masked language modelling (Devlin et al. 2019, §3.1).

    Attributes:
      density: the share of tokens that is predicted.
      mask: the id of the mask.
      vocab: tokens are replaced by any id below.
    """

    density: float
    mask: int
    vocab: int

    def apply(self, ids: Ids, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        """Return the tokens that the model sees, and which it has to predict."""
        count = min(max(round(len(ids) * self.density), 1), len(ids))
        chosen = np.zeros(len(ids), bool)
        chosen[rng.choice(len(ids), count, replace=False)] = True
        draw = rng.random(len(ids))
        seen = ids.copy()
        seen[chosen & (draw < MASKED)] = self.mask
        other = chosen & (draw >= MASKED) & (draw < MASKED + RANDOM)
        seen[other] = rng.integers(0, self.vocab, int(other.sum()))
        return seen, chosen
