"""Statistics of the values of a model over texts, which methods read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

from safetensors.numpy import save

from moecc.errors import InputError
from moecc.formats.disk import write_durable
from moecc.formats.files import read_json_object
from moecc.formats.folder import SafetensorsFolder, open_folder
from moecc.formats.manifest import file_digest
from moecc.formats.source import Checkpoint
from moecc.support.lazy import np
from moecc.support.record import read_record, to_json
from moecc.types import Array, Doubles

# A folder of statistics: tensors in one safetensors file, and of what they are.
#
# ``capture.json`` says of which model and texts; a method refuses the statistics of another
# model.

FACTS, TENSORS = "capture.json", "model.safetensors"
SCHEMA = "moecc.capture/1"


@dataclass(frozen=True, kw_only=True)
class CaptureFacts:
    """The content of ``capture.json``: which model and texts the statistics are of.

    Attributes:
      schema: the version of this layout.
      model: the fingerprint of the model; see `fingerprint`.
      texts: the digests of the tokens of each text, by the names of the texts.
      tokens: the number of tokens that were read.
      sequence: the tokens of a sequence.
      active: the share of the neurons of a token that count as active.
      digest: the digest of the file of tensors.
    """

    schema: str = SCHEMA
    model: str
    texts: Mapping[str, str]
    tokens: int
    sequence: int
    active: float
    digest: str = ""


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return what tells a model from another: names, shapes, and the first row of each tensor."""
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype.name}{list(info.shape)}\0".encode())
        values = checkpoint.read(name, 0, min(1, info.shape[0])) if info.shape else (
            checkpoint.read(name))  # fmt: skip
        digest.update(values.tobytes())
    return digest.hexdigest()


def write_capture(folder: Path, facts: CaptureFacts, tensors: Mapping[str, Array]) -> CaptureFacts:
    """Write statistics into an empty folder; return their facts with the digest.

    Raises:
      MachineError: the disk is full.
    """
    write_durable(folder / TENSORS, save(dict(tensors), {"format": SCHEMA}))
    facts = replace(facts, digest=file_digest(folder / TENSORS))
    text = json.dumps(to_json(facts), indent=2, ensure_ascii=False) + "\n"
    write_durable(folder / FACTS, text.encode())
    return facts


def open_capture(path: Path) -> tuple[SafetensorsFolder, CaptureFacts]:
    """Open statistics; no tensor is read, but for its digest.

    Raises:
      InputError: the folder has none, or they were changed.
    """
    if not (path / FACTS).is_file():
        raise InputError(
            "not a folder of statistics", where=str(path), expected=f"{FACTS} and {TENSORS}",
            hint="moecc capture MODEL --text FILE --out DIR writes one",
        )  # fmt: skip
    document = read_json_object(path / FACTS, limit_bytes=1 << 20)
    facts = read_record(CaptureFacts, document, str(path / FACTS))
    tensors = open_folder(path, needs_config=False)
    digest = file_digest(path / TENSORS)
    if digest != facts.digest:
        tensors.close()
        raise InputError(
            "the statistics were changed after they were written", where=str(path / TENSORS),
            expected=facts.digest, found=digest,
        )  # fmt: skip
    return tensors, facts


# Sums over tokens from which statistics follow; they add up in any order, and are in float64.
#
# Of a dense block with the input x ``[embed]`` and the hidden value h ``[mlp]``: the mean and the
# covariance of x, the covariance of x with |h| and with which text a token is of, and how often
# two neurons are active at the same token.  A neuron is active at the tokens where |h| is among
# the largest (CMoE, 2502.04416, §3).  Of experts: how many choices went to each, the mean gate,
# the mean of its result, and of gate times the norm of its result (REAP, 2510.13999).


