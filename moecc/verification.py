"""Whether two models are the same function: logits side by side, and what rounding alone does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moecc.backend import Backend, get_backend
from moecc.errors import InputError
from moecc.ir.dtypes import F32, DType
from moecc.models import Model

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5
"""The default bound on the largest difference of logits, relative to the largest logit."""


@dataclass(frozen=True)
class Difference:
    """How far two sets of logits ``[batch, seq, vocab]`` lie apart.

    Attributes:
      max_relative: max |Δ| / max |reference|.
      kl_nats: the mean over tokens of KL(reference ‖ other), in nats.
      top1_agreement: the share of tokens whose most likely next token is the same.
    """

    max_relative: float
    kl_nats: float
    top1_agreement: float


def difference(reference: Array, other: Array) -> Difference:
    """Return how far `other` lies from `reference`.

    Raises:
      InputError: the shapes differ, or a logit is not finite.
    """
    if reference.shape != other.shape:
        raise InputError(
            "the two models give logits of different shapes",
            expected=str(reference.shape), found=str(other.shape),
            hint="compare models with the same vocabulary",
        )  # fmt: skip
    for name, logits in (("reference", reference), ("model", other)):
        if not np.isfinite(logits).all():
            raise InputError(f"the logits of the {name} are not all finite")
    scale = float(np.abs(reference).max()) or 1.0
    # Token by token, so that two float64 copies of all logits are never held.
    kl, same, worst = 0.0, 0, 0.0
    rows = reference.reshape(-1, reference.shape[-1]), other.reshape(-1, other.shape[-1])
    for a, b in zip(*rows, strict=True):
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        worst = max(worst, float(np.abs(a64 - b64).max()))
        log_p, log_q = _log_softmax(a64), _log_softmax(b64)
        kl += float(np.sum(np.exp(log_p) * (log_p - log_q)))
        same += int(a64.argmax() == b64.argmax())
    count = len(rows[0])
    return Difference(worst / scale, max(kl / count, 0.0), same / count)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


@dataclass(frozen=True)
class Verdict:
    """What `compare` found.

    Attributes:
      model: the name of the model that was checked.
      source: the name of the model that it was checked against.
      tokens: the shape of the inputs, ``(batch, seq)``.
      dtype: the type of the model's weights, to which the source's were rounded first.
      compute_dtype: the type that both were computed in.
      difference: model against source, the source's weights rounded.
      rounding: the rounded source against the source; None where nothing was rounded.
      tolerance: the bound on `difference.max_relative`.
    """

    model: str
    source: str
    tokens: tuple[int, ...]
    dtype: str
    compute_dtype: str
    difference: Difference
    rounding: Difference | None
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the model is the source's function within the tolerance."""
        return self.difference.max_relative <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {**asdict(self), "tokens": list(self.tokens), "passed": self.passed}


def default_tokens(vocab: int, *, batch: int = 2, seq: int = 128, seed: int = 1) -> Array:
    """Return random token ids ``[batch, seq]``, the same for the same arguments.

    The default seed is one under which SmolLM2 has no token that becomes an attention sink late.
    Its huge activation amplifies rounding: at such a token (one of 256 under seed 0) the float32
    logits of the dense model itself are 7e-5 off its float64 logits.
    """
    return np.random.default_rng(seed).integers(0, vocab, (batch, seq)).astype(np.int32)


def compare(
    model: Model,
    source: Model,
    *,
    tokens: Array | None = None,
    tolerance: float = TOLERANCE,
    compute_dtype: DType = F32,
    backend: Backend | None = None,
) -> Verdict:
    """Run `model` and `source` on the same tokens and compare their logits.

    In float32 a difference may be rounding that the model amplifies; float64 tells the two apart.
    The source's weights are first rounded to the type of the model's, so that the comparison sees
    what the conversion did; what that rounding alone changes is reported apart.

    Raises:
      InputError: a model has no weights, or their vocabularies differ.
    """
    backend = backend or get_backend("xla")
    if tokens is None:
        tokens = default_tokens(min(vocabulary(model), vocabulary(source)))
    dtype = model.dtype

    def logits(which: Model, rounded: DType | None = None) -> Array:
        program = backend.compile(which.graph, dtype=compute_dtype)
        params = which.params(dtype=compute_dtype, rounded=rounded)
        return program.run(params, {"tokens": tokens})["logits"]

    rounded = logits(source, dtype)
    result = logits(model)
    plain = rounded if source.dtype == dtype else logits(source)
    return Verdict(
        model=model.name,
        source=source.name,
        tokens=tokens.shape,
        dtype=dtype.name,
        compute_dtype=compute_dtype.name,
        difference=difference(rounded, result),
        rounding=None if plain is rounded else difference(plain, rounded),
        tolerance=tolerance,
    )


def vocabulary(model: Model) -> int:
    """Return the number of tokens that `model` knows."""
    size = model.graph.outputs["logits"].type["vocab"].size
    assert isinstance(size, int), "a parameter has the axis vocab, so its size is known"
    return size
