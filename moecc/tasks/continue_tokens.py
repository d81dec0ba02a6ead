"""Continue tokens, greedily or with seeded draws: a batch of texts, or one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecc.backend import Backend, get_backend
from moecc.decoding import Batch, DecodeGraphs, ReadOnce, Sampling, check_continues, unstretched
from moecc.errors import InputError, Problem, UsageError
from moecc.model.inputs import longest
from moecc.model.open import Model
from moecc.tasks.verify import vocabulary
from moecc.types import F32, Array, Arrays, DType

if TYPE_CHECKING:
    from moecc.ir.graph import Graph

GREEDY = Sampling()

GIVE = "give some text to continue"


@dataclass(frozen=True)
class Continuing:
    """How texts are continued.

    Attributes:
      count: the most tokens to add to each.
      sampling: how a token is chosen.
      stop: tokens that end a text.
      dtype: the type to compute in.
    """

    count: int
    sampling: Sampling = GREEDY
    stop: frozenset[int] = frozenset()
    dtype: DType = F32

    def check(self) -> None:
        """Raise UsageError for a number that is none of its kind."""
        if self.count < 1:
            raise UsageError("not a number of tokens", where="--tokens", expected="1 or more",
                             found=str(self.count))  # fmt: skip
        self.sampling.check()


def continue_tokens(
    model: Model,
    tokens: Sequence[int],
    count: int,
    *,
    dtype: DType = F32,
    temperature: float = 0.0,
    seed: int = 0,
    backend: Backend | None = None,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield up to `count` tokens that follow `tokens`, ending before one of `stop`.

    Args:
      model: the model, a decoder.
      tokens: the prompt, not empty.
      count: the most tokens to add.
      dtype: the type to compute in.
      temperature: 0 takes the likeliest token, and larger values draw one.
      seed: of the draws.
      backend: the backend; xla by default.
      stop: tokens that end the text.

    Raises: as `continue_texts`.
    """
    how = Continuing(count, Sampling(temperature, seed=seed), stop, dtype)
    for (token,) in continue_texts(model, [tokens], how, backend=backend):
        if token is not None:
            yield token


def continue_texts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    how: Continuing,
    *,
    memory: Arrays | None = None,
    backend: Backend | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each text, None for those that have ended, until all have.

    Prompts may have different lengths.  Keys and values of earlier tokens are kept, so that a
    token costs what it adds; of a model whose rotary positions depend on the length of the text,
    longer texts than its original context are read again for each token.

    Args:
      model: the model.
      prompts: the tokens of each text, or of an encoder-decoder those that its decoder begins with.
      how: how they are continued.
      memory: for an encoder-decoder, the inputs of its encoder.
      backend: the backend; xla by default.

    Raises:
      UsageError: a number of the sampling is none of its kind.
      InputError: the model cannot continue texts, a prompt is empty, a text becomes longer than
        the model has positions, no logit is finite, or one is NaN or +∞.
    """
    return Continuer(model, backend).texts(prompts, how, memory)


class Continuer:
    """Continues texts of a model, one batch after the other.

    Weights are read, and programs compiled, for the first; they stay in memory for the next.
    """

    def __init__(self, model: Model, backend: Backend | None = None) -> None:
        self._model = model
        self._backend = backend
        self._readers: dict[tuple[DType, bool], Batch | _Rereader] = {}

    def texts(
        self, prompts: Sequence[Sequence[int]], how: Continuing, memory: Arrays | None = None
    ) -> Iterator[list[int | None]]:
        """Yield the next token of each text; arguments and errors are those of `continue_texts`."""
        model, longest = self._model, max(map(len, prompts), default=0) + how.count
        how.check()
        check_continues(model.graph, model.name)
        check_prompts(model, prompts)
        _check_length(model, longest)
        original = unstretched(model.graph)
        is_stretched = original is not None and longest > original and memory is None
        return _continued(self._reader(how.dtype, is_stretched), prompts, how, memory, model.name)

    def _reader(self, dtype: DType, is_stretched: bool) -> Batch | _Rereader:
        key = dtype, is_stretched
        if key not in self._readers:
            graph, params = self._model.graph, self._model.params(dtype=dtype)
            backend = self._backend or get_backend("xla")
            self._readers[key] = (
                _Rereader(graph, ReadOnce(params), backend, dtype)
                if is_stretched
                else Batch(DecodeGraphs.of(graph), params, backend=backend, dtype=dtype)
            )
        return self._readers[key]


def _continued(
    reader: Batch | _Rereader,
    prompts: Sequence[Sequence[int]],
    how: Continuing,
    memory: Arrays | None,
    name: str,
) -> Iterator[list[int | None]]:
    rngs = how.sampling.generators(len(prompts))
    alive = [True] * len(prompts)
    last: list[int] = []
    for _ in range(how.count):
        logits = reader.step(last) if last else reader.begin(prompts, memory)
        _check_finite(logits[alive], name)
        last = [
            how.sampling.choose(row, rng) if goes_on else prompt[-1]
            for row, rng, goes_on, prompt in zip(logits, rngs, alive, prompts, strict=True)
        ]
        alive = [a and token not in how.stop for a, token in zip(alive, last, strict=True)]
        if not any(alive):
            return
        yield [token if a else None for a, token in zip(alive, last, strict=True)]


class _Rereader:
    """Reads all of each text again for every token."""

    def __init__(self, graph: Graph, params: Arrays, backend: Backend, dtype: DType) -> None:
        self._program = backend.compile(graph, dtype=dtype)
        self._params = params
        self._texts: list[list[int]] = []

    def begin(self, prompts: Sequence[Sequence[int]], memory: Arrays | None) -> Array:
        """Return the logits after each prompt, ``[text, vocab]``."""
        self._texts = [list(prompt) for prompt in prompts]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Array:
        """Append a token to each text; return the logits after it, ``[text, vocab]``."""
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(token)
        return self._logits()

    def _logits(self) -> Array:
        # One by one and not padded: the rotary positions depend on the longest text of all.
        inputs = ({"tokens": np.array([text], np.int32)} for text in self._texts)
        return np.stack([self._program.run(self._params, g)["logits"][0, -1] for g in inputs])


def check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    """Raise InputError for prompts without tokens, or with tokens that `model` does not know."""
    known = vocabulary(model)
    problems = [] if prompts else [Problem("there are no prompts", hint=GIVE)]
    for number, prompt in enumerate(prompts, 1):
        place = f"prompt {number}" if len(prompts) > 1 else model.name
        strange = [token for token in prompt if not 0 <= token < known]
        if not prompt:
            problems.append(Problem("the prompt has no tokens", place, hint=GIVE))
        elif strange:
            what = "the tokenizer has tokens that the model does not know"
            problems.append(Problem(what, place, f"ids below {known}", str(strange[0])))
    if problems:
        raise InputError(problems)


def _check_length(model: Model, count: int) -> None:
    """Raise InputError if `count` tokens are more than a learned table has positions for."""
    most = longest(model.graph)
    # The last token is not read again.
    if most is not None and count - 1 > most:
        raise InputError(
            "the text would be longer than the model has positions", where=model.name,
            expected=f"at most {most + 1} tokens, those to add included", found=str(count),
            hint="give a shorter prompt, or a smaller --tokens",
        )  # fmt: skip


def _check_finite(logits: Array, name: str) -> None:
    largest = logits.max(axis=-1)
    if not np.isfinite(largest).all():
        raise InputError(
            "the logits contain NaN or infinity", where=name,
            expected="finite logits", found=f"a largest of {largest[~np.isfinite(largest)][0]}",
        )  # fmt: skip
