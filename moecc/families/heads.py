"""Heads of encoders: the layers of a checkpoint that turn hidden states into logits.

A head is a list of steps, each an operation and the modules that it reads:

- ``first``: the state of the first token; ``mean``: the mean over the sequence.
- ``first-and-mean``: the first state, and behind it the mean of all others.
- ``linear MODULE``: to the width of its matrix; ``norm MODULE``; without a bias
  ``linear-unbiased`` and ``norm-unbiased``.
- ``activation``: the activation of the blocks; ``gelu``, ``relu`` and ``tanh`` by name.
- ``tokens MODULE BIAS``: to the vocabulary, by the table of tokens where the two are tied.
- ``labels MODULE``: to the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecc.ir.conventions import DECODER_TOKENS

if TYPE_CHECKING:
    from moecc.ir.graph import Graph

LOGITS, POOLED = "head.logits", "head.pooled"
"""The outputs of a graph with a head: logits of its task, or the pooled state of a base model."""

MASKED_LM = "MaskedLM"
"""The task of a head that predicts tokens."""

LABEL_KEYS = ("id2label", "label2id", "problem_type")
"""The keys of a config about the labels of a head."""

HUB_TASKS = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    MASKED_LM: "fill-mask",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "CTC": "automatic-speech-recognition",
}
"""The Hub's tasks of heads, by the classes of transformers."""

POOLER = ("first", "linear pooler.dense", "tanh")
CLASSIFIER = "labels classifier"


@dataclass(frozen=True)
class ModelHead:
    """The head of a checkpoint.

    Attributes:
      task: the task as classes of transformers call it, ``MaskedLM``; empty for a pooler alone.
      steps: its steps.
      widths: the number of outputs of each matrix, by its module.
      is_tied: whether the table of tokens is the last matrix.
    """

    task: str
    steps: tuple[str, ...]
    widths: Mapping[str, int]
    is_tied: bool = True

    @property
    def output(self) -> str:
        """The name of its output."""
        return LOGITS if self.task else POOLED


def stated_head(
    heads: Mapping[str, tuple[str, ...]],
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Callable[[str], str],
) -> ModelHead | None:
    """Return the head that a checkpoint names and has, or None.

    Args:
      heads: the steps of the family's heads by their tasks.
      config: the content of config.json.
      shapes: the shapes of the tensors of the checkpoint.
      stored: returns the name in the file of a tensor.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    task = name.partition("For")[2]
    if task not in heads:
        return None
    is_tied = config.get("tie_word_embeddings") is not False
    modules = head_modules(heads[task])
    read = [f"{module}.weight" for module in modules] + head_biases(heads[task])
    if is_tied:
        read = [n for n in read if n not in tied_names(heads[task])]
    if not all(stored(n) in shapes for n in read):
        return None
    widths = {m: shapes[n][0] for m in modules if (n := stored(f"{m}.weight")) in shapes}
    return ModelHead(task, heads[task], widths, is_tied)


def has_head(graph: Graph) -> bool:
    """Whether the graph of an encoder has the head of its checkpoint."""
    return bool({LOGITS, POOLED} & graph.outputs.keys())


def hub_task(graph: Graph) -> str:
    """Return the Hub's task of a model."""
    is_audio, is_speech = "audio" in graph.inputs, "features" in graph.inputs
    if LOGITS in graph.outputs:
        task = HUB_TASKS.get(str(graph.attrs.get("head")), "feature-extraction")
        return "audio-classification" if is_audio and task == "text-classification" else task
    if "logits" not in graph.outputs:
        return "image-feature-extraction" if "pixels" in graph.inputs else "feature-extraction"
    if DECODER_TOKENS in graph.inputs:
        return HUB_TASKS["CTC"] if is_speech else "text2text-generation"
    return "text-generation"


def head_modules(steps: Sequence[str]) -> list[str]:
    """Return the modules with a matrix or a scale."""
    return [words[1] for step in steps if len(words := step.split()) > 1]


def head_biases(steps: Sequence[str]) -> list[str]:
    """Return the biases, of which that of the vocabulary has a name of its own."""
    words = [step.split() for step in steps if " " in step and "-unbiased" not in step]
    return [w[2] if len(w) > 2 else f"{w[1]}.bias" for w in words]


def tied_names(steps: Sequence[str]) -> list[str]:
    """Return the names of copies of the table of tokens and of the bias of the vocabulary."""
    words = next((s.split() for s in steps if s.startswith("tokens ")), [])
    return [f"{words[1]}.weight", *({f"{words[1]}.bias"} - {words[2]})] if words else []
