"""Experts that no token goes to at first, because a bias keeps them from being chosen.

The bias is one of the choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), which balancing
without a loss raises until they are chosen, or one of the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Literal

from moecc.errors import Problem
from moecc.ir.builder import Builder
from moecc.ir.gates import convention
from moecc.ir.graph import Graph, Value
from moecc.pipeline.passes import Context
from moecc.types.dtypes import F32
from moecc.types.tensor import TensorType
from moecc.weights.expr import Expr, Full, Source
from moecc_passes.resize.anatomy import EXPERT, Anatomy, of_layer

By = Literal["choice", "logits"]

Wanted = Literal["auto", "choice", "logits"]
"""Which bias a user wants."""

WANTED = (
    "the bias that keeps them from being chosen: of the choice, or of the logits (gpt_oss); auto: "
    "that of the layer, else of the choice where gates are made of the chosen alone"
)

NO_LOGIT = -1e4
"""Far below any logit; finite, since 0 times infinity is none."""
MARGIN = 2.0
"""Scores are between 0 and 1."""


@dataclass(frozen=True)
class Dormant:
    """Which of the new experts no token goes to.

    Attributes:
      numbers: theirs, among the new experts.
      param: the bias that keeps them.
      value: what their elements of it are.
      zero: whether they add nothing, should they be chosen one day.
    """

    numbers: Collection[int]
    param: Value
    value: float
    zero: bool

    def changed(self, param: Value, is_last: bool, parts: list[Expr]) -> list[Expr]:
        """Return the weights of the new experts in a parameter, with those of the dormant ones."""
        if param is not self.param and not (self.zero and is_last):
            return parts
        value = self.value if param is self.param else 0.0
        return [
            Full(value, part.type) if number in self.numbers else part
            for number, part in enumerate(parts)
        ]


def kept_by(layer: Anatomy, wanted: Wanted = "auto") -> By:
    """Return which bias keeps experts of a layer from being chosen: one that it has, if any.

    Where gates are no function of the chosen experts alone, a bias of the choice would let the
    others take a share.
    """
    row = convention(layer.attrs.gates)
    if wanted != "auto":
        return wanted
    if layer.bias_of_choice is not None:
        return "choice"
    if layer.bias_of_logits is not None:
        return "logits"
    return "choice" if row.score == "sigmoid" or row.renormalised else "logits"


def not_dormant(layer: Anatomy, wanted: Wanted = "auto") -> Problem | None:
    """Return why a layer cannot have such experts, or None."""
    row = convention(layer.attrs.gates)
    if layer.layer.assignment.slots != "ragged":
        return Problem("a capacity shrinks with more experts, and drops other choices", layer.name,
                       "slots=ragged", f"slots={layer.layer.assignment.slots}",
                       "specialize{dropless=true} removes the capacity")  # fmt: skip
    if kept_by(layer, wanted) == "logits":
        if layer.bias_of_choice is None:
            return None
        return Problem("the layer has a bias of the choice, by which they could be chosen",
                       layer.name, "bias=choice", "bias=logits")  # fmt: skip
    if row.renormalised or row.score == "sigmoid":
        return None
    return Problem(
        f"experts that are not chosen have a share of {row.name} gates", layer.name,
        hint="bias=logits keeps them from it" if layer.bias_of_choice is None else
        "a bias of the logits would keep them from it; this layer has one of the choice",
    )  # fmt: skip


def with_bias(
    graph: Graph, layer: Anatomy, ctx: Context, wanted: Wanted = "auto"
) -> tuple[Anatomy, Value, float]:
    """Return a layer with its bias, added as zeros where it had none, and a value that is too low.

    Args:
      graph: the graph, changed in place.
      layer: the layer.
      ctx: reads a bias that is there.
      wanted: which bias.
    """
    if kept_by(layer, wanted) == "logits":
        layer = layer if layer.bias_of_logits is not None else _added(graph, layer)
        assert layer.bias_of_logits is not None
        return layer, layer.bias_of_logits, NO_LOGIT
    if layer.bias_of_choice is not None:
        return layer, layer.bias_of_choice, _below(layer.bias_of_choice, ctx)
    layer = _chosen_with(graph, layer)
    assert layer.bias_of_choice is not None
    return layer, layer.bias_of_choice, -MARGIN


def _below(bias: Value, ctx: Context) -> float:
    read = ctx.read(bias.weight or Source(bias.name, bias.type))
    return NO_LOGIT if read is None else floor(min(0.0, float(read.min()))) - MARGIN


def _zeros(graph: Graph, layer: Anatomy) -> Value:
    axis = layer.router.type[EXPERT]
    type = TensorType(F32, (axis,))
    name = graph.fresh(f"{layer.router.name.removesuffix('.weight')}.bias")
    return graph.param(name, layer.router.type.with_axes([axis]), Full(0.0, type), loc=layer.name)


def _chosen_with(graph: Graph, layer: Anatomy) -> Anatomy:
    """Give the choice a bias of zeros."""
    operands = (*layer.route.operands, _zeros(graph, layer))
    return _rerouted(graph, layer, operands, using=("bias",))


def _added(graph: Graph, layer: Anatomy) -> Anatomy:
    """Add a bias of zeros to the logits that the choice reads."""
    logits, *others = layer.route.operands
    builder = Builder(graph, loc=layer.route.loc, origin="resize", before=layer.route)
    return _rerouted(graph, layer, (builder.add(logits, _zeros(graph, layer)), *others))


def _rerouted(graph: Graph, layer: Anatomy, operands: Sequence[Value], **attrs: object) -> Anatomy:
    old = layer.route
    builder = Builder(graph, loc=old.loc, origin="resize", before=old)
    made = builder.clone(old, *operands, **attrs)
    for before, after in zip(old.results, made.results, strict=True):
        before.replace_by(after)
    old.erase()
    found = of_layer(replace(layer.layer, route=made))
    assert isinstance(found, Anatomy), "it could be built anew before"
    return found
