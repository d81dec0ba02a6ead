"""The text of a weight expression, on one line, which parses back to the same expression.

expr     = name "(" … ")"
source("name" : bf16[mlp=1536, embed=576])      full(0.5 : f32[expert=8])
tile(x, expert=8)  tile(x, expert=8, position=1)
stack(x, y, axis=expert)  concat(x, y, axis=mlp)
each(expert=0..7, source("experts.{expert}.w" : bf16[mlp=1536]))  for a stack of eight
index(x, expert=3)  slice(x, mlp=0:768)  rename(x, mlp=inner)  permute(x, (embed, mlp))
split(x, mlp=(group=2, mlp=768))  merge(x, (group, mlp)=mlp)
scale(x, 2.0)  cast(x, f32)  add(x, y)  mul(x, y)  select(mask, x, y)
mean(x, keep=(expert))  std(x, mask)
normal(f32[expert=8], std=0.02, key=0x1f)  with mean=0.5
truncated_normal(f32[expert=8], std=0.02, key=0x1f)  with bound=2.0
uniform(f32[expert=8], low=-0.1, high=0.1, key=0x1f)
subset(pred[expert=8, mlp=1536], axis=mlp, count=768, key=0x1f)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from moecc.weights.arithmetic import Add, Cast, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.each import in_short
from moecc.weights.expr import Expr, Full, Source
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)
from moecc.weights.textparse import parse_expr as parse_expr
from moecc.weights.textscan import ExprSyntaxError as ExprSyntaxError


def format_expr(expr: Expr) -> str:
    """Return the text of `expr`; `parse_expr` reads it back."""
    return _FORMATS[expr.__class__](expr)


def _source(e: Source) -> str:
    return f"source({json.dumps(e.name)} : {e.type})"


def _tile(e: Tile) -> str:
    return f"tile({format_expr(e.x)}, {e.axis}={e.size}{_position(e.position)})"


def _stack(e: Stack) -> str:
    texts = [format_expr(x) for x in e.xs]
    short = in_short(texts, e.axis)
    if short is not None:
        return f"each({short}{_position(e.position)})"
    return f"stack({', '.join(texts)}, axis={e.axis}{_position(e.position)})"


def _split(e: Split) -> str:
    into = ", ".join(f"{name}={size}" for name, size in e.into)
    return f"split({format_expr(e.x)}, {e.axis}=({into}))"


def _moment(e: Moment) -> str:
    mask = f", {format_expr(e.mask)}" if e.mask is not None else ""
    keep = f", keep=({', '.join(e.keep)})" if e.keep else ""
    return f"{e.kind}({format_expr(e.x)}{mask}{keep})"


def _normal(e: Normal) -> str:
    mean = "" if e.mean.hex() == "0x0.0p+0" else f", mean={e.mean!r}"
    return f"normal({e.type}, std={e.std!r}{mean}, {_key(e.key)})"


def _truncated(e: TruncatedNormal) -> str:
    bound = "" if e.bound == 3.0 else f", bound={e.bound!r}"
    return f"truncated_normal({e.type}, std={e.std!r}{bound}, {_key(e.key)})"


def _list(xs: tuple[Expr, ...]) -> str:
    return ", ".join(map(format_expr, xs))


def _position(position: int) -> str:
    return f", position={position}" if position else ""


def _key(key: int) -> str:
    return f"key={key:#x}"


_FORMATS: dict[type[Expr], Callable[[Any], str]] = {
    Source: _source,
    Full: lambda e: f"full({e.value!r} : {e.type})",
    Tile: _tile,
    Stack: _stack,
    Concat: lambda e: f"concat({_list(e.xs)}, axis={e.axis})",
    Index: lambda e: f"index({format_expr(e.x)}, {e.axis}={e.at})",
    Slice: lambda e: f"slice({format_expr(e.x)}, {e.axis}={e.start}:{e.stop})",
    Split: _split,
    Merge: lambda e: f"merge({format_expr(e.x)}, ({', '.join(e.axes)})={e.into})",
    Rename: lambda e: f"rename({format_expr(e.x)}, {e.old}={e.new})",
    Permute: lambda e: f"permute({format_expr(e.x)}, ({', '.join(e.order)}))",
    Scale: lambda e: f"scale({format_expr(e.x)}, {e.factor!r})",
    Cast: lambda e: f"cast({format_expr(e.x)}, {e.dtype})",
    Add: lambda e: f"add({_list(e.operands)})",
    Mul: lambda e: f"mul({_list(e.operands)})",
    Select: lambda e: f"select({_list(e.operands)})",
    Moment: _moment,
    Normal: _normal,
    TruncatedNormal: _truncated,
    Uniform: lambda e: f"uniform({e.type}, low={e.low!r}, high={e.high!r}, {_key(e.key)})",
    Subset: lambda e: f"subset({e.type}, axis={e.axis}, count={e.count}, {_key(e.key)})",
}
