"""Statistics of a model's values over texts, and initial weights of a model without any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, isfinite, prod, sqrt
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from moecc.errors import InputError, UsageError
from moecc.formats.adapter import SeveralCheckpoints
from moecc.formats.files import read_json_object, write_durable
from moecc.formats.folder import SafetensorsFolder, open_folder
from moecc.formats.manifest import file_digest
from moecc.formats.source import Checkpoint
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.axes import EmbeddingOp, JoinOp
from moecc.ir.structure import uses_of
from moecc.ir.traits import Role
from moecc.model.open import OpenedModel
from moecc.rewrite.passes import Statistics
from moecc.support.lazy import np
from moecc.support.record import read_record, to_json
from moecc.types import F32, Array, Doubles, DType, TensorType
from moecc.weights.arithmetic import STATISTICS, Cast
from moecc.weights.draws import Normal, derive_key
from moecc.weights.expr import Expr, Full, sources

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


# Initial weights for training from scratch: draws in place of a checkpoint's tensors.


def initialise(graph: Graph, *, seed: int = 0, scale: float = 1.0) -> None:
    """Replace the checkpoint tensors of the parameters of `graph` by random draws.

    A matrix is normal with variance `scale` / fan-in, a table of embeddings with `scale` / width
    (LeCun et al. 1998; a Switch Transformer has a scale of 0.1, section 2.4); gains are 1, and
    biases and single numbers of activations 0.  Parameters are drawn whole, so that experts that
    were copies become different; values that a pass drew or filled stay.  A draw depends on seed
    and parameter name alone.

    Raises:
      InputError: the use of a parameter does not determine its scale.
      UsageError: the scale is not a positive number.
    """
    if not (isfinite(scale) and scale > 0):
        raise UsageError("the scale of the weights must be positive", found=str(scale))
    for param in graph.params.values():
        if param.weight is None or sources(param.weight):
            param.weight = _drawn(param, seed, scale)


def _drawn(param: Value, seed: int, scale: float) -> Expr:
    use = next(uses_of(param), None)
    if use is None or _role(*use) is Role.BIAS:
        return Full(0.0, param.type)
    if _role(*use) is Role.GAIN:
        return Full(1.0, param.type)
    key = derive_key(seed, f"initialise {param.name}")
    std = sqrt(scale / _fan_in(*use))
    draw = Normal(TensorType(F32, param.type.axes), std, key)
    return draw if param.type.dtype is F32 else Cast(draw, param.type.dtype)


def _role(node: Node, value: Value) -> Role:
    at = node.operands.index(value)
    if node.op.chooses and at > 0:
        return Role.BIAS  # it takes part in a choice
    role = node.op.role(at)
    if role is Role.VALUE and node.op.elementwise and len(value.type) < 2:
        return Role.BIAS  # numbers that bend an activation or a decay, or at which one is cut
    return role


def _fan_in(node: Node, value: Value) -> int:
    """Return the number of inputs that each output sums; for an embedding, the width."""
    role = _role(node, value)
    if role is Role.MATRIX or node.op.name == "sum":
        # What is summed away: in a convolution also the places of a window, of which a sum takes
        # one where each channel has weights of its own.
        names = tuple(a.name for a in value.type if a.name not in node.result.type)
    elif role is Role.TABLE:
        axis = EmbeddingOp.of_node(node).axis
        names = tuple(a.name for a in value.type if a.name != axis)
    elif node.op.name == "join":
        # Tokens of every image beside its patches: rows of a table, all of which are read.
        names = tuple(a.name for a in value.type if a.name != JoinOp.of_node(node).axis)
    elif node.op.normalises:
        # A table whose rows are normalised before they are looked up.
        names = tuple(node.mixes)
    else:
        raise InputError(
            "the initial scale of this parameter is unknown", where=f"%{value.name}",
            expected="a matrix, a table of embeddings, a gain or a bias",
            found=f"an operand of {node.op.name}",
            hint="give it a weight expression of its own, or draw weights before this pass",
        )  # fmt: skip
    return max(prod(s for s in (value.type[n].size for n in names) if isinstance(s, int)), 1)


# Routers in the type of the run, for comparison with what ST-MoE §3.3 found unstable.

SELECTIVE = "f32"
"""The type of routers under selective precision."""


def set_router_dtype(
    graph: Graph, router_dtype: str, dtype: DType, where: str = "--router-dtype"
) -> None:
    """Let the routers of `graph` compute in the type of the run instead of in float32.

    Products that ask for float32 and the choices of experts change, in place; losses of the
    logits stay in float32.

    Args:
      graph: the graph.
      router_dtype: ``f32``, or the name of `dtype`.
      dtype: the type of the run.
      where: what asks for it, for messages.

    Raises:
      UsageError: another type is asked for.
    """
    if router_dtype == SELECTIVE:
        return
    if router_dtype != dtype.name:
        raise UsageError(
            "routers compute in float32 or in the type of the run",
            where=where,
            expected=f"{SELECTIVE} or {dtype.name}",
            found=router_dtype,
        )
    for node in graph.every_node():
        if "precision" in node.op.attrs:
            node.attrs = {**node.attrs, "precision": "default"}


# A routing rule outside a graph, for arrays of NumPy, jax or torch alike.


def updated_bias(bias: Any, load: Any, rate: float = 1e-3) -> Any:
    """Return the bias of loss-free balancing after a step (Wang et al. 2024, DeepSeek-V3).

    ``b + rate · sign(mean load − load)``: raises the bias of an expert with less than its share.
    Called once a step, outside the gradient, on the loads of the whole batch.

    Args:
      bias: ``[expert]``, or ``[layer, expert]``.
      load: the number of choices of each expert, of the same shape.
      rate: the step, γ.
    """
    missing = load.mean(-1)[..., None] - load
    return bias + rate * ((missing > 0) * 1.0 - (missing < 0) * 1.0)


# Statistics beside a model, which its weights may be made of.


def add_statistics(model: OpenedModel, folder: str | None) -> Statistics | None:
    """Open statistics, which then are read beside the weights of `model`; return what they are.

    Args:
      model: the model; its checkpoint becomes one of both.
      folder: the folder of the statistics, or None.

    Raises:
      InputError: there are none, they were changed, or they are of another model.
    """
    if folder is None:
        return None
    checkpoint = model.weights
    tensors, facts = open_capture(Path(folder))
    several = checkpoint if isinstance(checkpoint, SeveralCheckpoints) else None
    base = checkpoint if several is None else several.base
    digest = fingerprint(base)
    if digest != facts.model:
        tensors.close()
        raise InputError(
            "the statistics are of another model", where=folder, expected=f"{base.path}: {digest}",
            found=facts.model, hint="moecc capture takes them of this one",
        )  # fmt: skip
    branches = {} if several is None else several.branches
    model.checkpoint = SeveralCheckpoints(base, branches, {STATISTICS: tensors})
    shapes = {name: info.shape for name, info in tensors.tensors.items()}
    return Statistics(tuple(facts.texts), shapes)
