"""Element types: their names in the IR, in NumPy and in safetensors.

bfloat16 and the 8-bit floats come from ``ml_dtypes``; ``key`` is the type of a random key, which
has no arithmetic and is never stored in a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from sys import float_info
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numpy takes longer to import than all of moecc that reads headers
    import numpy as np


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
      name: the name in the IR, ``bf16``.
      kind: ``float``, ``int``, ``bool`` or ``key``.
      itemsize_bytes: size of one element in bytes.
      safetensors: the name in a safetensors header, or None if it is never stored.
      torch: the spelling of ``torch_dtype`` in config.json, or None.
      largest: the largest finite number of a float type.
    """

    name: str
    kind: str
    itemsize_bytes: int
    numpy_name: str
    safetensors: str | None = None
    torch: str | None = None
    largest: float | None = None

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's type with the same bytes (``ml_dtypes`` for those NumPy lacks)."""
        import ml_dtypes
        import numpy as np

        return np.dtype(getattr(ml_dtypes, self.numpy_name, self.numpy_name))

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest number of an element; of integers none beyond ±2^53.

        A float64 represents all integers up to there.
        """
        if self.largest is not None:
            return -self.largest, self.largest
        if self.kind == "bool":
            return 0, 1
        bits, signed = 8 * self.itemsize_bytes, not self.numpy_name.startswith("u")
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        return max(low, -(1 << 53)), min(high, 1 << 53)

    @property
    def is_float(self) -> bool:
        """Whether this is a floating-point type."""
        return self.kind == "float"

    def __str__(self) -> str:
        return self.name


_ALL = (
    DType("f64", "float", 8, "float64", "F64", "float64", float_info.max),
    DType("f32", "float", 4, "float32", "F32", "float32", (2 - 2**-23) * 2.0**127),
    DType("f16", "float", 2, "float16", "F16", "float16", 65504.0),
    DType("bf16", "float", 2, "bfloat16", "BF16", "bfloat16", (2 - 2**-7) * 2.0**127),
    DType("f8e4m3fn", "float", 1, "float8_e4m3fn", "F8_E4M3", "float8_e4m3fn", 448.0),
    DType("f8e5m2", "float", 1, "float8_e5m2", "F8_E5M2", "float8_e5m2", 57344.0),
    DType("i64", "int", 8, "int64", "I64", "int64"),
    DType("i32", "int", 4, "int32", "I32", "int32"),
    DType("i16", "int", 2, "int16", "I16", "int16"),
    DType("i8", "int", 1, "int8", "I8", "int8"),
    DType("u64", "int", 8, "uint64", "U64", None),
    DType("u32", "int", 4, "uint32", "U32", None),
    DType("u16", "int", 2, "uint16", "U16", None),
    DType("u8", "int", 1, "uint8", "U8", "uint8"),
    DType("pred", "bool", 1, "bool", "BOOL", "bool"),
    DType("key", "key", 8, "uint64", None, None),
)

DTYPES: dict[str, DType] = {d.name: d for d in _ALL}
BY_SAFETENSORS: dict[str, DType] = {d.safetensors: d for d in _ALL if d.safetensors}
BY_TORCH: dict[str, DType] = {d.torch: d for d in _ALL if d.torch}

F64, F32, F16, BF16 = (DTYPES[n] for n in ("f64", "f32", "f16", "bf16"))
I64, I32, PRED, KEY = (DTYPES[n] for n in ("i64", "i32", "pred", "key"))

_LOSSLESS = {
    "f8e4m3fn": {"f16", "bf16", "f32", "f64"},
    "f8e5m2": {"f16", "bf16", "f32", "f64"},
    "f16": {"f32", "f64"},
    "bf16": {"f32", "f64"},
    "f32": {"f64"},
    "f64": set(),
}


def is_lossless(source: DType, target: DType) -> bool:
    """Whether every value of the float type `source` is representable in `target`."""
    return source is target or target.name in _LOSSLESS.get(source.name, ())
