"""The pass ``record-modes``: record the settings of training and evaluation in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from moecc.errors import Problem
from moecc.ir.attributes import Policy
from moecc.ir.graph import Graph
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult
from moecc_passes.specialize.layer import ATTRIBUTE, ModeConfig, record

MODES = ("train", "eval")
"""The modes that a graph can be specialised for."""


@dataclass(frozen=True)
class RecordModesPass(Pass):
    """Record the defaults of ``specialize`` for each mode in the graph.

    Before::

        graph model { … }

    After ``record-modes``::

        attr routing = {"train": {"capacity_factor": 1.25, "policy": "random", …}, "eval": {…}}
    """

    name: ClassVar[str] = "record-modes"
    summary: ClassVar[str] = "record the settings of training and evaluation in the graph"
    preserves = EXACT

    train_capacity_factor: Annotated[float, "the capacity factor of training"] = 1.25
    eval_capacity_factor: Annotated[float, "that of evaluation"] = 2.0
    train_policy: Annotated[Policy, "which second choices training keeps"] = "random"
    eval_policy: Annotated[Policy, "which ones evaluation keeps"] = "all"
    threshold: Annotated[float, "what the policies compare gates with"] = 0.2
    group_size: Annotated[int | None, "the tokens of a group; none: the whole batch is one"] = None
    decoder_group_size: Annotated[
        int | None, "that of the decoder of an encoder-decoder, if it differs"
    ] = None

    def settings(self, mode: str) -> ModeConfig:
        """Return the settings of `mode`, one of `MODES`."""
        policy: Policy = getattr(self, f"{mode}_policy")
        return ModeConfig(
            capacity_factor=getattr(self, f"{mode}_capacity_factor"),
            policy=policy,
            threshold=self.threshold if policy in ("threshold", "random") else None,
            group_size=self.group_size,
            decoder_group_size=self.decoder_group_size,
        )

    def validate(self) -> list[Problem]:
        """Return which options are out of range."""
        return list(self._out_of_range())

    def _out_of_range(self) -> Iterator[Problem]:
        for mode in MODES:
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
        """Write the attribute ``routing`` of the graph."""
        before = graph.attrs.get(ATTRIBUTE)
        record(graph, **{mode: self.settings(mode) for mode in MODES})
        return PassResult(changed=graph.attrs[ATTRIBUTE] != before, matched=len(MODES))
