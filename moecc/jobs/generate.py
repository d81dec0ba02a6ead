"""``moecc generate``: continue a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moecc.backend import Backend, get_backend
from moecc.chat import read_messages, read_template
from moecc.decoding import (
    DecodeGraphs,
    DecodingBatch,
    ReadOnce,
    Sampling,
    check_continues,
    unstretched,
)
from moecc.errors import InputError, Problem, UsageError, raise_problems
from moecc.formats.files import read_bounded
from moecc.ir.conventions import DECODER_TOKENS, LOGITS, TOKENS
from moecc.ir.structure import length_bounds
from moecc.jobs.command import (
    Amount,
    ComputeType,
    Load,
    ModelName,
    Report,
    Seed,
    Spelling,
    Weights,
    say_weights,
)
from moecc.model.inputs import context_remarks, length_problems, longest, stated_context
from moecc.model.open import OpenedModel, load_files, open_model
from moecc.support.console import say
from moecc.support.extras import require
from moecc.support.lazy import np
from moecc.support.untyped import JsonDict
from moecc.tokenizer import Tokenizer
from moecc.types import F32, Array, Arrays, DType, float_type

if TYPE_CHECKING:
    from moecc.ir.graph import Graph


# Continue tokens, greedily or with seeded draws: a batch of texts, or one.

GREEDY = Sampling()

GIVE = "give some text to continue"


@dataclass(frozen=True)
class Continuing:
    """Settings for the continuation of texts.

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


class Continuer:
    """Continues texts of a model, one batch after the other.

    Weights are read, and programs compiled, for the first; they stay in memory for the next.
    """

    def __init__(self, model: OpenedModel, backend: Backend | None = None) -> None:
        self._model = model
        self._backend = backend
        self._readers: dict[tuple[DType, bool], DecodingBatch | _Rereader] = {}

    def texts(
        self, prompts: Sequence[Sequence[int]], how: Continuing, memory: Arrays | None = None
    ) -> Iterator[list[int | None]]:
        """Yield the next token of each text, None for those that have ended, until all have.

        Prompts may have different lengths.  Keys and values of earlier tokens are kept, so that a
        token costs what it adds; of a model whose rotary positions depend on the length of the
        text, longer texts than its original context are read again for each token.

        Args:
          prompts: the tokens of each text, or of an encoder-decoder those that its decoder begins
            with.
          how: how they are continued.
          memory: for an encoder-decoder, the inputs of its encoder.

        Raises:
          UsageError: a number of the sampling is none of its kind.
          InputError: the model cannot continue texts, a prompt is empty, a text becomes longer
            than the model has positions, no logit is finite, or one is NaN or +∞.
        """
        model, longest = self._model, max(map(len, prompts), default=0) + how.count
        how.check()
        check_continues(model.graph, model.name)
        check_prompts(model, prompts)
        _check_length(model, longest)
        original = unstretched(model.graph)
        is_stretched = original is not None and longest > original and memory is None
        return _continued(self._reader(how.dtype, is_stretched), prompts, how, memory, model.name)

    def _reader(self, dtype: DType, is_stretched: bool) -> DecodingBatch | _Rereader:
        key = dtype, is_stretched
        if key not in self._readers:
            graph, params = self._model.graph, self._model.params(dtype=dtype)
            backend = self._backend or get_backend("xla")
            self._readers[key] = (
                _Rereader(graph, ReadOnce(params), backend, dtype)
                if is_stretched
                else DecodingBatch(DecodeGraphs.of(graph), params, backend=backend, dtype=dtype)
            )
        return self._readers[key]


