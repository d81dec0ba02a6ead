"""A tensor that is stored in several parts, and what schemes need to find and read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from moecc.checkpoint.problems import Problems, describe, quoted
from moecc.checkpoint.source import TensorInfo
from moecc.types.arrays import Array

ReadRows = Callable[[str, int, int | None], Array]
"""Reads rows [start, stop) of the first axis of a stored tensor."""


@dataclass(frozen=True)
class Packed:
    """A tensor that is stored in parts.

    Attributes:
      name: its name when it is not quantised.
      shape: its sizes, outermost first.
      storage: the scheme, in a remark.
      parts: the stored tensors that it is made of; the first one is the largest.
      rows: returns rows [start, stop) of its first axis as float32.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    parts: tuple[str, ...]
    rows: Callable[[ReadRows, int, int], Array]


@dataclass(frozen=True)
class Stored:
    """What a scheme finds its tensors in.

    Attributes:
      tensors: the stored tensors by name.
      options: the content of ``quantization_config``.
      problems: receives what is wrong.
    """

    tensors: Mapping[str, TensorInfo]
    options: Mapping[str, object]
    problems: Problems

    def ending(self, suffix: str) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the tensors whose names end in `suffix`, each with what is before it."""
        for name, info in self.tensors.items():
            if name.endswith(suffix):
                yield name[: -len(suffix)], info

    def part(
        self, name: str, shape: tuple[int, ...] | None, types: tuple[str, ...]
    ) -> TensorInfo | None:
        """Return a part with the given shape and one of the types; else report, and None."""
        info = self.tensors.get(name)
        what = f"the quantised matrix lacks its part {quoted(name)}"
        if info is None:
            self.problems.add(what, hint="the download may be incomplete; fetch the files again")
            return None
        if (shape is not None and info.shape != shape) or info.dtype.name not in types:
            sizes = "" if shape is None else f"{list(shape)} of "
            self.problems.add(
                "the part of a quantised matrix is not what the others require",
                where=f"{info.file}, tensor {quoted(name)}",
                expected=f"{sizes}{' or '.join(types)}",
                found=f"{list(info.shape)} of {info.dtype.name}",
            )
            return None
        return info

    def option(self, name: str, expected: tuple[object, ...], default: object = None) -> object:
        """Return an option of the scheme; report a value that is not one of `expected`."""
        value = self.options.get(name)
        value = default if value is None else value
        if not any(value == one and type(value) is type(one) for one in expected):
            self.problems.add(
                "moecc does not read weights quantised so",
                where=f"config.json: quantization_config.{name}",
                expected=" or ".join(describe(one) for one in expected),
                found=describe(value),
            )
            return expected[0]
        return value

    def count(self, name: str, default: int) -> int:
        """Return an option that is a size, or -1 for "all of it"; report anything else."""
        value = self.options.get(name)
        value = default if value is None else value
        if type(value) is int and (0 < value < 1 << 31 or value == -1):
            return value
        where = f"config.json: quantization_config.{name}"
        self.problems.add("not a size", where=where, found=describe(value))
        return default


FLOATS = ("f32", "f16", "bf16")
"""The types of scales."""
