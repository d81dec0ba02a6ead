"""Initial weights for training from scratch: draws in place of a checkpoint's tensors."""

from __future__ import annotations

from math import isfinite, prod, sqrt

from moecc.errors import InputError, UsageError
from moecc.ir.attributes import EmbeddingAttrs
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.traits import Role
from moecc.ir.uses import uses_of
from moecc.types.dtypes import F32
from moecc.types.tensor import TensorType
from moecc.weights.arithmetic import Cast
from moecc.weights.draws import Normal, derive_key
from moecc.weights.expr import Expr, Full, sources


def initialise(graph: Graph, *, seed: int = 0, scale: float = 1.0) -> None:
    """Replace the checkpoint tensors of the parameters of `graph` by random draws.

    A matrix is normal with variance `scale` / fan-in, a table of embeddings with `scale` / width
    (LeCun et al. 1998; a Switch Transformer has a scale of 0.1, section 2.4); gains are 1, and
    biases 0.  Parameters are drawn whole, so that experts that were copies become different;
    values that a pass drew or filled stay.  A draw depends on seed and parameter name alone.

    Raises:
      InputError: the use of a parameter does not determine its scale.
      UsageError: the scale is not a positive number.
    """
    if not (isfinite(scale) and scale > 0):
        raise UsageError("the scale of the weights must be positive", found=str(scale))
    for param in graph.params.values():
        if param.weight is None or sources(param.weight):
            param.weight = _drawn(param, seed, scale)


def _drawn(param: Value, seed: int, scale: float) -> Expr:
    found = next(uses_of(param), None)
    if found is None or _role(*found) is Role.BIAS:
        return Full(0.0, param.type)
    if _role(*found) is Role.GAIN:
        return Full(1.0, param.type)
    key = derive_key(seed, f"initialise {param.name}")
    std = sqrt(scale / _fan_in(*found))
    draw = Normal(TensorType(F32, param.type.axes), std, key)
    return draw if param.type.dtype is F32 else Cast(draw, param.type.dtype)


def _role(node: Node, value: Value) -> Role:
    at = node.operands.index(value)
    if node.op.chooses and at > 0:
        return Role.BIAS  # it takes part in a choice
    return node.op.role(at)


def _fan_in(node: Node, value: Value) -> int:
    """Return the number of inputs that each output sums; for an embedding, the width."""
    role = _role(node, value)
    if role is Role.MATRIX:
        # What is summed away: in a convolution also the places of a window.
        names = tuple(a.name for a in value.type if a.name not in node.result.type)
    elif role is Role.TABLE:
        axis = EmbeddingAttrs.of_node(node).axis
        names = tuple(a.name for a in value.type if a.name != axis)
    else:
        raise InputError(
            "the initial scale of this parameter is unknown", where=f"%{value.name}",
            expected="a matrix, a table of embeddings, a gain or a bias",
            found=f"an operand of {node.op.name}",
            hint="give it a weight expression of its own, or draw weights before this pass",
        )  # fmt: skip
    return max(prod(s for s in (value.type[n].size for n in names) if isinstance(s, int)), 1)