def _continued(
    reader: DecodingBatch | _Rereader,
    prompts: Sequence[Sequence[int]],
    how: Continuing,
    memory: Arrays | None,
    name: str,
) -> Iterator[list[int | None]]:
    rngs = how.sampling.generators(len(prompts))
    alive = [True] * len(prompts)
    last: list[int] = []
    for _ in range(how.count):
        logits = reader.step(last) if last else reader.begin(prompts, memory, how.count - 1)
        largest = logits[alive].max(axis=-1)
        if not np.isfinite(largest).all():
            raise InputError(
                "the logits contain NaN or infinity", where=name,
                expected="finite logits", found=f"a largest of {largest[~np.isfinite(largest)][0]}",
            )  # fmt: skip
        last = [
            how.sampling.choose(row, rng) if is_alive else prompt[-1]
            for row, rng, is_alive, prompt in zip(logits, rngs, alive, prompts, strict=True)
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

    def begin(self, prompts: Sequence[Sequence[int]], memory: Arrays | None, count: int) -> Array:
        """Return the logits after each prompt, ``[text, vocab]``; there is no cache for `count`."""
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


def check_prompts(model: OpenedModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raise InputError for prompts without tokens, or with tokens that `model` does not know."""
    size = model.graph.outputs[LOGITS].type["vocab"].fixed_size
    problems = [] if prompts else [Problem("there are no prompts", hint=GIVE)]
    for number, prompt in enumerate(prompts, 1):
        where = f"prompt {number}" if len(prompts) > 1 else model.name
        strange = [token for token in prompt if not 0 <= token < size]
        if not prompt:
            problems.append(Problem("the prompt has no tokens", where, hint=GIVE))
        elif strange:
            problem = "the tokenizer has tokens that the model does not know"
            problems.append(Problem(problem, where, f"ids below {size}", str(strange[0])))
    raise_problems(problems)


def _check_length(model: OpenedModel, count: int) -> None:
    """Raise InputError if `count` tokens are more than a learned table has positions for."""
    most = longest(model.graph)
    # The last token is not read again.
    if most is not None and count - 1 > most:
        raise InputError(
            "the text would be longer than the model has positions", where=model.name,
            expected=f"at most {most + 1} tokens, those to add included", found=str(count),
            hint="give a shorter prompt, or a smaller --tokens",
        )  # fmt: skip


# Continue texts: from prompts to texts, with the tokenizer beside the weights.

MAX_TOKENIZER_BYTES = 256 << 20

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generated:
    """What follows a prompt.

    Attributes:
      prompt: the prompt.
      text: what follows.
      tokens: its ids.
      is_ended: whether a token that stops a text would follow.
      full_text: the prompt with what follows; of an encoder-decoder what follows alone.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    is_ended: bool
    full_text: str


def load_tokenizer(model: OpenedModel) -> Tokenizer:
    """Return the tokenizer next to the weights of `model`, in a subprocess.

    Raises:
      InputError: there is no ``tokenizer.json``, or it cannot be read within its bounds.
      MachineError: the extra ``tokenizers`` is not installed.
    """
    content = model.tokenizer
    if content is None:
        raise InputError(
            "no tokenizer.json beside the weights", where=model.name,
            hint="moecc run takes token ids instead of text",
        )  # fmt: skip
    data = read_bounded(content, MAX_TOKENIZER_BYTES) if isinstance(content, Path) else content
    return Tokenizer(data, model.name)


def generate_texts(
    model: OpenedModel,
    prompts: Sequence[str],
    how: Continuing,
    *,
    stop: Sequence[str] = (),
    continuer: Continuer | None = None,
    chat: bool = False,
) -> list[Generated]:
    """Return what follows each prompt; of an encoder-decoder, what it makes of each.

    Args:
      model: the model.
      prompts: the texts.
      how: how they are continued.
      stop: tokens that end a text besides those of the config, as the vocabulary writes them.
      continuer: of the model, where its weights are to stay in memory.
      chat: whether prompts are messages of a user, or JSON lists of messages, for the chat template
        beside the weights.

    Raises:
      UsageError: the vocabulary has no such token to stop at, or a number of the sampling is wrong.
      InputError: the model cannot continue texts, the tokenizer cannot be used, a prompt has no
        tokens, or a token that the model does not know, or becomes too long.
    """
    how.check()
    check_continues(model.graph, model.name)
    strange = sorted(model.graph.inputs.keys() - {"tokens", "mask", DECODER_TOKENS})
    if strange:
        raise InputError(
            "a text is not all that the model takes", where=model.name,
            expected=f"the input tokens, of an encoder-decoder also {DECODER_TOKENS}",
            found=", ".join(model.graph.inputs), hint="moecc run takes the inputs of any model",
        )  # fmt: skip
    with load_tokenizer(model) as tokenizer:
        ends = end_tokens(model) | how.stop | _stops(tokenizer, stop)
        how = replace(how, stop=ends)
        # The template writes special tokens itself.
        asked = _chats(model, prompts) if chat else prompts
        tokens = tokenizer.encode_all(asked, special=not chat)
        check_prompts(model, tokens)
        is_encoded = DECODER_TOKENS in model.graph.inputs
        # The last token is not read again.
        most = how.count - 1 + (0 if is_encoded else max(map(len, tokens), default=0))
        for remark in context_remarks(model.name, stated_context(model.graph), most):
            say(f"remark: {remark}")
        by = continuer or Continuer(model)
        columns = _from_encoder(model, by, tokens, how) if is_encoded else _columns(by, tokens, how)
        rows = zip(prompts, columns, strict=True)
        texts = [(prompt, tokenizer.decode(ids), tuple(ids)) for prompt, ids in rows]
    is_answer = is_encoded or chat
    return [
        Generated(prompt, text, ids, len(ids) < how.count, text if is_answer else prompt + text)
        for prompt, text, ids in texts
    ]


def _chats(model: OpenedModel, prompts: Sequence[str]) -> list[str]:
    """Return the texts that ask for an answer to each prompt, by the model's chat template."""
    companions = {} if model.checkpoint is None else model.checkpoint.companions()
    template = read_template(companions, model.name)
    return [template.render(read_messages(p), asks=True) for p in prompts]


def _columns(
    by: Continuer, prompts: Prompts, how: Continuing, memory: dict[str, Array] | None = None
) -> list[list[int]]:
    """Return the tokens that follow each prompt."""
    columns: list[list[int]] = [[] for _ in prompts]
    for row in by.texts(prompts, how, memory):
        for text, token in zip(columns, row, strict=True):
            if token is not None:
                text.append(token)
    return columns


def _from_encoder(
    model: OpenedModel, by: Continuer, texts: Prompts, how: Continuing
) -> list[list[int]]:
    """Return what a decoder makes of the texts that its encoder reads.

    Without an input that masks padding, texts of different lengths are read one by one.
    """
    first = [decoder_start(model)]
    if "mask" not in model.graph.inputs and len({len(text) for text in texts}) > 1:
        return [_from_encoder(model, by, [text], how)[0] for text in texts]
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    bounds = length_bounds(model.graph)
    raise_problems(length_problems(model.graph.inputs[TOKENS], tokens, model.name, bounds))
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([[len(text)] for text in texts])
    memory: dict[str, Array] = {"tokens": tokens}
    if "mask" in model.graph.inputs:
        memory["mask"] = np.arange(tokens.shape[1])[None, :] < lengths
    return _columns(by, [first] * len(texts), how, memory)


def _stops(tokenizer: Tokenizer, tokens: Sequence[str]) -> frozenset[int]:
    ids = dict(zip(tokens, tokenizer.ids(tokens), strict=True)) if tokens else {}
    problems = [
        Problem("the vocabulary has no such token", "--stop", found=repr(token),
                hint="a single token, as tokenizer.json writes it")
        for token, id in ids.items()
        if id is None
    ]  # fmt: skip
    raise_problems(problems, UsageError)
    return frozenset(id for id in ids.values() if id is not None)


def end_tokens(model: OpenedModel) -> frozenset[int]:
    """Return the ids that end a text, from the model's config."""
    ends = _config(model).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    return frozenset(i for i in ids if isinstance(i, int))


def decoder_start(model: OpenedModel) -> int:
    """Return the token that the decoder of an encoder-decoder begins with, from its config."""
    config = _config(model)
    candidates = (config.get(name) for name in ("decoder_start_token_id", "pad_token_id"))
    return next((token for token in candidates if isinstance(token, int)), 0)


def _config(model: OpenedModel) -> JsonDict:
    return {} if model.checkpoint is None else dict(model.checkpoint.config)


def generate(
    model: ModelName,
    *,
    prompt: Annotated[Sequence[str], Spelling("TEXT")],
    chat: bool = False,
    tokens: Amount = 24,
    temperature: Annotated[float, Spelling("T", low=0)] = 0.0,
    top_k: Annotated[int, Spelling("K", low=0)] = 0,
    top_p: Annotated[float, Spelling("P")] = 1.0,
    stop: Annotated[Sequence[str], Spelling("TOKEN")] = (),
    seed: Seed = 0,
    dtype: ComputeType = "f32",
    weights: Weights = None,
    load: Load = (),
) -> Report:
    """Continue texts with a model.

    Prompts and continuations are printed.

    Args:
      prompt: Text to continue; may be repeated.
      chat: Answer each prompt by the model's chat template; a JSON list of messages is one prompt.
      tokens: Maximal number of tokens to add.
      temperature: Temperature of the draws; 0 takes the likeliest token.
      top_k: Number of likeliest tokens to draw from; 0 for all.
      top_p: Probability of the likeliest tokens to draw from, together.
      stop: Token that ends a text; may be repeated.
      seed: Seed for the draws.

    Example:
      moecc generate smollm2-8x --prompt "The capital of France is"
    """
    require("generating", ("xla", "tokenizers"))
    load_files(load)
    continuing = Continuing(
        tokens, Sampling(temperature, top_k, top_p, seed), dtype=float_type(dtype)
    )
    with open_model(model, weights=weights) as opened:
        say_weights(opened, model)
        texts = generate_texts(opened, prompt, continuing, stop=stop, chat=chat)
    rows = [
        {"prompt": t.prompt, "text": t.text, "tokens": list(t.tokens), "stopped": t.is_ended}
        for t in texts
    ]
    return Report(
        "generate", {"model": model, "texts": rows},
        lambda: "\n\n".join(t.full_text for t in texts) + "\n", is_raw=True,
    )  # fmt: skip
