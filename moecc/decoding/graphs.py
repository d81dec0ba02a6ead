"""The graphs that continue texts, made of a model's by the pass ``decode``."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.analysis.head import LOGITS
from moecc.errors import InputError
from moecc.ir.attributes import RopeAttrs
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import clone
from moecc.ir.table.attention import LENGTH_SCALINGS
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.rewrite import P, fits

TOKENS, DECODER_TOKENS = "tokens", "decoder_tokens"
CAPACITY = "C"
"""The size of a cache, as the pass names it."""

_ROPE = P.rope(P.any())


@dataclass(frozen=True)
class DecodeGraphs:
    """What a text is continued by.

    Attributes:
      step: takes new tokens, and returns their logits and the caches.
      fill: the same without logits: for the tokens of a prompt but the last.
      encode: what an encoder makes for the decoder, once a text; None for a decoder alone.
      tokens: the name of the input that is continued.
    """

    step: Graph
    fill: Graph
    encode: Graph | None
    tokens: str

    @classmethod
    def of(cls, graph: Graph) -> DecodeGraphs:
        """Make the graphs of `graph`.

        Raises:
          InputError: a token depends on those after it, or there are no tokens and logits.
        """
        flat = rewritten(graph, "unroll-layers") if any(n.body for n in graph) else graph
        step = rewritten(flat, "decode")
        fill = clone(step)
        fill.drop_output(LOGITS)
        encode = None
        if DECODER_TOKENS in graph.inputs:
            encode = rewritten(flat, "decode{part=encode}")
        tokens = TOKENS if encode is None else DECODER_TOKENS
        return cls(step, rewritten(fill, "dce"), encode, tokens)

    @property
    def caches(self) -> dict[str, Value]:
        """The caches by name."""
        given = self.step.inputs
        return {name: given[name] for name in self.step.outputs if name in given}


def rewritten(graph: Graph, pipeline: str) -> Graph:
    """Return `graph` after a pipeline; it stays as it is."""
    copy = clone(graph)
    run_pipeline(copy, Pipeline.parse(pipeline))
    return copy


def unstretched(graph: Graph) -> int | None:
    """Return up to which length rotary positions do not depend on it; None where they never do."""
    found = [RopeAttrs.of_node(node) for node in graph.every_node() if fits(_ROPE, node)]
    return min((a.original_context for a in found if a.scaling in LENGTH_SCALINGS), default=None)


def check_continues(graph: Graph, name: str) -> None:
    """Raise InputError unless `graph` makes logits of tokens."""
    if TOKENS not in graph.inputs or LOGITS not in graph.outputs:
        raise InputError(
            "the model continues no text", where=name,
            expected=f"the input {TOKENS} and the output {LOGITS}",
            found=f"{', '.join(graph.inputs)}; {', '.join(graph.outputs)}",
            hint="moecc run takes the inputs of any model",
        )  # fmt: skip
