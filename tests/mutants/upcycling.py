"""Upcycling, the pass itself with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError
from moecc.ir import F32, Graph, Node, Value, clone
from moecc.rewrite.passes import Context, Pass, PassResult, Preserves
from moecc.weights.arithmetic import Scale
from moecc.weights.draws import Normal
from moecc.weights.expr import Full

from .experts import choose_one_expert_less, do_not_renormalise
from .feed_forward import drop_the_output_bias
from .rewriting import Rewrite, each, exchange


@dataclass(frozen=True)
class TamperedUpcycle(Pass):
    """Upcycle, then make a mistake; the promise stays that of upcycle."""

    name: ClassVar[str] = "tampered-upcycle"
    summary: ClassVar[str] = "upcycle wrongly"
    upcycle: UpcyclePass
    tamper: Rewrite

    @property
    def preserves(self) -> Preserves:
        return self.upcycle.preserves

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        try:
            self.upcycle.apply(clone(graph), ctx)
        except InputError:
            # Neurons that do not divide into slices, for one.
            return PassResult(changed=False)
        result = self.upcycle.apply(graph, ctx)
        if result.changed:
            self.tamper(graph)
        return result


def experts_weights(graph: Graph) -> list[Value]:
    """Return the parameters that upcycling has made or lifted."""
    return [p for p in graph.params.values() if "expert" in p.type and p.weight is not None]


def swap_the_weights_of_gate_and_up(graph: Graph) -> int:
    """Of two lifted weights of one type, each gets what belongs to the other."""
    for a in experts_weights(graph):
        for b in experts_weights(graph):
            if a is not b and a.type == b.type and a.loc == b.loc:
                a.weight, b.weight = b.weight, a.weight
                return 1
    return 0


def forget_the_factor_of_down(graph: Graph) -> int:
    """Slices are not scaled, so that a group adds up to less than the block."""
    scaled = [p for p in experts_weights(graph) if isinstance(p.weight, Scale)]
    for param in scaled:
        param.weight = param.weight.operands[0]
    return len(scaled)


def scale_another_weight_instead_of_down(graph: Graph) -> int:
    """The factor goes to the first weight of the block, before the activation."""
    if not forget_the_factor_of_down(graph):
        return 0
    param = next(p for p in experts_weights(graph) if "mlp" in p.name or "w_" in p.name)
    param.weight = Scale(param.weight, 2.0)
    return 1


def route_members_of_a_group_apart(graph: Graph) -> int:
    """The router's rows are drawn for each expert, not for each virtual group."""
    routers = [p for p in graph.params.values() if p.name.endswith("router.weight")]
    for param in routers:
        param.weight = Normal(param.type.with_dtype(F32), 1.0, 7)
    return len(routers)


def exchange_zeros_and_ones_of_the_bias(graph: Graph) -> int:
    """A multiplicative bias begins with zeros, an additive one with ones."""
    return fill(graph, ".expert_bias", lambda value: 1 - value)


def extra_sublayer_that_adds_something(graph: Graph) -> int:
    """The extra sublayer's last matrix is not zero."""
    return fill(graph, ".extra", lambda value: value + 0.5)


def fill(graph: Graph, suffix: str, other: Callable[[float], float]) -> int:
    """Fill the constant parameters of a name with another number."""
    named_so = [p for n, p in graph.params.items() if n.endswith(suffix)]
    constant = [p for p in named_so if isinstance(p.weight, Full)]
    for param in constant:
        param.weight = Full(other(param.weight.value), param.type)
    return len(constant)


def prototypes_that_do_not_add_up(node: Node) -> int:
    """The gates of the groups are not divided by their sum."""
    return exchange(node, node.operands[0]) if node.origin.startswith("upcycle") else 0


COPIES = UpcyclePass(experts=4, top_k=2)
SLICES = UpcyclePass(experts=4, top_k=2, granularity=2)
PROTOTYPES = UpcyclePass(experts=4, top_k=2, routing="prototypes")
SCALED = UpcyclePass(experts=4, top_k=2, expert_bias="multiplicative", extra_ffn="after")
SHIFTED = UpcyclePass(experts=4, top_k=2, expert_bias="additive", extra_ffn="before")

MUTANTS: dict[str, Pass] = {
    f"upcycle_and_{tamper.__name__}": TamperedUpcycle(upcycle, tamper)
    for upcycle, tamper in (
        (COPIES, swap_the_weights_of_gate_and_up),
        (COPIES, each(do_not_renormalise, "route")),
        (COPIES, each(drop_the_output_bias, "add")),
        (SLICES, forget_the_factor_of_down),
        (SLICES, scale_another_weight_instead_of_down),
        (SLICES, route_members_of_a_group_apart),
        (SLICES, each(choose_one_expert_less, "route")),
        (SHIFTED, exchange_zeros_and_ones_of_the_bias),
        (SCALED, extra_sublayer_that_adds_something),
        (PROTOTYPES, each(prototypes_that_do_not_add_up, "div")),
    )
}
