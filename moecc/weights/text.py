"""The text of a weight expression, on one line, which parses back to the same expression.

expr     = name "(" … ")"
source("name" : bf16[mlp=1536, embed=576])      full(0.5 : f32[expert=8])
tile(x, expert=8)  tile(x, expert=8, position=1)
stack(x, y, axis=expert)  concat(x, y, axis=mlp)
each(expert=0..7, source("experts.{expert}.w" : bf16[mlp=1536]))  for a stack of eight
index(x, expert=3)  slice(x, mlp=0:768)  rename(x, mlp=inner)  permute(x, (embed, mlp))
split(x, mlp=(group=2, mlp=768))  merge(x, (group, mlp)=mlp)
scale(x, 2.0)  cast(x, f32)  add(x, y)  mul(x, y)  minimum(x, y)  select(mask, x, y)
mean(x, keep=(expert))  std(x, mask)
normal(f32[expert=8], std=0.02, key=0x1f)  with mean=0.5
truncated_normal(f32[expert=8], std=0.02, key=0x1f)  with bound=2.0
uniform(f32[expert=8], low=-0.1, high=0.1, key=0x1f)
subset(pred[expert=8, mlp=1536], axis=mlp, count=768, key=0x1f)
take(x, mlp=order)  permutation(i32[mlp=1536], key=0x1f)
clusters(counts, axis=mlp, first=384, groups=6)
fitted(covariance, mean, cross, ridge=0.01, std=0.02)
"""

from __future__ import annotations

from moecc.weights.expr import Expr
from moecc.weights.textparse import parse_expr as parse_expr
from moecc.weights.textscan import ExprSyntaxError as ExprSyntaxError


def format_expr(expr: Expr) -> str:
    """Return the text of `expr`, which `parse_expr` parses back."""
    return str(expr)
