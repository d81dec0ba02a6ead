"""A decoder for lm-eval's harness: the three methods that its tasks call.

::

    from lm_eval import simple_evaluate
    from moecc.jobs.lm_eval_model import lm_eval_model

    with open_model("run@best") as model, lm_eval_model(model) as adapter:
        simple_evaluate(adapter, tasks=["arc_easy"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moecc.backend import backend_with
from moecc.decoding import Sampling
from moecc.errors import InputError, MachineError
from moecc.jobs.generate import Continuer, Continuing, end_tokens, load_tokenizer
from moecc.model.inputs import stated_context
from moecc.model.open import OpenedModel
from moecc.support.lazy import np
from moecc.support.untyped import Json
from moecc.tokenizer import Tokenizer
from moecc.train.objectives import IGNORED
from moecc.train.scoring import Scorer, ScoringBackend, UnitScores
from moecc.types import F32, DType

BUCKET = 64
"""Lengths are rounded up to a multiple of this, so that few shapes are compiled."""

LONGEST = 2048
"""The longest context in tokens, unless the model has fewer positions."""

_MOST_TOKENS = 256


@dataclass(frozen=True)
class HarnessModel:
    """What lm-eval asks of a model; requests have ``args``, as its instances do.

    Attributes:
      model: a decoder.
      tokenizer: its tokenizer.
      batch: rows at a time.
      dtype: the type of the computation.
    """

    model: OpenedModel
    tokenizer: Tokenizer
    batch: int = 8
    dtype: DType = F32

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return log p of each continuation after its context, and whether greedy decoding has it.

        Args:
          requests: ``(context, continuation)``.
        """
        rows = [self._pair(*request.args) for request in requests]
        scores = self._scores(rows)
        greedy = scores.hits == scores.tokens
        return [(-float(x), bool(g)) for x, g in zip(scores.losses, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return log p of each text, each token after as many before it as fit a window.

        Args:
          requests: ``(text,)``.
        """
        scores = []
        for request in requests:
            ids = self._ids(request.args[0])
            tokens = [self._start, *ids]
            rows = [
                (tokens[at : at + self.longest], ids[at : at + self.longest])
                for at in range(0, len(ids), self.longest)
            ]
            scores.append(-float(self._scores(rows).losses.sum()) if rows else 0.0)
        return scores

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a continuation of each context, up to one of the texts that end it.

        Args:
          requests: ``(context, options)`` with ``until``, ``max_gen_toks``, ``temperature``.
        """
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, options: Json) -> str:
        until = options.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        count = int(options.get("max_gen_toks", _MOST_TOKENS))
        if count >= self.longest:
            raise InputError(
                "there is no room for a context", where=self.model.name,
                expected=f"max_gen_toks below {self.longest}", found=str(count),
            )  # fmt: skip
        ids = (self._ids(context) or [self._start])[-(self.longest - count) :]
        heat = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        generated: list[int] = []
        how = Continuing(count, Sampling(heat), end_tokens(self.model), self.dtype)
        text = ""
        for (token,) in self._continuer.texts([ids], how):
            assert token is not None, "one text ends the batch"
            generated.append(token)
            text = self.tokenizer.decode(generated)
            if any(end in text for end in ends):
                break
        return min((text.split(end)[0] for end in ends), key=len, default=text)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens that are seen, and for each of them the one to predict."""
        before = self._ids(context) if context else []
        tokens = self._ids(context + continuation)
        # A tokenizer may join the end of the context with what follows; then that is scored.
        begin = min(len(before), len(tokens) - 1)
        before = before or [self._start]
        scored = tokens[begin:]
        seen = [*(tokens[:begin] or before), *scored][-(self.longest + 1) :]
        targets = [IGNORED] * (len(seen) - 1 - len(scored)) + scored[-(len(seen) - 1) :]
        return seen[:-1], targets

    def _scores(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> UnitScores:
        """Return the scores of rows, in their order; rows of like lengths go together."""
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]))
        losses = np.zeros(len(rows), np.float64)
        tokens, hits = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            padded = _padded([rows[n] for n in chosen], self.batch, self.longest)
            scores = self._scorer(padded).by_row()
            real = slice(len(chosen))
            losses[chosen], tokens[chosen] = scores.losses[real], scores.tokens[real]
            hits[chosen] = scores.hits[real]
        return UnitScores(losses, tokens, hits)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode_all([text], special=False)[0]

    @cached_property
    def _continuer(self) -> Continuer:
        return Continuer(self.model)

    @cached_property
    def _scorer(self) -> Scorer:
        params = self.model.params(dtype=self.dtype)
        return backend_with(ScoringBackend).scorer(self.model.graph, params, dtype=self.dtype)

    @cached_property
    def _start(self) -> int:
        """The token before a text without a context: a beginning, or an end."""
        token = self.model.graph.stated_config.get("bos_token_id")
        ends = sorted(end_tokens(self.model))
        return token if isinstance(token, int) else (ends or [0])[0]

    @cached_property
    def longest(self) -> int:
        """The tokens of a window."""
        return min(stated_context(self.model.graph) or LONGEST, LONGEST)


def _padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int, most: int
) -> dict[str, np.ndarray[Any, Any]]:
    width = min(-(-max(len(seen) for seen, _ in rows) // BUCKET) * BUCKET, most)
    tokens = np.zeros((batch, width), np.int32)
    targets = np.full((batch, width), IGNORED, np.int32)
    for number, (seen, scored) in enumerate(rows):
        tokens[number, : len(seen)] = seen
        targets[number, : len(scored)] = scored
    return {"tokens": tokens, "targets": targets}


@contextmanager
def lm_eval_model(model: OpenedModel, *, batch: int = 8, dtype: DType = F32) -> Iterator[Any]:
    """Yield an ``lm_eval.api.model.LM`` of a decoder.

    Args:
      model: opened, and open as long as the adapter is used.
      batch: rows at a time.
      dtype: the type of the computation.

    Raises:
      MachineError: lm-eval is missing.
      InputError: the model takes more than tokens, or has no tokenizer.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise MachineError(
            "the adapter needs lm-eval", hint="python -m pip install lm-eval"
        ) from None
    if list(model.graph.inputs) != ["tokens"]:
        raise InputError(
            "lm-eval's tasks are for decoders", where=model.name, expected="the input tokens",
            found=", ".join(model.graph.inputs),
        )  # fmt: skip
    with load_tokenizer(model) as tokenizer:
        asked = HarnessModel(model, tokenizer, batch, dtype)
        methods = {
            name: _of_instances(getattr(asked, name))
            for name in ("loglikelihood", "loglikelihood_rolling", "generate_until")
        }
        # Made here: a class statement would have a base that no type checker can see.
        yield type("MoeccModel", (LM,), {**methods, "tokenizer_name": model.name})()


def _of_instances(method: Any) -> Any:
    return lambda self, requests, **_: method(requests)
