"""Continue a text, token by token, greedily or with a seeded temperature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from moecc.backend import Backend, get_backend
from moecc.checkpoint.files import read_bounded
from moecc.errors import InputError, Problem, UsageError
from moecc.model.open import Model
from moecc.tasks.verify import vocabulary
from moecc.tokenizer.process import Tokenizer
from moecc.types.arrays import Array
from moecc.types.dtypes import F32, DType

MAX_TOKENIZER_BYTES = 256 << 20

BUCKET = 32
"""Lengths are rounded up to a multiple of this, to compile few shapes."""


class Kept(Mapping[str, Array]):
    """Parameters that are evaluated once and cached, for a model that runs many times."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self._params = params
        self._made: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._made:
            self._made[name] = self._params[name]
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def load_tokenizer(model: Model) -> Tokenizer:
    """Return the tokenizer next to the weights of `model`, in a subprocess.

    Raises:
      InputError: there is no ``tokenizer.json``, or it cannot be read within its bounds.
      MachineError: the extra ``tokenizers`` is not installed.
    """
    companions = {} if model.checkpoint is None else model.checkpoint.companions()
    found = companions.get("tokenizer.json")
    if found is None:
        raise InputError(
            "no tokenizer.json beside the weights", where=model.name,
            hint="moecc run takes token ids instead of text",
        )  # fmt: skip
    data = read_bounded(found, MAX_TOKENIZER_BYTES) if isinstance(found, Path) else found
    return Tokenizer(data, model.name)


def continue_tokens(
    model: Model,
    tokens: list[int],
    count: int,
    *,
    dtype: DType = F32,
    temperature: float = 0.0,
    seed: int = 0,
    backend: Backend | None = None,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield up to `count` tokens that follow `tokens`, ending before one of `stop`.

    The whole sequence is run again for each token: simple, and the same graph that is exported.

    Args:
      model: the model.
      tokens: the prompt, not empty.
      count: the most tokens to add.
      dtype: the type to compute in.
      temperature: 0 takes the likeliest token, and larger values draw one.
      seed: of the draws.
      backend: the backend; xla by default.
      stop: tokens that end the text.

    Raises:
      UsageError: a temperature or seed that is negative or not a number.
      InputError: no logit is finite, or one is NaN or +∞.
    """
    _check_draws(temperature, seed)
    program = (backend or get_backend("xla")).compile(model.graph, dtype=dtype)
    params = Kept(model.params(dtype=dtype))
    rng = np.random.default_rng(seed)
    line = list(tokens)
    for _ in range(count):
        # Padding comes after the text, where no token of a causal model attends to it.
        width = -(-len(line) // BUCKET) * BUCKET
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(line)] = line
        logits = program.run(params, {"tokens": padded})["logits"][0, len(line) - 1]
        if not np.isfinite(logits.max()):
            raise InputError(
                "the logits contain NaN or infinity", where=model.name,
                expected="finite logits", found=f"a largest of {logits.max()}",
            )  # fmt: skip
        token = _choose(logits, temperature, rng)
        if token in stop:
            return
        line.append(token)
        yield token


def _check_draws(temperature: float, seed: int) -> None:
    problems = []
    if not 0 <= temperature < float("inf"):
        problems.append(
            Problem("not a temperature", "--temperature", "0 or more", str(temperature))
        )
    if seed < 0:
        problems.append(Problem("not a seed of draws", "--seed", "0 or more", str(seed)))
    if problems:
        raise UsageError(problems)


def _choose(logits: Array, temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    wide = logits.astype(np.float64)
    # The maximum is subtracted before dividing: a tiny temperature must not make it infinite.
    with np.errstate(over="ignore"):
        share = np.exp((wide - wide.max()) / temperature)
    return int(rng.choice(len(share), p=share / share.sum()))


def generate(
    model: Model, prompt: str, count: int, *, dtype: DType = F32, temperature: float = 0.0,
    seed: int = 0,
) -> str:  # fmt: skip
    """Return the text with which `model` continues `prompt`.

    Raises:
      InputError: the model is not decoder-only, the tokenizer cannot be used, the prompt has no
        tokens, or a token that the model does not know.
    """
    if list(model.graph.inputs) != ["tokens"]:
        raise InputError(
            "only a decoder-only model continues a text", where=model.name,
            expected="the input tokens", found=", ".join(model.graph.inputs),
            hint="moecc run takes the inputs of any model",
        )  # fmt: skip
    with load_tokenizer(model) as tokenizer:
        tokens = tokenizer.encode(prompt)
        if not tokens:
            raise InputError("the prompt has no tokens", hint="give some text to continue")
        if max(tokens) >= vocabulary(model):
            raise InputError(
                "the tokenizer has tokens that the model does not know", where=model.name
            )
        added = continue_tokens(
            model, tokens, count, dtype=dtype, temperature=temperature, seed=seed,
            stop=end_tokens(model),
        )  # fmt: skip
        return tokenizer.decode(list(added))


def end_tokens(model: Model) -> frozenset[int]:
    """Return the ids that end a text, from the model's config."""
    config = {} if model.checkpoint is None else model.checkpoint.config
    ends = config.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    return frozenset(i for i in ids if isinstance(i, int))
