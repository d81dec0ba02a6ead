"""Continuing texts: graphs that take tokens as they come, and caches between their runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from moecc.backend import Backend, Program
from moecc.errors import InputError, Problem, UsageError, raise_problems
from moecc.ir.conventions import DECODER_TOKENS, LOGITS, TOKENS
from moecc.ir.graph import Graph, Value
from moecc.ir.ops.attention import LENGTH_SCALINGS, RopeOp
from moecc.ir.structure import clone
from moecc.rewrite import P, fits
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.lazy import np
from moecc.types import Array, Arrays, Doubles, DType

# The graphs that continue texts, made of a model's by the pass ``decode``.

CAPACITY = "C"
"""The size of a cache, as the pass names it."""

_ROPE = P.rope(P.any())


@dataclass(frozen=True)
class DecodeGraphs:
    """What a text is continued by.

    Attributes:
      step: takes new tokens, and returns their logits and the caches.
      fill: the same without logits: for the tokens of a prompt but the last.
      encode: what an encoder makes for the decoder, once a text; None for a decoder alone.
      tokens: the name of the input that is continued.
    """

    step: Graph
    fill: Graph
    encode: Graph | None
    tokens: str

    @classmethod
    def of(cls, graph: Graph) -> DecodeGraphs:
        """Make the graphs of `graph`.

        Raises:
          InputError: a token depends on those after it, or there are no tokens and logits.
        """
        flat = rewritten(graph, "unroll-layers") if any(n.body for n in graph) else graph
        step = rewritten(flat, "decode")
        fill = clone(step)
        fill.drop_output(LOGITS)
        encode = None
        if DECODER_TOKENS in graph.inputs:
            encode = rewritten(flat, "decode{part=encode}")
        tokens = TOKENS if encode is None else DECODER_TOKENS
        return cls(step, rewritten(fill, "dce"), encode, tokens)

    @property
    def caches(self) -> dict[str, Value]:
        """The caches by name."""
        inputs = self.step.inputs
        return {name: inputs[name] for name in self.step.outputs if name in inputs}


def rewritten(graph: Graph, pipeline: str) -> Graph:
    """Return `graph` after a pipeline; it stays as it is."""
    copy = clone(graph)
    run_pipeline(copy, Pipeline.parse(pipeline))
    return copy


def unstretched(graph: Graph) -> int | None:
    """Return up to which length rotary positions do not depend on it; None where they never do."""
    ropes = [RopeOp.of_node(node) for node in graph.every_node() if fits(_ROPE, node)]
    return min((a.original_context for a in ropes if a.scaling in LENGTH_SCALINGS), default=None)


def _some(names: Iterable[str], count: int = 4) -> str:
    """Return names for a message, of which those after the first `count` are only counted."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def check_continues(graph: Graph, name: str) -> None:
    """Raise InputError unless `graph` makes logits of tokens, or of those of a decoder."""
    if not graph.inputs.keys() & {TOKENS, DECODER_TOKENS} or LOGITS not in graph.outputs:
        raise InputError(
            "the model continues no text", where=name,
            expected=f"the input {TOKENS} and the output {LOGITS}",
            found=f"{_some(graph.inputs)}; {_some(graph.outputs)}",
            hint="moecc run takes the inputs of any model",
        )  # fmt: skip


# A session: graphs that run many times on the same parameters, with values kept in between.


class Session(Protocol):
    """Parameters where the computation is, and values that stay there between runs.

    A run takes from the session the inputs that it is not given.  An output that has the name of
    an input is kept in its place, and not returned: a cache that goes in again.
    """

    def keep(self, values: Arrays) -> None:
        """Keep `values` under their names, in place of earlier ones."""
        ...

    def kept(self) -> dict[str, Array]:
        """Return what is kept, by name."""
        ...

    def run(self, graph: Graph, inputs: Arrays) -> dict[str, Array]:
        """Run `graph`, which is compiled once for each set of shapes; return its other outputs.

        Raises:
          InputError: an array is missing or does not fit its type.
        """
        ...


@runtime_checkable
class SessionBackend(Protocol):
    """A backend with sessions of its own."""

    def session(self, params: Arrays, *, dtype: DType) -> Session:
        """Return a session with `params`, each of which is read once, computing in `dtype`."""
        ...


@dataclass
class PlainSession:
    """A session of a backend that has none: all values go in and out at each run.

    Attributes:
      backend: compiles the graphs.
      params: the parameters by name.
      dtype: the type of the computation.
    """

    backend: Backend
    params: Arrays
    dtype: DType
    _values: dict[str, Array] = field(default_factory=dict)
    _programs: dict[Graph, Program] = field(default_factory=dict)

    def keep(self, values: Arrays) -> None:
        """Keep `values` under their names."""
        self._values.update(values)

    def kept(self) -> dict[str, Array]:
        """Return what is kept."""
        return dict(self._values)

    def run(self, graph: Graph, inputs: Arrays) -> dict[str, Array]:
        """Run `graph`."""
        if graph not in self._programs:
            self._programs[graph] = self.backend.compile(graph, dtype=self.dtype)
        arrays = {n: inputs[n] if n in inputs else self._values[n] for n in graph.inputs}
        outputs = self._programs[graph].run(self.params, arrays)
        self.keep({n: a for n, a in outputs.items() if n in graph.inputs})
        return {n: a for n, a in outputs.items() if n not in graph.inputs}


