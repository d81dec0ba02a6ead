"""A folder of quantised safetensors, with the names, shapes and config of one that is not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moecc.checkpoint.folder import SafetensorsFolder, rows_of
from moecc.checkpoint.problems import Problems, describe
from moecc.checkpoint.quantised.bitsandbytes import find_bitsandbytes
from moecc.checkpoint.quantised.fp8 import find_fp8
from moecc.checkpoint.quantised.integers import find_awq, find_gptq
from moecc.checkpoint.quantised.mxfp4 import find_mxfp4
from moecc.checkpoint.quantised.packed import Packed, ReadRows, Stored
from moecc.checkpoint.source import TensorInfo
from moecc.errors import InputError
from moecc.support.closing import Closing
from moecc.support.text import amount
from moecc.types.arrays import Array
from moecc.types.dtypes import F32

KEY = "quantization_config"
MOST_KEPT_BYTES = 256 << 20


def _alone(find: Callable[[Stored], Iterator[Packed]]) -> Callable[..., Iterator[Packed]]:
    return lambda stored, read: find(stored)


METHODS: Mapping[str, Callable[[Stored, ReadRows], Iterator[Packed]]] = {
    "fp8": _alone(find_fp8),
    "fbgemm_fp8": _alone(find_fp8),
    "compressed-tensors": _alone(find_fp8),
    "mxfp4": _alone(find_mxfp4),
    "gptq": _alone(find_gptq),
    "awq": _alone(find_awq),
    "bitsandbytes": find_bitsandbytes,
}
"""What finds the matrices of each ``quant_method``."""


class QuantisedFolder(Closing):
    """A folder whose matrices are dequantised when they are read, as float32."""

    format = "safetensors"

    def __init__(self, folder: SafetensorsFolder, packed: Mapping[str, Packed]) -> None:
        self._folder, self._packed = folder, packed
        self._kept = threading.local()
        self.path: Path = folder.path
        self.config = {key: value for key, value in folder.config.items() if key != KEY}
        inner = {part for one in packed.values() for part in one.parts}
        plain = {name: info for name, info in folder.tensors.items() if name not in inner}
        made = {name: _info(one, folder.tensors) for name, one in packed.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({**plain, **made})

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; see `Checkpoint.read`."""
        one = self._packed.get(name)
        if one is None:
            return self._folder.read(name, start, stop)
        rows_of(self.tensors[name], start, stop)
        stop = one.shape[0] if stop is None else stop
        # A scale that is not finite gives values that are not finite, which the caller checks.
        with np.errstate(all="ignore"):
            return one.rows(partial(self._part, one), start, stop)

    def _part(self, one: Packed, name: str, start: int, stop: int | None) -> Array:
        """Read rows of a part; a thread keeps those of the matrix that it reads.

        Outputs lie across the words of GPTQ and AWQ, so every block of rows needs all of them.
        """
        if (start, stop) != (0, None):
            return self._folder.read(name, start, stop)
        if getattr(self._kept, "of", None) != one.name:
            self._kept.of, self._kept.parts = one.name, {}
        parts: dict[str, Array] = self._kept.parts
        if name in parts:
            return parts[name]
        found = self._folder.read(name)
        if found.nbytes <= MOST_KEPT_BYTES:
            parts[name] = found
        return found

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files that an export copies byte for byte, by their name in the folder."""
        return self._folder.companions()

    def remarks(self) -> list[str]:
        """Return which matrices were quantised."""
        kinds = Counter(one.storage for one in self._packed.values())
        if not kinds:
            return []
        shown = ", ".join(
            f"{amount(count, 'tensor')} in {name}" for name, count in kinds.most_common()
        )
        return [f"the weights were quantised, which lost precision: {shown}"]

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of the card in the folder."""
        return self._folder.card()

    def files(self) -> list[Path]:
        """Return the weight files, the index if there is one, and the config."""
        return self._folder.files()

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        self._folder.require_unchanged()

    def close(self) -> None:
        """Close the files."""
        self._folder.close()


def _info(one: Packed, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    largest = tensors[one.parts[0]]
    size = sum(tensors[part].nbytes for part in one.parts)
    return replace(
        largest, name=one.name, dtype=F32, shape=one.shape, nbytes=size, storage=one.storage
    )


def open_quantised(folder: SafetensorsFolder) -> QuantisedFolder:
    """Return an opened folder with ``quantization_config`` as one that is not quantised.

    Raises:
      InputError: the method is none that moecc reads, or the tensors do not match it; all problems.
    """
    problems = Problems()
    options = folder.config[KEY]
    method = options.get("quant_method") if isinstance(options, dict) else None
    find = METHODS.get(method) if isinstance(method, str) else None
    if not isinstance(options, dict) or find is None:
        raise InputError(
            "the weights are quantised by a method that moecc does not read",
            where=f"{folder.path / 'config.json'}: {KEY}.quant_method",
            expected=f"one of {', '.join(METHODS)}",
            found=describe(method),
            hint="take the checkpoint that is not quantised, or dequantise it with its own library",
        )
    packed = {one.name: one for one in find(Stored(folder.tensors, options, problems), folder.read)}
    if not packed and not problems:
        problems.add(
            "the weights are said to be quantised, and no tensor is",
            where=f"{folder.path / 'config.json'}: {KEY}", found=describe(method),
            hint=f"if they are not quantised any more, remove {KEY}",
        )  # fmt: skip
    problems.raise_if_any()
    return QuantisedFolder(folder, packed)
