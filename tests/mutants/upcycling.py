"""Upcycling, the pass itself with one thing wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError
from moecc.ir import F32, Graph, Value, clone
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves
from moecc.weights.arithmetic import Scale
from moecc.weights.draws import Normal

from .experts import choose_one_expert_less, do_not_renormalise
from .feed_forward import drop_the_output_bias
from .rewriting import Rewrite, each


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


COPIES = UpcyclePass(experts=4, top_k=2)
SLICES = UpcyclePass(experts=4, top_k=2, granularity=2)

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
    )
}