@dataclass
class BlockSums:
    """The sums of a dense block.

    Attributes:
      texts: the number of texts.
      embed: the width of the input.
      neurons: the width of the hidden value.
      share: the share of the neurons of a token that count as active.
    """

    texts: int
    embed: int
    neurons: int
    share: float
    tokens: Array = field(init=False)
    input: Doubles = field(init=False)
    products: Doubles = field(init=False)
    hidden: Doubles = field(init=False)
    cross: Doubles = field(init=False)
    pairs: Array = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = np.zeros(self.texts, np.int64)
        self.input = np.zeros((self.texts, self.embed))
        self.products = np.zeros((self.embed, self.embed))
        self.hidden = np.zeros(self.neurons)
        self.cross = np.zeros((self.embed, self.neurons))
        self.pairs = np.zeros((self.neurons, self.neurons), np.int32)

    def add(self, text: int, x: Array, hidden: Array) -> None:
        """Add tokens of one text.

        Args:
          text: its number.
          x: the inputs, ``[tokens, embed]``.
          hidden: the hidden values, ``[tokens, mlp]``.
        """
        wide, size = x.astype(np.float64), np.abs(hidden)
        self.tokens[text] += len(x)
        self.input[text] += wide.sum(0)
        self.products += wide.T @ wide
        self.hidden += size.sum(0, dtype=np.float64)
        self.cross += x.astype(np.float32).T @ size.astype(np.float32)
        active = _largest(size, ceil(self.share * self.neurons)).astype(np.float32)
        # Counts of one batch are below 2²⁴, so float32 holds them exactly.
        self.pairs += (active.T @ active).astype(np.int32)

    def statistics(self) -> dict[str, Array]:
        """Return the statistics by name: float32, and whole numbers for counts."""
        count = max(int(self.tokens.sum()), 1)
        mean = self.input.sum(0) / count
        hidden = self.hidden / count
        share = self.tokens / count
        sums = {
            "input.mean": mean,
            "input.covariance": self.products / count - np.outer(mean, mean),
            "hidden.mean": hidden,
            "hidden.cross": self.cross / count - np.outer(mean, hidden),
            "texts.cross": self.input / count - share[:, None] * mean,
        }
        statistics = {name: value.astype(np.float32) for name, value in sums.items()}
        return statistics | {"hidden.pairs": self.pairs}


@dataclass
class ExpertSums:
    """The sums of a layer of experts.

    Attributes:
      experts: the number of experts.
      embed: the width of a result.
    """

    experts: int
    embed: int
    choices: Doubles = field(init=False)
    gates: Doubles = field(init=False)
    saliency: Doubles = field(init=False)
    results: Doubles = field(init=False)

    def __post_init__(self) -> None:
        self.choices, self.gates, self.saliency = (np.zeros(self.experts) for _ in range(3))
        self.results = np.zeros((self.experts, self.embed))

    def add(self, chosen: Array, gates: Array, result: Array) -> None:
        """Add one choice of some tokens.

        Args:
          chosen: the experts, ``[tokens]``.
          gates: their gates, ``[tokens]``.
          result: what they made of the tokens, ``[tokens, embed]``.
        """
        wide = result.astype(np.float64)
        weight = gates.astype(np.float64) * np.linalg.norm(wide, axis=1)
        self.choices += np.bincount(chosen, minlength=self.experts)
        self.gates += np.bincount(chosen, gates.astype(np.float64), self.experts)
        self.saliency += np.bincount(chosen, weight, self.experts)
        np.add.at(self.results, chosen, wide)

    def statistics(self) -> dict[str, Array]:
        """Return the statistics by name, float32; those of an expert without tokens are 0."""
        count = np.maximum(self.choices, 1)
        sums = {
            "experts.share": self.choices / max(self.choices.sum(), 1),
            "experts.gate": self.gates / count,
            "experts.saliency": self.saliency / count,
            "experts.result": self.results / count[:, None],
        }
        return {name: value.astype(np.float32) for name, value in sums.items()}


def _largest(size: Array, count: int) -> Array:
    """Return which of each row are at least as large as the `count`-th largest, and not 0."""
    border = np.partition(size, -count, axis=1)[:, -count, None]
    return np.asarray((size >= border) & (size > 0))
