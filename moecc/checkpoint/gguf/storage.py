"""The storage types of GGUF: plain, or blocks of quantised elements.

The numbers are those of `ggml_type` in ggml.h; sizes in bytes are those of the block structures
in ggml-common.h.  moecc supports the types that `gguf.quants` can dequantise and that dense
models are published in.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecc.types.dtypes import BF16, F16, F32, DType


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage type.

    Attributes:
      name: its name in ggml, ``Q4_1``.
      code: its number in the file.
      block: the elements of a block, along the innermost axis.
      block_bytes: the size of a block in bytes.
      dtype: the element type that a read returns.
    """

    name: str
    code: int
    block: int
    block_bytes: int
    dtype: DType

    @property
    def is_quantised(self) -> bool:
        """Whether a read has to dequantise blocks."""
        return self.block > 1


_ALL = (
    Storage("F32", 0, 1, 4, F32),
    Storage("F16", 1, 1, 2, F16),
    Storage("BF16", 30, 1, 2, BF16),
    Storage("Q8_0", 8, 32, 34, F32),
    Storage("Q4_0", 2, 32, 18, F32),
    Storage("Q4_1", 3, 32, 20, F32),
    Storage("Q5_0", 6, 32, 22, F32),
    Storage("Q5_1", 7, 32, 24, F32),
    Storage("Q4_K", 12, 256, 144, F32),
    Storage("Q5_K", 13, 256, 176, F32),
    Storage("Q6_K", 14, 256, 210, F32),
)

STORAGES: dict[int, Storage] = {storage.code: storage for storage in _ALL}
BY_NAME: dict[str, Storage] = {storage.name: storage for storage in _ALL}

FILE_NAME = "model.gguf"
"""The name of the file in a folder that moecc writes, and in its manifest."""

SUFFIX = ".gguf"

_NOT_READ = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


def storage_label(code: int) -> str:
    """Return the name of a storage type that moecc does not support."""
    name = _NOT_READ.get(code)
    return f"{name} (type {code})" if name else f"the unknown type {code}"
