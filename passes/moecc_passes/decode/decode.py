"""The pass ``decode``: continue texts token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moecc.analysis.head import LOGITS
from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.verify import where
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.match import NearMiss, fits
from moecc.rewrite.pattern import P
from moecc_passes.dce import DcePass
from moecc_passes.decode.causality import problems
from moecc_passes.decode.rewrite import Rewriter, check_sizes
from moecc_passes.decode.sides import Sides, continued

NOTHING = NearMiss("attention", "the graph", "no tokens attend to others")

STRETCHED = P.rope(P.any(), scaling=lambda s: s in ("dynamic", "longrope"))

STEPS = "other inputs; step by step the logits of all tokens"
DROPS = "no capacity drops a token"
STRETCHES = "keys are rotated once, as the length at that time wants"


@dataclass(frozen=True)
class DecodePass(Pass):
    """Take tokens as they come, and keep the keys and values of those before in caches.

    Before::

        input %tokens : i32[batch=B, seq=S]
        %positions = positions %tokens {axis=seq}
        %seen = causal %positions, %far : pred[seq=S, kv_seq=S]
        %scores = contract %q, %k {over=head_dim} : f32[batch=B, seq=S, head=4, kv_seq=S]
        %mixed = contract %weights, %v {over=kv_seq}
        output logits = %logits

    After::

        input %tokens : i32[batch=B, seq=S]                    # new ones, one or more
        input %positions : i32[batch=B, seq=S]                 # theirs, of each text
        input %key_positions : i32[batch=B, kv_seq=C]          # of what is in the caches
        input %start : i32[]                                   # where in the caches they go
        input %cache.layers.0.attention.keys : f32[batch=B, head=4, kv_seq=C, head_dim=8]
        %seen = causal %positions, %key_positions : pred[batch=B, seq=S, kv_seq=C]
        %keys = update_slice %cache.layers.0.attention.keys, %k, %start {axis=kv_seq}
        %scores = contract %q, %keys {over=head_dim} : f32[batch=B, seq=S, head=4, kv_seq=C]
        %mixed = contract %weights, %values {over=kv_seq}
        output logits = %logits
        output cache.layers.0.attention.keys = %keys

    A cache is where keys or values meet queries; what makes them works on new tokens alone.  A
    place of a cache with nothing in it has a position that no token reaches, and so has padding:
    texts of a batch may have different lengths, padded on either side.

    Of an encoder-decoder ``part=encode`` keeps what the encoder makes for the decoder's tokens,
    keys and values of cross-attention: outputs ``memory.…``, which are inputs of ``part=decode``.

    The promise: tokens that are given one after the other, or several at a time, have the logits
    that the whole text has at once.  A graph in which a token depends on later ones is rejected.
    """

    name: ClassVar[str] = "decode"
    summary: ClassVar[str] = "continue texts token by token, with caches of keys and values"
    must_match: ClassVar[bool] = True
    preserves = Preserves("approximate", STEPS)

    part: Annotated[
        Literal["decode", "encode"], "the decoder's tokens, or what an encoder makes for them"
    ] = "decode"

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Rewrite the graph.

        Raises:
          InputError: there are no tokens, or a token depends on those after it.
        """
        tokens = continued(graph)
        if tokens is None or LOGITS not in graph.outputs:
            raise InputError(
                "the graph continues no text",
                expected=f"the input tokens, i32[batch, seq], and the output {LOGITS}",
                found=f"{', '.join(graph.inputs)}; {', '.join(graph.outputs)}",
            )
        check_sizes(graph)
        dropped = [name for name in graph.outputs if name != LOGITS]
        rewriter = self._classified(graph, tokens.name)
        remarks = [Remark(f"output {name}", "is no part of a step") for name in dropped]
        stats = self._encode(rewriter) if self.part == "encode" else self._decode(rewriter)
        _clean(graph)
        if not stats:
            return PassResult(True, 0, near_misses=[NOTHING], remarks=remarks)
        reasons = [STEPS]
        if self.part == "decode":
            found = list(_differences(graph, rewriter.unbound()))
            remarks += [remark for remark, _ in found]
            reasons += dict.fromkeys(reason for _, reason in found)
        preserves = Preserves("approximate", "; ".join(reasons))
        return PassResult(True, sum(stats.values()), stats, remarks, preserves=preserves)

    def measure(self, before: Graph, after: Graph, seed: int) -> float | None:
        """Return the error of the logits of `before` token by token."""
        from moecc.testing.data import inputs_for, params_for
        from moecc.testing.decoding import step_error

        tokens = continued(before)
        if tokens is None or self.part == "encode":
            return None
        inputs = inputs_for(before, seed)
        parts = [1] * inputs[tokens.name].shape[1]
        return step_error(before, params_for(before, seed), inputs, parts)

    def _classified(self, graph: Graph, tokens: str) -> Rewriter:
        """Return what rewrites the graph, without what only other outputs need."""
        first = Rewriter(Sides.of(graph, graph.inputs[tokens]), self.name)
        first.keep({LOGITS: graph.outputs[LOGITS]})
        _clean(graph, inputs=False)
        rewriter = Rewriter(Sides.of(graph, graph.inputs[tokens]), self.name)
        found = [*rewriter.problems(), *problems(rewriter.sides)]
        if found:
            raise InputError(found)
        return rewriter

    def _encode(self, rewriter: Rewriter) -> dict[str, int]:
        found = rewriter.encoded()
        if found:
            rewriter.keep(found)
        return {"memories": len(found)} if found else {}

    def _decode(self, rewriter: Rewriter) -> dict[str, int]:
        rewriter.decode()
        stats = {"caches": len(rewriter.caches), "memories": len(rewriter.memories)}
        return {name: count for name, count in stats.items() if count} if rewriter.caches else {}


def _differences(graph: Graph, unbound: Iterable[str]) -> Iterator[tuple[Remark, str]]:
    """Yield what a step computes otherwise than the whole text, and the reason for the promise."""
    for place in unbound:
        yield Remark(place, "its capacity drops no token of a step"), DROPS
    for node in graph:
        if fits(STRETCHED, node) is not None:
            yield Remark(where(node), STRETCHES), STRETCHES


def _clean(graph: Graph, *, inputs: bool = True) -> None:
    """Erase what no output depends on."""
    DcePass().apply(graph, Context())
    for name in [n for n, v in graph.inputs.items() if inputs and not v.users]:
        graph.erase_input(name)
