"""Element types, and tensor types with named axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from sys import float_info
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from moecc.errors import InputError, UsageError, nearest

if TYPE_CHECKING:
    import numpy as np


# Element types: their names in the IR, in NumPy and in safetensors.
#
# bfloat16 and the 8-bit floats come from ``ml_dtypes``; ``key`` is the type of a random key, which
# has no arithmetic and is never stored in a checkpoint.


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


def dtype_from_numpy(numpy_type: object) -> DType | None:
    """Return the element type that NumPy's type stands for, or None."""
    return next((d for d in _ALL if d.kind != "key" and d.numpy == numpy_type), None)


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


# Tensor types: an element type and an ordered list of named axes.
#
# ``bf16[batch=B, seq=S, embed=576]`` has two symbolic sizes and one fixed one; equal variables are
# equal sizes.  ``slot=ragged(%p)`` is an axis whose extents the value ``%p`` sets at run time, one
# per expert; ``slot=capacity(%p)`` is one whose single extent ``%p`` sets.  ``expert@model`` says
# that the axis is sharded over the mesh axis ``model``, and ``unreduced(model)`` that the value is
# still a partial sum over it.  The order is the printed order, and for a parameter the order on
# disk; no operation's meaning depends on it.

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def is_name(value: object) -> bool:
    """Return whether `value` is a valid name of an axis, a mesh axis or a variable."""
    return isinstance(value, str) and _NAME.match(value) is not None


def is_whole(value: object) -> bool:
    """Return whether `value` is a printable integer: at most eighteen digits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18


def is_size(value: object) -> bool:
    """Return whether `value` is a valid fixed or symbolic size."""
    return is_name(value) or (isinstance(value, int) and is_whole(value) and value >= 0)


class Setter(Protocol):
    """The value that sets an extent, which has a name in its graph."""

    @property
    def name(self) -> str:
        """Its name in the graph, without ``%``."""
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """A size that an ``assign_slots`` value sets at run time.

    Attributes:
      kind: ``ragged`` (one extent per expert and group), ``capacity`` (one for all of them) or
        ``groups`` (the number of token groups).
      value: the ``assign_slots`` result; compared by identity, and up to renaming between graphs.
    """

    kind: str
    value: Setter

    def __str__(self) -> str:
        return f"{self.kind}(%{self.value.name})"


Size = int | str | Extent
"""A number, a variable, or an extent that an ``assign_slots`` value sets."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis: its size and the mesh axes over which it is split, outermost first."""

    name: str
    size: Size
    mesh: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "@" + "*".join(self.mesh) if self.mesh else ""
        return f"{self.name}{where}={self.size}"

    @property
    def fixed_size(self) -> int:
        """The size, which is a number: of a weight, of a model's width, of its experts."""
        assert isinstance(self.size, int), f"the size of {self} is known"
        return self.size

    @property
    def is_ragged(self) -> bool:
        """Whether the axis has one extent per expert."""
        return isinstance(self.size, Extent) and self.size.kind == "ragged"


