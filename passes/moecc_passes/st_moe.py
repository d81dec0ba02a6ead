"""The pass ``st-moe``: the conversion of ST-MoE, composed of the passes for its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from moecc.errors import Problem
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, weakest
from moecc_passes.add_losses import AddLossesPass
from moecc_passes.specialize.settings import Settings, record
from moecc_passes.specialize.specialize import SpecializePass
from moecc_passes.upcycle.upcycle import UpcyclePass


@dataclass(frozen=True)
class StMoePass(Pass):
    """Turn a dense model into an ST-MoE that computes the same function.

    Every fourth feed-forward layer becomes a mixture of experts with renormalised top-2 gates, a
    multiplicative bias and an extra dense sublayer; losses are added; and the graph remembers what
    training and evaluation are: a capacity factor of 1.25 and second experts kept at random, or 2.0
    and all of them.  ``specialize{mode=train}`` then makes a graph for training.  The conversion
    itself is without a capacity, so that it drops nothing.

    Before::

        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=1024] @layers.3.ffn

    After ``st-moe{experts=32}``, the same as::

        upcycle{experts=32 top-k=2 layers=every:4 extra-ffn=after expert-bias=multiplicative}
        add-losses{balance-coef=0.01 z-coef=0.001}
        attr routing = {"train": {"capacity_factor": 1.25, "policy": "random", …}, "eval": {…}}
    """

    name: ClassVar[str] = "st-moe"
    summary: ClassVar[str] = "turn a dense model into an ST-MoE: the paper's choices in one pass"
    must_match: ClassVar[bool] = True

    experts: Annotated[int, "the experts of a sparse layer"] = 32
    top_k: Annotated[int, "the experts that a token goes to"] = 2
    layers: Annotated[str, "which layers become sparse, as upcycle has it"] = "every:4"
    decoder_layers: Annotated[str | None, "the same for a decoder, if it differs"] = None
    extra_ffn: Annotated[
        Literal["none", "before", "after"], "a dense sublayer beside each sparse one"
    ] = "after"
    expert_bias: Annotated[
        Literal["none", "multiplicative", "additive"], "a vector for each expert"
    ] = "multiplicative"
    init: Annotated[Literal["copy", "noise", "drop"], "how copies are made to differ"] = "copy"
    train_capacity_factor: Annotated[float, "the capacity factor of training"] = 1.25
    eval_capacity_factor: Annotated[float, "that of evaluation"] = 2.0
    train_policy: Annotated[
        Literal["all", "none", "threshold", "random"], "which second choices training keeps"
    ] = "random"
    eval_policy: Annotated[
        Literal["all", "none", "threshold", "random"], "which ones evaluation keeps"
    ] = "all"
    threshold: Annotated[float, "what the policies compare gates with"] = 0.2
    group_size: Annotated[int | None, "the tokens of a group; none: the whole batch is one"] = None
    decoder_group_size: Annotated[
        int | None, "that of the decoder of an encoder-decoder, if it differs"
    ] = None
    balance_coef: Annotated[float, "the coefficient of the balance loss"] = 0.01
    z_coef: Annotated[float, "that of the router z-loss"] = 0.001
    losses: Annotated[bool, "whether losses and metrics are added"] = True
    mode: Annotated[
        Literal["none", "train", "eval"], "what the graph is specialised for at once"
    ] = "none"

    @property
    def upcycle(self) -> UpcyclePass:
        """The conversion of the blocks."""
        # The paper takes the initialisation of Switch: variance 0.1 / width before it is cut.
        return UpcyclePass(
            experts=self.experts,
            top_k=self.top_k,
            layers=self.layers,
            decoder_layers=self.decoder_layers,
            extra_ffn=self.extra_ffn,
            expert_bias=self.expert_bias,
            init=self.init,
            router_init="switch",
            router_std=round(0.1**0.5, 4),
        )

    @property
    def add_losses(self) -> AddLossesPass:
        """The losses."""
        return AddLossesPass(balance_coef=self.balance_coef, z_coef=self.z_coef)

    def settings(self, mode: str) -> Settings:
        """Return what `mode`, ``train`` or ``eval``, is."""
        policy: str = getattr(self, f"{mode}_policy")
        return Settings(
            capacity_factor=getattr(self, f"{mode}_capacity_factor"),
            policy=policy,
            threshold=self.threshold if policy in ("threshold", "random") else None,
            group_size=self.group_size,
            decoder_group_size=self.decoder_group_size,
        )

    @property
    def preserves(self) -> Preserves:
        """What the conversion does, and the mode if there is one."""
        promises = [self.upcycle.preserves]
        if self.mode != "none":
            promises.append(SpecializePass(mode=self.mode).preserves)
        return weakest(promises)

    def validate(self) -> list[Problem]:
        """Return what is wrong with the options, by the passes that they are for."""
        parts: tuple[Pass, ...] = (
            (self.upcycle, self.add_losses) if self.losses else (self.upcycle,)
        )
        return [*(p for item in parts for p in item.validate()), *self._own_problems()]

    def _own_problems(self) -> Iterator[Problem]:
        if self.top_k == 1:
            yield Problem(
                "renormalised gates of one expert are always 1, so the router would not learn",
                "top-k", "top-k=2, as the paper has it", "top-k=1",
                "upcycle{gates=switch top-k=1} is Switch routing",
            )  # fmt: skip
        for mode in ("train", "eval"):
            factor = getattr(self, f"{mode}_capacity_factor")
            if not 0 < factor < float("inf"):
                yield Problem(
                    "an option is out of range", f"{mode}-capacity-factor", "more than 0",
                    str(factor), "ST-MoE: 1.25 in training, 2.0 at evaluation",
                )  # fmt: skip
        if not self.threshold >= 0:
            yield Problem("an option is out of range", "threshold", "at least 0",
                          str(self.threshold))  # fmt: skip
        sizes = {"group-size": self.group_size, "decoder-group-size": self.decoder_group_size}
        for name, size in sizes.items():
            if size is not None and size < 1:
                yield Problem("an option is out of range", name, "at least 1", str(size),
                              "the paper has 2 to 8 sequences in a group")  # fmt: skip

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Convert the layers, record the modes, and add the losses.

        Raises:
          InputError: as the passes that it is composed of.
        """
        result = self.upcycle.apply(graph, ctx)
        promises = [result.preserves or self.upcycle.preserves]
        if not result.matched:
            return result
        record(graph, train=self.settings("train"), eval=self.settings("eval"))
        if self.mode != "none":
            mode = SpecializePass(mode=self.mode)
            promises.append(mode.apply(graph, ctx).preserves or mode.preserves)
        if self.losses:
            added = self.add_losses.apply(graph, ctx)
            result.stats |= {"outputs-added": added.stats["outputs-added"]}
        return replace(result, changed=True, preserves=weakest(promises))