class ReadOnce(Mapping[str, Array]):
    """Parameters that are evaluated once and cached, for a model that runs many times."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self._params = params
        self._made: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._made:
            self._made[name] = self._params[name]
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def open_session(backend: Backend, params: Arrays, dtype: DType) -> Session:
    """Return a session of `backend`, or one that passes all values at each run."""
    if isinstance(backend, SessionBackend):
        return backend.session(params, dtype=dtype)
    return PlainSession(backend, ReadOnce(params), dtype)


# A batch of texts that is continued: prompts in one go, then a token of each at a time.

LEAST_WIDTH, MOST_DOUBLED_WIDTH = 32, 256
"""Prompts are padded to few widths: doubled up to the second, multiples of it beyond."""

LEAST_CAPACITY = 64
"""The places of the smallest cache; the others have twice as many as the next smaller one."""

MOST_RESERVED = 512
"""The most new tokens to have places from the start: a text may end long before it is full."""

NOWHERE = 1 << 30
"""The position of a place without a token: no token is so far on, so none sees it."""


class DecodingBatch:
    """Texts that grow by a token at a time.

    All texts of a batch write to the same place of their caches.  Prompts are padded on the right
    up to the longest; a padded place has the position `NOWHERE`, and what comes next is written
    behind it, with the position that it has in its text.
    """

    def __init__(
        self, graphs: DecodeGraphs, params: Arrays, *, backend: Backend, dtype: DType
    ) -> None:
        self.graphs = graphs
        self._session = open_session(backend, params, dtype)
        self._lengths = np.zeros(0, np.int32)
        self._positions = np.zeros((0, 0), np.int32)
        self._end = 0

    def begin(
        self, prompts: Sequence[Sequence[int]], memory: Arrays | None = None, count: int = 0
    ) -> Array:
        """Read `prompts`, none of which is empty; return the logits after each, ``[text, vocab]``.

        Args:
          prompts: the tokens of each text.
          memory: for an encoder-decoder, the inputs of the encoder.
          count: the number of steps to come; a cache without places for them grows, and another
            shape of it is compiled.

        Raises:
          InputError: an input of the encoder does not fit.
        """
        width = _width(max(map(len, prompts)) - 1)
        places = _capacity(width + 1 + min(count, MOST_RESERVED))
        self._lengths = np.zeros(len(prompts), np.int32)
        self._positions = np.full((len(prompts), places), NOWHERE, np.int32)
        self._end = 0
        self._session.keep({n: self._empty(v) for n, v in self.graphs.caches.items()})
        if self.graphs.encode is not None:
            self._session.keep(self._session.run(self.graphs.encode, memory or {}))
        if width:
            self._fill(prompts, width)
        return self.step([prompt[-1] for prompt in prompts])

    def step(self, tokens: Sequence[int]) -> Array:
        """Append a token to each text; return the logits after it, ``[text, vocab]``."""
        if self._end == self._positions.shape[1]:
            self._grow()
        column = np.asarray(tokens, np.int32)[:, None]
        positions = self._lengths[:, None]
        outputs = self._run(self.graphs.step, column, positions, positions)
        self._lengths = self._lengths + 1
        return outputs[LOGITS][:, 0]

    def _fill(self, prompts: Sequence[Sequence[int]], width: int) -> None:
        """Write all tokens but the last of each prompt into the caches."""
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt) - 1] = prompt[:-1]
        self._lengths = np.array([len(p) - 1 for p in prompts], np.int32)
        places = np.arange(width, dtype=np.int32)[None, :]
        is_token = places < self._lengths[:, None]
        self._run(
            self.graphs.fill, tokens,
            np.where(is_token, places, 0), np.where(is_token, places, NOWHERE),
        )  # fmt: skip

    def _run(
        self, graph: Graph, tokens: Array, positions: Array, key_positions: Array
    ) -> dict[str, Array]:
        start, self._end = self._end, self._end + tokens.shape[1]
        self._positions[:, start : self._end] = key_positions
        inputs: dict[str, Array] = {
            self.graphs.tokens: tokens,
            "positions": positions.astype(np.int32),
            "key_positions": self._positions,
            "start": np.array(start, np.int32),
        }
        arrays = {n: a for n, a in inputs.items() if n in graph.inputs}
        return self._session.run(graph, arrays)

    def _grow(self) -> None:
        """Double the places of the caches."""
        more = self._positions.shape[1]
        at = {n: v.type.sizes.index(CAPACITY) for n, v in self.graphs.caches.items()}
        caches = self._session.kept()
        self._session.keep({n: _padded(caches[n], axis, more) for n, axis in at.items()})
        padding = np.full_like(self._positions, NOWHERE)
        self._positions = np.concatenate([self._positions, padding], axis=1)

    def _empty(self, cache: Value) -> Array:
        return empty_cache(cache, *self._positions.shape)


def empty_cache(cache: Value, texts: int, places: int) -> Array:
    """Return zeros for a cache of so many texts, with room for so many tokens."""
    sizes = {cache.type.sizes[0]: texts, CAPACITY: places}
    shape = [s if isinstance(s, int) else sizes[s] for s in cache.type.sizes]
    return np.zeros(shape, cache.type.dtype.numpy)


def _width(least: int) -> int:
    if least > MOST_DOUBLED_WIDTH:
        return -(-least // MOST_DOUBLED_WIDTH) * MOST_DOUBLED_WIDTH
    return max(LEAST_WIDTH, 1 << (least - 1).bit_length()) if least else 0


def _capacity(least: int) -> int:
    return max(LEAST_CAPACITY, 1 << (least - 1).bit_length())


def _padded(array: Array, axis: int, more: int) -> Array:
    return np.pad(array, [(0, more if n == axis else 0) for n in range(array.ndim)])


# How the next token is chosen from logits.


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
        problems = [
            Problem(f"not {text}", f"--{name}", wanted, str(getattr(self, name.replace("-", "_"))))
            for holds, text, name, wanted in rules
            if not holds
        ]
        raise_problems(problems, UsageError)

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
