"""Initial weights for training from scratch: draws in place of a checkpoint's tensors."""

from __future__ import annotations

from math import isfinite, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecc.errors import InputError, UsageError
from moecc.formats.adapter import SeveralCheckpoints
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.axes import EmbeddingOp
from moecc.ir.structure import uses_of
from moecc.ir.traits import Role
from moecc.model.open import OpenedModel
from moecc.model.statistics import fingerprint, open_capture
from moecc.rewrite.passes import Statistics
from moecc.types import F32, DType, TensorType
from moecc.weights.arithmetic import STATISTICS, Cast
from moecc.weights.draws import Normal, derive_key
from moecc.weights.expr import Expr, Full, sources

if TYPE_CHECKING:
    from moecc.formats.source import Checkpoint
    from moecc.rewrite.passes import ReadWeight
    from moecc.types import Array


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
    use = next(uses_of(param), None)
    if use is None or _role(*use) is Role.BIAS:
        return Full(0.0, param.type)
    if _role(*use) is Role.GAIN:
        return Full(1.0, param.type)
    key = derive_key(seed, f"initialise {param.name}")
    std = sqrt(scale / _fan_in(*use))
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
        axis = EmbeddingOp.of_node(node).axis
        names = tuple(a.name for a in value.type if a.name != axis)
    else:
        raise InputError(
            "the initial scale of this parameter is unknown", where=f"%{value.name}",
            expected="a matrix, a table of embeddings, a gain or a bias",
            found=f"an operand of {node.op.name}",
            hint="give it a weight expression of its own, or draw weights before this pass",
        )  # fmt: skip
    return max(prod(s for s in (value.type[n].size for n in names) if isinstance(s, int)), 1)


# Read the small weights on which promises of passes depend, such as the scales of norms.

MAX_READ_ELEMENTS = 1 << 20
"""The largest parameter that is read while a conversion is planned: the vector of a norm."""


def reads_small(checkpoint: Checkpoint) -> ReadWeight:
    """Return what reads small parameters of `checkpoint`; for large ones it returns None."""
    from moecc.weights.evaluate import evaluate

    def read(weight: Expr) -> Array | None:
        small = prod(weight.type.shape) <= MAX_READ_ELEMENTS
        return evaluate(weight, checkpoint.read) if small else None

    return read


# Routers in the type of the run, for comparison with what ST-MoE §3.3 found unstable.

SELECTIVE = "f32"
"""The type of routers under selective precision."""


def set_router_dtype(
    graph: Graph, router_dtype: str, dtype: DType, where: str = "--router-dtype"
) -> None:
    """Let the routers of `graph` compute in the type of the run instead of in float32.

    Products that ask for float32 and the choices of experts change, in place; losses of the
    logits stay in float32.

    Args:
      graph: the graph.
      router_dtype: ``f32``, or the name of `dtype`.
      dtype: the type of the run.
      where: what asks for it, for messages.

    Raises:
      UsageError: another type is asked for.
    """
    if router_dtype == SELECTIVE:
        return
    if router_dtype != dtype.name:
        raise UsageError(
            "routers compute in float32 or in the type of the run",
            where=where,
            expected=f"{SELECTIVE} or {dtype.name}",
            found=router_dtype,
        )
    for node in graph.every_node():
        if "precision" in node.op.attrs:
            node.attrs = {**node.attrs, "precision": "default"}


# A routing rule outside a graph, for arrays of NumPy, jax or torch alike.


def updated_bias(bias: Any, load: Any, rate: float = 1e-3) -> Any:
    """Return the bias of loss-free balancing after a step (Wang et al. 2024, DeepSeek-V3).

    ``b + rate · sign(mean load − load)``: raises the bias of an expert with less than its share.
    Called once a step, outside the gradient, on the loads of the whole batch.

    Args:
      bias: ``[expert]``, or ``[layer, expert]``.
      load: the number of choices of each expert, of the same shape.
      rate: the step, γ.
    """
    missing = load.mean(-1)[..., None] - load
    return bias + rate * ((missing > 0) * 1.0 - (missing < 0) * 1.0)


# Statistics beside a model, which its weights may be made of.


def add_statistics(model: OpenedModel, folder: str | None) -> Statistics | None:
    """Open statistics, which then are read beside the weights of `model`; return what they are.

    Args:
      model: the model; its checkpoint becomes one of both.
      folder: the folder of the statistics, or None.

    Raises:
      InputError: there are none, they were changed, or they are of another model.
    """
    if folder is None:
        return None
    checkpoint = model.checkpoint
    if checkpoint is None:
        raise InputError(f"{model.name} has no weights", hint="give a checkpoint")
    tensors, facts = open_capture(Path(folder))
    several = checkpoint if isinstance(checkpoint, SeveralCheckpoints) else None
    base = checkpoint if several is None else several.base
    digest = fingerprint(base)
    if digest != facts.model:
        tensors.close()
        raise InputError(
            "the statistics are of another model", where=folder, expected=f"{base.path}: {digest}",
            found=facts.model, hint="moecc capture takes them of this one",
        )  # fmt: skip
    branches = {} if several is None else several.branches
    model.checkpoint = SeveralCheckpoints(base, branches, {STATISTICS: tensors})
    shapes = {name: info.shape for name, info in tensors.tensors.items()}
    return Statistics(tuple(facts.texts), shapes)
