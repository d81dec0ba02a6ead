"""Checkpoints in memory, for tests of families and conversions: no file is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from moecc.checkpoint.source import TensorInfo
from moecc.families.configs import ModelConfig
from moecc.support.closing import Closing
from moecc.types.arrays import Array
from moecc.types.dtypes import DTYPES, F32, DType
from moecc.weights.expr import Expr, sources


class MemoryCheckpoint(Closing):
    """A checkpoint whose tensors are arrays; see `moecc.checkpoint.source.Checkpoint`.

    Attributes:
      reads: the names of the tensors that were read, in order.
    """

    format = "safetensors"

    def __init__(self, config: Mapping[str, object], arrays: Mapping[str, Array]) -> None:
        self.path = Path("memory")
        self.config: dict[str, object] = dict(config)
        self.arrays = dict(arrays)
        self.reads: list[str] = []

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the arrays are, by name."""
        return {
            name: TensorInfo(name, _dtype(array), array.shape, array.nbytes, self.path, 0)
            for name, array in self.arrays.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor."""
        self.reads.append(name)
        return self.arrays[name][start:stop]

    def companions(self) -> dict[str, Path | bytes]:
        """Return no files."""
        return {}

    def files(self) -> list[Path]:
        """Return no files."""
        return []

    def close(self) -> None:
        """Do nothing."""


def _dtype(array: Array) -> DType:
    return next(d for d in DTYPES.values() if d.kind != "key" and d.numpy == array.dtype)


def random_checkpoint(
    config: ModelConfig, seed: int = 0, dtype: DType = F32, layout: str = "experts"
) -> MemoryCheckpoint:
    """Return a checkpoint of `config` with random weights.

    Matrices are normal and keep the variance of what goes through them; the scales of norms are
    around 1.

    Args:
      config: a config of any family.
      seed: of the numbers.
      dtype: the element type of all tensors.
      layout: how experts are stored, ``experts`` or ``fused``.
    """
    from moecc.families.building import build_model

    graph = build_model(config, lambda name: dtype, layout=layout)
    weights = [value.weight for value in graph.params.values() if value.weight is not None]
    shapes = {s.name: s.type.shape for weight in weights for s in sources(weight)}
    rng = np.random.default_rng(seed)
    arrays = {name: _draw(rng, name, shape, dtype) for name, shape in shapes.items()}
    return MemoryCheckpoint(config.to_json(), arrays)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: DType) -> Array:
    drawn = rng.standard_normal(shape)
    if "norm" in name:
        drawn = 1 + 0.1 * drawn
    elif len(shape) > 1:
        drawn /= np.sqrt(shape[-1])
    return drawn.astype(dtype.numpy)


def exported_checkpoint(
    config: Mapping[str, object], tensors: Iterable[tuple[str, Expr]], source: MemoryCheckpoint
) -> MemoryCheckpoint:
    """Return the checkpoint that an export from `source` would write."""
    from moecc.weights.evaluate import evaluate

    return MemoryCheckpoint(config, {name: evaluate(e, source.read) for name, e in tensors})
