"""The pass ``tie-head``: logits of an encoder without a head, by its embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.traits import Cost
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves

TOKENS, HIDDEN, LOGITS = "tokens", "hidden", "logits"


@dataclass(frozen=True)
class TieHeadPass(Pass):
    """Make logits of the hidden states by the table that looks tokens up.

    Before::

        %v = embedding %table, %tokens {axis=vocab}
        output hidden = %hidden

    After::

        output hidden = %hidden
        %logits = contract %hidden, %table {over=embed} : f32[batch=B, seq=S, vocab=30522]
        output logits = %logits

    An encoder that is stored without a head is trained on masked tokens so (Press and Wolf 2017);
    the head adds no parameter and is not exported.
    """

    name: ClassVar[str] = "tie-head"
    summary: ClassVar[str] = "make logits of hidden states by the embedding"

    only: Annotated[bool, "the hidden states are no output any more"] = False

    @property
    def preserves(self) -> Preserves:
        """Exact, where the outputs stay."""
        return Preserves("approximate", "an output is left out") if self.only else EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Add the output ``logits``, unless there is one.

        Raises:
          InputError: the graph has no hidden states, or no table of tokens that suits them.
        """
        if LOGITS in graph.output_names:
            return PassResult(changed=False)
        hidden = graph.outputs.get(HIDDEN)
        table = _table(graph)
        if hidden is None or table is None:
            raise InputError(
                "the graph has no hidden states and embedding to make logits of",
                expected=f"the output {HIDDEN}, and a table that looks {TOKENS} up",
                found=", ".join(graph.output_names),
            )
        (width,) = (n for n in table.type.names if n in hidden.type)
        builder = Builder(graph, loc="head", origin=self.name)
        graph.set_output(LOGITS, builder.contract(hidden, table, over=width, name=LOGITS))
        if self.only:
            graph.drop_output(HIDDEN)
        return PassResult(changed=True, matched=1)


def _table(graph: Graph) -> Value | None:
    """Return the parameter that looks tokens up."""
    tokens = graph.inputs.get(TOKENS)
    users = [] if tokens is None else list(tokens.users)
    tables = (u.operands[0] for u in users if u.op.cost is Cost.LOOK_UP and u.operands[0].is_param)
    return next(tables, None)