@dataclass(frozen=True)
class TensorType:
    """The type of a value: ``dtype``, ordered ``axes``, and mesh axes still to be summed over."""

    dtype: DType
    axes: tuple[Axis, ...] = ()
    unreduced: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Axis]:
        """The axes by their names."""
        return {a.name: a for a in self.axes}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, in order."""
        return tuple(a.name for a in self.axes)

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the axes, in order."""
        return tuple(a.size for a in self.axes)

    @cached_property
    def _hash(self) -> int:
        return hash((self.dtype.name, self.axes, self.unreduced))

    def __hash__(self) -> int:
        return self._hash

    def __getitem__(self, name: str) -> Axis:
        return self.by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes)

    def __len__(self) -> int:
        return len(self.axes)

    @cached_property
    def is_sharded(self) -> bool:
        """Whether an axis is sharded over a mesh axis, or the value is an unreduced sum."""
        return bool(self.unreduced) or any(a.mesh for a in self.axes)

    @cached_property
    def meshes(self) -> tuple[tuple[str, ...], ...]:
        """The mesh axes over which each axis is sharded."""
        return tuple(a.mesh for a in self.axes)

    @property
    def bare(self) -> TensorType:
        """This type without any sharding."""
        return self._bare if self.is_sharded else self

    @cached_property
    def _bare(self) -> TensorType:
        return TensorType(self.dtype, tuple(Axis(a.name, a.size) for a in self.axes))

    @cached_property
    def _sharded(self) -> dict[object, TensorType]:
        return {}

    def sharded(
        self, meshes: tuple[tuple[str, ...], ...], unreduced: tuple[str, ...] = ()
    ) -> TensorType:
        """Return this type sharded over other mesh axes.

        Equal answers are one object: a search for a mesh asks thousands of times, and compares.

        Args:
          meshes: for each axis the mesh axes over which it is sharded.
          unreduced: the mesh axes over which the value is an unreduced sum.
        """
        if meshes == self.meshes and unreduced == self.unreduced:
            return self
        bare, key = self.bare, (meshes, unreduced)
        if key not in bare._sharded:
            axes = (Axis(a.name, a.size, m) for a, m in zip(self.axes, meshes, strict=True))
            result = TensorType(self.dtype, tuple(axes), unreduced)
            bare._sharded[key] = result if result.is_sharded else bare
        return bare._sharded[key]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.axes)

    @cached_property
    def ragged(self) -> Axis | None:
        """The ragged axis, if the type has one."""
        return next((a for a in self.axes if a.is_ragged), None)

    @cached_property
    def extents(self) -> tuple[Extent, ...]:
        """The extents, set by ``assign_slots`` values, that the sizes of this type refer to."""
        return tuple(a.size for a in self.axes if isinstance(a.size, Extent))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The sizes as numbers.

        Raises:
          ValueError: a size is symbolic.
        """
        if not all(isinstance(s, int) for s in self.sizes):
            raise ValueError(f"{self} has a symbolic size")
        return tuple(s for s in self.sizes if isinstance(s, int))

    @property
    def is_static(self) -> bool:
        """Whether all sizes are numbers."""
        return all(isinstance(s, int) for s in self.sizes)

    def with_axes(self, axes: Iterable[Axis]) -> TensorType:
        """Return this type with other axes."""
        return TensorType(self.dtype, tuple(axes), self.unreduced)

    def with_dtype(self, dtype: DType) -> TensorType:
        """Return this type with another element type."""
        return TensorType(dtype, self.axes, self.unreduced)

    def without(self, *names: str) -> TensorType:
        """Return this type without the axes `names`."""
        return self.with_axes(a for a in self.axes if a.name not in names)

    def __str__(self) -> str:
        text = f"{self.dtype.name}[{', '.join(map(str, self.axes))}]"
        return f"{text} unreduced({', '.join(self.unreduced)})" if self.unreduced else text


def is_printable(type: TensorType) -> bool:
    """Return whether `type` can be printed: valid names and sizes, each name once.

    Results of operations need no such check, because their axes come from operands and attributes.
    """
    mesh = [m for a in type.axes for m in a.mesh]
    return (
        len(set(type.names)) == len(type.names)
        and len(set(mesh)) == len(mesh)
        and all(map(is_name, (*type.names, *mesh, *type.unreduced)))
        and all(isinstance(s, Extent) or is_size(s) for s in type.sizes)
    )


def tensor(dtype: DType, /, **sizes: Size) -> TensorType:
    """Return a type from keyword sizes: ``tensor(F32, batch="B", embed=576)``."""
    return TensorType(dtype, tuple(Axis(n, s) for n, s in sizes.items()))


# Arrays whose element type and rank are known when they are looked at, not to a type checker.

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
"""An array of any element type; what it must be stands beside the parameter."""

Shape: TypeAlias = tuple[int, ...]
"""The sizes of the axes of an array, outermost first."""

Arrays: TypeAlias = Mapping[str, Array]
"""Arrays by name."""

Doubles: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
"""An array of float64, in which formulas are computed."""


# Parse types from text.

_TYPE = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?: unreduced\(([^)]*)\))?\Z")
_AXIS = re.compile(r"([A-Za-z_]\w*)(?:@([A-Za-z_]\w*(?:\*[A-Za-z_]\w*)*))?=(.+)\Z", re.ASCII)
_EXTENT = re.compile(r"(ragged|capacity|groups)\(%([A-Za-z0-9_.\-{}]+)\)\Z")

Lookup = Callable[[str], Setter]


def parse_type(text: str, lookup: Lookup) -> TensorType:
    """Return the type described by `text`; `lookup` finds the values that extents name.

    Raises:
      InputError: it is not a type.
    """
    match = _TYPE.match(text)
    if match is None:
        raise InputError("not a type", expected="f32[axis=size, …]", found=text)
    name, inner, unreduced = match.groups()
    dtype = DTYPES.get(name)
    if dtype is None:
        # Elsewhere a type may have PyTorch's name; in a graph it has one.
        same = BY_TORCH.get(name)
        hint = nearest(name if same is None else same.name, DTYPES)
        hint = hint or f"types: {', '.join(DTYPES)}"
        raise InputError(f"unknown element type {name!r}", hint=hint)
    axes = tuple(_parse_axis(part.strip(), lookup) for part in inner.split(",") if part.strip())
    if len({a.name for a in axes}) != len(axes):
        raise InputError("two axes have the same name", found=text)
    used = [m for a in axes for m in a.mesh]
    if len(set(used)) != len(used):
        raise InputError("a mesh axis is used twice", found=text)
    sums = tuple(m.strip() for m in unreduced.split(",")) if unreduced else ()
    return TensorType(dtype, axes, sums)


def _parse_axis(text: str, lookup: Lookup) -> Axis:
    match = _AXIS.match(text)
    if match is None:
        raise InputError("not an axis", expected="name=size or name@mesh=size", found=text)
    name, mesh, size = match.groups()
    return Axis(name, _parse_size(size.strip(), lookup), tuple(mesh.split("*")) if mesh else ())


def _parse_size(text: str, lookup: Lookup) -> Size:
    if text.isascii() and text.isdecimal() and len(text) <= 18:
        return int(text)
    if is_name(text):
        return text
    match = _EXTENT.match(text)
    if match is None:
        raise InputError(
            "not a size", expected="a number, a variable, or ragged(%slots)", found=text
        )
    return Extent(match.group(1), lookup(match.group(2)))


def check_printable(name: str, type: TensorType) -> None:
    """Raise InputError unless `type`, that of the value `name`, can be printed and parsed again."""
    if not is_printable(type):
        raise InputError(
            "the type cannot be printed",
            where=f"%{name}",
            expected="letters, digits and underscores in names, each name once, sizes not negative",
            found=str(type),
        )


# Parse element types and byte counts that users write.

_FLOATS = {d.name: d for d in (F32, BF16, F16, F64)}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?|[kmgt]i)b?\Z", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def float_type(name: str, beside: Iterable[str] = ()) -> DType:
    """Return the floating-point type called `name`, in moecc's spelling or PyTorch's.

    Args:
      name: the name.
      beside: what else may stand in its place, for the hint.

    Raises:
      UsageError: there is no such type.
    """
    dtype = _FLOATS.get(name) or BY_TORCH.get(name)
    if dtype is None or dtype.name not in _FLOATS:
        types = [*_FLOATS, *beside]
        hint = nearest(name, [*types, "float32", "bfloat16"]) or f"types: {', '.join(types)}"
        raise UsageError(f"unknown element type {name!r}", hint=hint)
    return dtype


def count_bytes(text: str) -> int:
    """Return the number of bytes that `text` denotes: ``5000000000``, ``500 MB``, ``5GiB``.

    Raises:
      UsageError: it cannot be parsed, or is zero.
    """
    match = _BYTES.match(text.strip())
    count = int(float(match.group(1)) * _UNITS[match.group(2).lower()]) if match else 0
    if count <= 0:
        raise UsageError("not a number of bytes", expected="5000000000, 5GB or 5GiB", found=text)
    return count
