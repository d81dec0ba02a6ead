"""What a plan chooses: a layout, how tokens reach experts, and what is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.errors import Problem
from moecc.sharding.layout import Layout
from moecc.sharding.vias import BY_NAME, LOCAL
from moecc.types import BF16, F32, DType, float_type

STEPS = ("train", "forward")
OPTIMIZERS = ("adamw", "adafactor")
DENSE_WEIGHTS = ("whole", "split")
REMATS = ("none", "save", "block", "full")
"""What the backward pass computes again: nothing; all but the results of attention and combine;
everything but the input of each block of layers; everything but the input of each layer, so that of
a block's layers those that are alike, a loop, are computed twice again."""


@dataclass(frozen=True)
class StepConfig:
    """What is given.

    Attributes:
      train: whether a step is one of training, or a forward pass.
      optimizer: one of `OPTIMIZERS`.
      dtype: the type of the computation.
      weight_dtype: the type of the parameters.
      micro_batches: parts of a batch whose gradients are added.
      reduce_dtype: the type in which gradients are added and reduced; None for `dtype`.
    """

    train: bool = True
    optimizer: str = "adamw"
    dtype: DType = BF16
    weight_dtype: DType = F32
    micro_batches: int = 1
    reduce_dtype: DType | None = None

    @property
    def reduce_width(self) -> int:
        """Bytes of an element of a gradient that is reduced."""
        return (self.reduce_dtype or self.dtype).itemsize_bytes


def step_config(
    train: bool,
    optimizer: str,
    dtype: str,
    weight_dtype: str | None = None,
    micro_batches: int = 1,
    reduce_dtype: str | None = None,
) -> StepConfig:
    """Return what is given of a step, from the texts of options.

    Raises:
      UsageError: a type is unknown.
    """
    computed = float_type(dtype)
    stored = float_type(weight_dtype) if weight_dtype else F32 if train else computed
    reduced = float_type(reduce_dtype) if reduce_dtype else None
    return StepConfig(train, optimizer, computed, stored, micro_batches, reduced)


def micro_batch_problems(train: bool, count: int) -> Iterator[Problem]:
    """Yield what is wrong with a number of micro-batches: a forward pass has no gradients to add.

    Args:
      train: whether the step is one of training.
      count: of micro-batches.
    """
    if count < 1 or (count > 1 and not train):
        expected = "1 or more" if train else "1, of a forward pass"
        yield Problem("not a number of micro-batches", expected=expected, found=str(count))


@dataclass(frozen=True)
class Strategy:
    """What is chosen.

    Attributes:
      layout: the mesh, and what is sharded over it.
      via: how tokens reach experts.
      dispatch: the class of the dispatch strategy, as `moecc.ir.conventions` has it.
      remat: one of `REMATS`.
      sliced: whether devices along ``model``, which have the same tokens, each send a part of a
        row to the experts.
      chunks: in how many parts rows are exchanged, one beside the experts' work on another.
    """

    layout: Layout
    via: str = LOCAL
    dispatch: str = "index"
    remat: str = "full"
    sliced: bool = False
    chunks: int = 1

    @property
    def in_rounds(self) -> bool:
        """Whether rows go to their experts in rounds, each done again for its gradient.

        They do not where devices that split neurons add up what they make of the same rows.
        """
        if self.via == LOCAL or not BY_NAME[self.via].in_rounds:
            return False
        return self.sliced or not self.layout.split(self.layout.tensor_axes)

    @property
    def stream_axis(self) -> str | None:
        """The mesh axis along which what goes from layer to layer is kept in parts, or None.

        Devices that split neurons all have it; under rematerialisation it is most of what is kept.
        Where they split the sequence between products, it is in parts already.
        """
        sequence = self.layout.sequence_axes
        tensor = [a for a in self.layout.split(self.layout.tensor_axes) if a not in sequence]
        return tensor[0] if tensor and self.remat != "none" else None

    def __str__(self) -> str:
        mesh = str(self.layout.mesh) or "one device"
        dense = ", dense weights split" if self.layout.dense_weights == "split" else ""
        dense += f", rules {','.join(self.layout.own)}" if self.layout.own else ""
        via = f", via {self.via}" if self.via != LOCAL else ""
        via += " in slices" if self.sliced else ""
        via += f" in {self.chunks} chunks" if self.chunks > 1 else ""
        rows = f", {self.dispatch}" if self.layout.experts else ""
        return f"{mesh}{dense}{via}{rows}, remat {self.remat}"
