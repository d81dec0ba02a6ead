"""Continue texts: from prompts to texts, with the tokenizer beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moecc.decoding import DECODER_TOKENS, Sampling, check_continues
from moecc.errors import InputError, Problem, UsageError
from moecc.formats.files import read_bounded
from moecc.model.open import Model
from moecc.tasks.continue_tokens import Continuer, Continuing, check_prompts
from moecc.tokenizer.process import Tokenizer
from moecc.types import F32, Array, DType

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
      whole: the prompt with what follows; of an encoder-decoder what follows alone.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    is_ended: bool
    whole: str


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


def generate(
    model: Model, prompt: str, count: int, *, dtype: DType = F32, temperature: float = 0.0,
    seed: int = 0,
) -> str:  # fmt: skip
    """Return the text with which `model` continues `prompt`. Raises as `generate_texts`."""
    how = Continuing(count, Sampling(temperature, seed=seed), dtype=dtype)
    return generate_texts(model, [prompt], how)[0].text


def generate_texts(
    model: Model,
    prompts: Sequence[str],
    how: Continuing,
    *,
    stop: Sequence[str] = (),
    continuer: Continuer | None = None,
) -> list[Generated]:
    """Return what follows each prompt; of an encoder-decoder, what it makes of each.

    Args:
      model: the model.
      prompts: the texts.
      how: how they are continued.
      stop: tokens that end a text besides those of the config, as the vocabulary writes them.
      continuer: of the model, where its weights are to stay in memory.

    Raises:
      UsageError: the vocabulary has no such token to stop at, or a number of the sampling is wrong.
      InputError: the model cannot continue texts, the tokenizer cannot be used, a prompt has no
        tokens, or a token that the model does not know, or becomes too long.
    """
    how.check()
    _check_takes_text(model)
    with load_tokenizer(model) as tokenizer:
        ends = end_tokens(model) | how.stop | _stops(tokenizer, stop)
        how = replace(how, stop=ends)
        tokens = tokenizer.encode_all(prompts)
        check_prompts(model, tokens)
        is_encoded = DECODER_TOKENS in model.graph.inputs
        read = _from_encoder if is_encoded else _columns
        by = continuer or Continuer(model)
        rows = zip(prompts, read(model, by, tokens, how), strict=True)
        made = [(prompt, tokenizer.decode(ids), tuple(ids)) for prompt, ids in rows]
    return [
        Generated(prompt, text, ids, len(ids) < how.count, text if is_encoded else prompt + text)
        for prompt, text, ids in made
    ]


def _columns(
    model: Model,
    by: Continuer,
    prompts: Prompts,
    how: Continuing,
    memory: dict[str, Array] | None = None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt."""
    made: list[list[int]] = [[] for _ in prompts]
    for row in by.texts(prompts, how, memory):
        for text, token in zip(made, row, strict=True):
            if token is not None:
                text.append(token)
    return made


def _from_encoder(model: Model, by: Continuer, texts: Prompts, how: Continuing) -> list[list[int]]:
    """Return what a decoder makes of the texts that its encoder reads.

    Without an input that masks padding, texts of different lengths are read one by one.
    """
    first = [decoder_start(model)]
    if "mask" not in model.graph.inputs and len({len(text) for text in texts}) > 1:
        return [_from_encoder(model, by, [text], how)[0] for text in texts]
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([[len(text)] for text in texts])
    memory: dict[str, Array] = {"tokens": tokens}
    if "mask" in model.graph.inputs:
        memory["mask"] = np.arange(tokens.shape[1])[None, :] < lengths
    return _columns(model, by, [first] * len(texts), how, memory)


def _check_takes_text(model: Model) -> None:
    check_continues(model.graph, model.name)
    strange = sorted(model.graph.inputs.keys() - {"tokens", "mask", DECODER_TOKENS})
    if strange:
        raise InputError(
            "a text is not all that the model takes", where=model.name,
            expected=f"the input tokens, of an encoder-decoder also {DECODER_TOKENS}",
            found=", ".join(model.graph.inputs), hint="moecc run takes the inputs of any model",
        )  # fmt: skip


def _stops(tokenizer: Tokenizer, tokens: Sequence[str]) -> frozenset[int]:
    found = dict(zip(tokens, tokenizer.ids(tokens), strict=True)) if tokens else {}
    problems = [
        Problem("the vocabulary has no such token", "--stop", found=repr(token),
                hint="a single token, as tokenizer.json writes it")
        for token, id in found.items()
        if id is None
    ]  # fmt: skip
    if problems:
        raise UsageError(problems)
    return frozenset(id for id in found.values() if id is not None)


def end_tokens(model: Model) -> frozenset[int]:
    """Return the ids that end a text, from the model's config."""
    ends = _config(model).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    return frozenset(i for i in ids if isinstance(i, int))


def decoder_start(model: Model) -> int:
    """Return the token that the decoder of an encoder-decoder begins with, from its config."""
    config = _config(model)
    found = (config.get(name) for name in ("decoder_start_token_id", "pad_token_id"))
    return next((token for token in found if isinstance(token, int)), 0)


def _config(model: Model) -> dict[str, object]:
    return {} if model.checkpoint is None else dict(model.checkpoint.config)
