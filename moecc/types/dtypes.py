"""Element types: their names in the IR, in NumPy and in safetensors.

bfloat16 and the 8-bit floats come from ``ml_dtypes``; ``key`` is the type of a random key, which
has no arithmetic and is never stored in a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
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
    """

    name: str
    kind: str
    itemsize_bytes: int
    numpy_name: str
    safetensors: str | None = None
    torch: str | None = None

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's type with the same bytes (``ml_dtypes`` for those NumPy lacks)."""
        return np.dtype(getattr(ml_dtypes, self.numpy_name, self.numpy_name))

    @property
    def is_float(self) -> bool:
        """Whether this is a floating-point type."""
        return self.kind == "float"

    def __str__(self) -> str:
        return self.name


_ALL = (
    DType("f64", "float", 8, "float64", "F64", "float64"),
    DType("f32", "float", 4, "float32", "F32", "float32"),
    DType("f16", "float", 2, "float16", "F16", "float16"),
    DType("bf16", "float", 2, "bfloat16", "BF16", "bfloat16"),
    DType("f8e4m3fn", "float", 1, "float8_e4m3fn", "F8_E4M3", "float8_e4m3fn"),
    DType("f8e5m2", "float", 1, "float8_e5m2", "F8_E5M2", "float8_e5m2"),
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
