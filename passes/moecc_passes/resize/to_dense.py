"""The pass ``to-dense``: a mixture of experts becomes one dense block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir.attributes import ProductAttrs
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Value
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark, weakest
from moecc.rewrite.driver import may_rewrite
from moecc.weights.arithmetic import Add
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Concat
from moecc_passes.resize.layer import (
    Anatomy,
    anatomies,
    expert_numbers,
    make_dense,
    mean,
    members,
    scaled,
)
from moecc_passes.routed import NOTHING_ROUTED


@dataclass(frozen=True)
class ToDensePass(Pass):
    """Replace every routed layer by one dense block, made of some of its experts.

    Before::

        %e, %g = route %l {top_k=2} : …
        %y = combine %o, %e, %s, %g : f32[batch=B, seq=S, embed=576]        # of 8 experts

    After ``to-dense{how=mean}``::

        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=576]

    With ``concat`` the block has the neurons of all, which share the gates' sum; those of a virtual
    group are the dense block that they were cut from.
    """

    name: ClassVar[str] = "to-dense"
    summary: ClassVar[str] = "make one dense block of the experts of a layer"
    must_match: ClassVar[bool] = True

    how: Annotated[
        Literal["first", "mean", "concat"],
        "first: one expert; mean: of the weights; concat: a block with the neurons of all",
    ] = "first"
    experts: Annotated[str, "which experts: 0,2,5; empty: all, or with first number 0"] = ""

    @property
    def preserves(self) -> Preserves:
        """The promise for experts that differ; `apply` refines it where they are copies."""
        return Preserves("approximate", f"one dense block in place of experts (how={self.how})")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        numbers = expert_numbers(self.experts)
        if isinstance(numbers, Problem):
            return [numbers]
        if self.how == "first" and len(numbers) > 1:
            return [Problem("one expert is kept", "experts", "one number", self.experts)]
        return []

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Make every routed layer dense.

        Raises:
          InputError: a layer does not have the experts; all problems at once.
        """
        layers = anatomies(graph)
        problems = [problem for layer in layers for problem in self._problems(layer)]
        if problems:
            raise InputError(problems)
        promises = [self._promise(layer) for layer in layers]
        for layer in layers:
            if not may_rewrite(self.name, layer.name):
                break
            total = _gate_sum(layer)
            make_dense(graph, layer, partial(self._weight, self._chosen(layer), total))
            ctx.remark(Remark(layer.name, f"{layer.experts} experts became one dense block"))
        result = PassResult(bool(layers), len(layers), {"layers": len(layers)})
        result.near_misses = [] if layers else [NOTHING_ROUTED]
        result.preserves = weakest(dict.fromkeys(promises)) if promises else None
        return result

    def _chosen(self, layer: Anatomy) -> tuple[int, ...]:
        numbers = expert_numbers(self.experts)
        assert not isinstance(numbers, Problem), "validated"
        return numbers or ((0,) if self.how == "first" else tuple(range(layer.experts)))

    def _weight(self, chosen: Sequence[int], total: float, param: Value, is_last: bool) -> Expr:
        parts = [part for at, part in enumerate(members(param)) if at in chosen]
        if self.how != "concat":
            return scaled(mean(parts), total if is_last else 1.0)
        share = total / len(parts)
        inner = _inner(param, is_last)
        if inner is not None:
            return scaled(Concat(tuple(parts), inner), share if is_last else 1.0)
        return scaled(reduce(Add, parts), share) if len(parts) > 1 else scaled(parts[0], share)

    def _promise(self, layer: Anatomy) -> Preserves:
        """Return ``reassociation`` where what is kept is what every choice adds up to."""
        row, attrs = convention(layer.attrs.gates), layer.attrs
        size = len(self._chosen(layer)) if self.how == "concat" else 1
        known = row.sum_is_constant(layer.experts, attrs.top_k) or _router_is_zero(layer)
        params = _block_params(layer)
        if not known or layer.layer.assignment.slots != "ragged" or layer.experts % size:
            return self.preserves
        grouped = all(_repeats(p, size) for p in params) and self._whole(layer, size)
        if grouped or all(_repeats(p, 1) for p in params):
            return Preserves("reassociation")
        return self.preserves

    def _whole(self, layer: Anatomy, size: int) -> bool:
        """Whether tokens choose whole groups of `size` neighbours."""
        if size == 1:
            return True
        first = self._chosen(layer) == tuple(range(size))
        rows = members(layer.router)
        groups = [rows[at : at + size] for at in range(0, len(rows), size)]
        every = layer.attrs.top_k == layer.experts
        alike = layer.attrs.top_k % size == 0 and all(len(set(group)) == 1 for group in groups)
        constant = convention(layer.attrs.gates).equal_for_equal_logits
        return first and constant and (alike or (every and _router_is_zero(layer)))

    def _problems(self, layer: Anatomy) -> Iterator[Problem]:
        beyond = [number for number in self._chosen(layer) if number >= layer.experts]
        if beyond:
            yield Problem("there are no such experts", layer.name, f"0 to {layer.experts - 1}",
                          ", ".join(map(str, beyond)))  # fmt: skip


def _gate_sum(layer: Anatomy) -> float:
    """Return the sum of the gates of a token; if it is not constant, that of a zero router."""
    attrs = layer.attrs
    return convention(attrs.gates).zero_router_sum(layer.experts, attrs.top_k) * attrs.scale


def _router_is_zero(layer: Anatomy) -> bool:
    return all(isinstance(row, Full) and row.value == 0 for row in members(layer.router))


def _block_params(layer: Anatomy) -> list[Value]:
    return [p for p in layer.params if not p.users.keys().isdisjoint(layer.body)]


def _repeats(param: Value, size: int) -> bool:
    """Whether experts are copies of the first `size`, in their order."""
    parts = members(param)
    return all(part == parts[at % size] for at, part in enumerate(parts))


def _inner(param: Value, is_last: bool) -> str | None:
    """Return the axis of a parameter that numbers neurons; None for a bias after the block."""
    products = [node for node in param.users if node.op.is_product]
    if not products:
        return None if is_last else param.type.names[-1]
    over = ProductAttrs.of_node(products[0]).over
    names = [name for name in param.type.names if name != "expert"]
    summed = [name for name in names if name in over]
    return summed[0] if is_last else next(name for name in names if name not in summed)
