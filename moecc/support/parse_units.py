"""Parse element types and byte counts that users write."""

from __future__ import annotations

import re

from moecc.errors import UsageError, nearest
from moecc.types.dtypes import BF16, BY_TORCH, F16, F32, F64, DType

_FLOATS = {d.name: d for d in (F32, BF16, F16, F64)}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?\Z", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def float_type(name: str) -> DType:
    """Return the floating-point type called `name`, in moecc's spelling or PyTorch's.

    Raises:
      UsageError: there is no such type.
    """
    found = _FLOATS.get(name) or BY_TORCH.get(name)
    if found is None or found.name not in _FLOATS:
        hint = nearest(name, [*_FLOATS, "float32", "bfloat16"]) or f"types: {', '.join(_FLOATS)}"
        raise UsageError(f"unknown element type {name!r}", hint=hint)
    return found


def count_bytes(text: str) -> int:
    """Return the number of bytes that `text` denotes: ``5000000000``, ``5GB``, ``500 MB``.

    Raises:
      UsageError: it cannot be parsed, or is zero.
    """
    match = _BYTES.match(text.strip())
    count = int(float(match.group(1)) * _UNITS[match.group(2).lower()]) if match else 0
    if count <= 0:
        raise UsageError("not a number of bytes", expected="5000000000 or 5GB", found=text)
    return count
