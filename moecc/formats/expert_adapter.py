"""LoRA adapters of experts: matrices of all experts together, merged into the tensors on disk.

PEFT adapts a parameter ``[experts, a, b]`` (``target_parameters``) by A, ``[experts · rank, in]``,
and B, ``[out, rank · experts]``, in which the expert is the last number.  The parameter may be one
tensor on disk, or a matrix for each expert, the gate and up matrices apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moecc.errors import Problem
from moecc.formats.source import Checkpoint, TensorInfo
from moecc.support.lazy import np
from moecc.types import Array, Shape

TURNED_FAMILIES = ("gpt_oss",)
"""Families with parameters ``[experts, in, out]``; others have ``[experts, out, in]``."""

_NAMES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
          "down_proj": (("down_proj",), ("w2",))}  # fmt: skip
"""Matrices of an expert on disk that a parameter of all experts consists of, two spellings."""


def product_shape(first: Shape, second: Shape, is_turned: bool) -> Shape | None:
    """Return the shape of what A and B add to a matrix, None if the two do not match."""
    if len(first) != 2 or len(second) != 2 or first[0] != second[1] or first[0] == 0:
        return None
    return (first[1], second[0]) if is_turned else (second[0], first[1])


@dataclass(frozen=True)
class ExpertDelta:
    """The products that are added to a tensor of experts.

    Attributes:
      first: the tensor A.
      second: the tensor B.
      scale: the factor s.
      experts: the number of experts.
      is_turned: whether the parameter is ``[experts, in, out]``.
      expert: the expert whose matrix the tensor is; None if it is the parameter itself.
      start: the first row of the parameter's matrix that the tensor has.
    """

    first: str
    second: str
    scale: float
    experts: int
    is_turned: bool
    expert: int | None
    start: int

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Array:
        """Return rows [start, stop) of what is added, but for the scale, in float32."""
        first = stored.read(self.first).astype(np.float32)
        second = stored.read(self.second).astype(np.float32)
        first = first.reshape(self.experts, -1, first.shape[-1])
        second = second.reshape(len(second), -1, self.experts)

        def product(expert: int) -> Array:
            matrix: Array = second[:, :, expert] @ first[expert]
            return matrix.T if self.is_turned else matrix

        if self.expert is None:
            return np.stack([product(expert) for expert in range(start, stop)])
        return product(self.expert)[self.start + start : self.start + stop]


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of all experts, by its tensors on disk.

    Attributes:
      name: its name in the model in memory.
      shape: its shape, ``[experts, a, b]``.
      parts: for each tensor, the expert and the first row of its matrix; None and 0 for itself.
    """

    name: str
    shape: Shape
    parts: Mapping[str, tuple[int | None, int]]


def expert_parameters(tensors: Mapping[str, TensorInfo], module: str) -> Iterator[ExpertParameter]:
    """Yield the parameters of experts that a module has.

    Args:
      tensors: the tensors of the model.
      module: the module in memory, ``model.layers.1.mlp.experts``.
    """
    for parameter in ("weight", *_NAMES):
        name = f"{module}.{parameter}"
        if name in tensors and len(tensors[name].shape) == 3:
            yield ExpertParameter(name, tensors[name].shape, {name: (None, 0)})
    stem = re.escape(module).replace(r"\.mlp\.", r"\.(?:mlp|block_sparse_moe)\.")
    pattern = re.compile(rf"({stem})\.(\d+)\.(\w+)\.weight")
    matches = [match for match in map(pattern.fullmatch, tensors) if match is not None]
    prefixes = {match[1] for match in matches}
    numbers = sorted({int(match[2]) for match in matches})
    words = {match[3] for match in matches}
    if len(prefixes) != 1 or numbers != list(range(len(numbers))):
        return
    (prefix,) = prefixes
    for parameter, spellings in _NAMES.items():
        names = next((spelling for spelling in spellings if set(spelling) <= words), None)
        if names is None:
            continue
        parts: dict[str, tuple[int | None, int]] = {}
        for number in numbers:
            height = 0
            for word in names:
                tensor = f"{prefix}.{number}.{word}.weight"
                parts[tensor] = (number, height)
                height += tensors[tensor].shape[0]
        yield ExpertParameter(
            f"{module}.{parameter}", (len(numbers), height, tensors[tensor].shape[1]), parts
        )


def find_parameter(
    tensors: Mapping[str, TensorInfo], family: object, module: str, first: Shape, second: Shape
) -> tuple[ExpertParameter, bool] | Problem | None:
    """Return the parameter that two matrices adapt, and whether it is ``[experts, in, out]``.

    Their names do not say which parameter of a module it is, so that their shapes decide.

    Args:
      tensors: the tensors of the model.
      family: its family.
      module: the module in memory.
      first: the shape of A.
      second: the shape of B.

    Returns:
      the parameter; a problem where none or several have these shapes; None if the module has no
      parameters of experts.
    """
    parameters = list(expert_parameters(tensors, module))
    if not parameters:
        return None
    fits = [
        (parameter, is_turned)
        for parameter in parameters
        for is_turned in (False, True)
        # Releases of PEFT differ in which of two axes they call the inputs.
        if (is_turned or family not in TURNED_FAMILIES)
        and _product_shape(first, second, parameter.shape[0], is_turned) == parameter.shape
    ]
    shapes = f"{second} times {first}"
    if len(fits) > 1:
        message = "the shapes of the adapter do not tell which parameter of experts it is for"
        names = " or ".join(parameter.name for parameter, _ in fits)
        return Problem(message, module, "one parameter", f"{shapes}, for {names}")
    if not fits:
        expected = " or ".join(f"a product of {p.shape}" for p in parameters)
        return Problem("the adapter does not suit the experts' shapes", module, expected, shapes)
    return fits[0]


def _product_shape(first: Shape, second: Shape, experts: int, is_turned: bool) -> Shape | None:
    """Return the shape of the parameter that A and B adapt; None if they do not match."""
    shape = product_shape(first, second, is_turned)
    return None if shape is None or first[0] % experts else (experts, *shape)
