"""Parse types from text."""

from __future__ import annotations

import re
from collections.abc import Callable

from moecc.errors import InputError, nearest
from moecc.types.dtypes import DTYPES
from moecc.types.tensor import Axis, Extent, Setter, Size, TensorType, is_name

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
        raise InputError(f"unknown element type {name!r}", hint=nearest(name, DTYPES))
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
