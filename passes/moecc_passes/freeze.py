"""The pass ``freeze``: mark groups of parameters as frozen in fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moecc.analysis import ATTRIBUTE, parameter_groups, trainable
from moecc.errors import Problem
from moecc.ir.graph import Graph
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Remark, advice

Group = Literal["all", "moe", "non-moe", "router", "attention", "ffn", "norm", "embedding"]


@dataclass(frozen=True)
class FreezePass(Pass):
    """Mark parameters, by groups, that an optimiser must not update.

    Before::

        attr family = "mixtral"

    After ``freeze{groups=moe}``::

        attr family = "mixtral"
        attr frozen = {"groups": ["moe"], "only": []}

    ``moecc.analysis.trainable`` makes the mask from it.  ST-MoE found that training all but
    the experts is as good as training everything, and training the experts alone much worse.
    """

    name: ClassVar[str] = "freeze"
    summary: ClassVar[str] = "mark groups of parameters as not trained"
    must_match: ClassVar[bool] = True
    takes_rolled: ClassVar[bool] = True
    preserves = EXACT

    groups: Annotated[tuple[Group, ...], "the frozen groups"] = ()
    only: Annotated[tuple[Group, ...], "the only trained groups"] = ()

    def validate(self) -> list[Problem]:
        """Return a problem unless exactly one of the options is set."""
        if bool(self.groups) != bool(self.only):
            return []
        stated = "both" if self.groups else "neither"
        return [
            Problem("state either the frozen groups or the only trained ones", "groups",
                    "groups or only", stated, "groups=moe is the paper's way to save memory")
        ]  # fmt: skip

    def lints(self) -> list[Problem]:
        """Return what the paper found to be worse."""
        if self.only == ("moe",):
            return [advice("the experts alone are trained, which is much worse", "only",
                           "section 4.2", expected="groups=moe", value="moe")]  # fmt: skip
        if "router" in self.groups and not {"moe", "all"} & set(self.groups):
            return [advice("experts are trained and their router is frozen, so that no loss can "
                           "balance them", "groups", "appendix A", expected="groups=moe",
                           value="router")]  # fmt: skip
        return []

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Set the attribute of the graph, replacing an earlier one."""
        before = graph.attrs.get(ATTRIBUTE)
        there = set().union(*parameter_groups(graph).values()) if graph.params else set()
        graph.attrs[ATTRIBUTE] = {"groups": list(self.groups), "only": list(self.only)}
        mask = trainable(graph)
        for group in (*self.groups, *self.only):
            if group not in there:
                ctx.remark(Remark("", f"no parameter is in the group {group!r}"))
        if mask and not any(mask.values()):
            ctx.remark(Remark("", "nothing is left to train"))
        if self.only == ("moe",):
            ctx.remark(
                Remark("", "training the experts alone was much worse in ST-MoE (section 4.2)")
            )
        frozen = len(mask) - sum(mask.values())
        stats = {"parameters": len(mask), "frozen": frozen}
        return PassResult(graph.attrs[ATTRIBUTE] != before, len(mask), stats)
