"""Convolutions: windows of a value along named axes, each multiplied with the same weights."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.errors import InputError
from moecc.ir.operand import Entry, Operand
from moecc.ir.ops import Attr, Attrs, OpDef, register
from moecc.ir.sharding_rules import Space
from moecc.ir.table.rules import axis_of, no_ragged, same_dtype, same_size
from moecc.ir.table.sharding import named_dimensions
from moecc.ir.traits import PAIR, Role
from moecc.types.tensor import Axis, TensorType


def _infer_convolve(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    x, w = (v.type for v in operands)
    dtype = same_dtype((x, w))
    over, along, taps = attrs["over"], attrs["along"], attrs["taps"]
    if not dtype.is_float:
        raise InputError("only floating-point operands are convolved", found=str(x))
    if not along or len(along) != len(taps):
        raise InputError(
            "a convolution has an axis of the weights for each axis that it runs along",
            expected=f"as many as along={along}",
            found=f"taps={taps}",
        )
    if attrs["stride"] < 1 or attrs["padding"] < 0:
        found = f"stride={attrs['stride']}, padding={attrs['padding']}"
        raise InputError("no such windows", expected="a stride of at least 1", found=found)
    for name in over:
        same_size(axis_of(x, name, "the first operand"), axis_of(w, name, "the second operand"))
    no_ragged(x, (*over, *along), "cannot convolve")
    no_ragged(w, w.names, "cannot convolve")
    if shared := [n for n in w.names if n in x and n not in over]:
        raise InputError(
            f"both operands have the axis {shared[0]!r}, over which nothing is summed",
            found=f"{x} and {w}",
        )
    places = dict(zip(along, (_places(x, w, a, t, attrs) for a, t in _pairs(attrs)), strict=True))
    kept = (Axis(a.name, places[a.name]) if a.name in places else a for a in x.axes)
    rest = [a for a in kept if a.name not in over]
    more = [a for a in w.axes if a.name not in (*over, *taps)]
    return (TensorType(dtype, (*rest, *more)),)


def _pairs(attrs: Attrs) -> list[tuple[str, str]]:
    return list(zip(attrs["along"], attrs["taps"], strict=True))


def _places(x: TensorType, w: TensorType, along: str, tap: str, attrs: Attrs) -> int:
    """Return the number of windows along an axis."""
    size, taps = axis_of(x, along).size, axis_of(w, tap, "the weights").size
    if not isinstance(size, int) or not isinstance(taps, int):
        what = f"the windows along {along!r} cannot be counted"
        raise InputError(what, expected="known sizes", found=f"{x} and {w}")
    room: int = size + 2 * attrs["padding"] - taps
    if room < 0:
        what = f"a window along {along!r} is longer than the axis with its padding"
        raise InputError(what, expected=f"at most {size + 2 * attrs['padding']}", found=str(taps))
    return room // int(attrs["stride"]) + 1


def _mixed(_operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    return (*attrs["over"], *attrs["along"])


def _windows(entry: Entry, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Axes of one name are one dimension; windows overlap, so what they run along stays whole."""
    whole = frozenset((*attrs["along"], *attrs["taps"]))
    return Space(*named_dimensions(operands), summed=frozenset(attrs["over"]), whole=whole)


register(
    OpDef(
        "convolve",
        """The sum over the named axes, and over windows along others, of x · w.

        Windows begin every `stride` places; `padding` zeros lie before and behind each axis that
        they run along.  An element of the result is Σ x[place · stride + tap − padding] · w[tap]
        over the places `tap` of a window.""",
        ("x", "w"),
        _infer_convolve,
        attrs={
            "over": Attr("axes", doc="the axes of both that are summed over"),
            "along": Attr("axes", doc="the axes of x that windows run along"),
            "taps": Attr("axes", doc="the axes of w that are the places in a window, in order"),
            "stride": Attr("int", 1, doc="the distance between windows"),
            "padding": Attr("int", 0, doc="the zeros on either side"),
        },
        mixes=_mixed,
        linear=(0, 1),
        residual=PAIR,
        sharding=_windows,
        roles=(Role.MATRIX, Role.MATRIX),
    )
)
