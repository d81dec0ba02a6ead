"""The feed-forward sublayers of an encoder-decoder: dense, sparse, and an extra dense one."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.configs import EncDecConfig, Experts
from moecc.families.feedforward import ffn_axes, two_or_three
from moecc.families.parameters import Parameters
from moecc.families.sequence_capacity import emit_sequence_capacity
from moecc.ir.attributes import Using
from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.moe import SlotOptions, emit_routing


@dataclass(frozen=True)
class Sublayer:
    """A feed-forward sublayer with its own norm and residual.

    Attributes:
      place: the last part of its location, ``ffn`` or ``extra_ffn``.
      prefix: the prefix of its tensors' names, the norm included.
      sparse: its experts, or None.
    """

    place: str = "ffn"
    prefix: str = ""
    sparse: Experts | None = None

    def emit(
        self, builder: Builder, x: Value, prefix: str, config: EncDecConfig, params: Parameters
    ) -> Value:
        """Emit the block on the normalised `x`, ``[batch, seq, embed]``."""
        if self.sparse is None:
            return _dense(builder, x, prefix, config, params)
        return _sparse(builder, x, prefix, self.sparse, config, params)


EXTRA = Sublayer("extra_ffn", "extra_")


def ffn_sublayers(config: EncDecConfig, stack: str, layer: int) -> list[Sublayer]:
    """Return the feed-forward sublayers of a layer, in order."""
    experts = config.experts
    if experts is None or not config.sparse_layers(stack)[layer]:
        return [Sublayer()]
    sparse = [Sublayer(sparse=experts)]
    return {"none": sparse, "before": [EXTRA, *sparse], "after": [*sparse, EXTRA]}[
        experts.extra_ffn
    ]


def _dense(
    builder: Builder, x: Value, prefix: str, config: EncDecConfig, params: Parameters
) -> Value:
    axes = ffn_axes(config.hidden_size, config.intermediate_size)

    def matrix(name: str) -> Value:
        word = params.names.matrix(name, config.gated)
        full = f"{prefix}{params.names.dense}{word}.weight"
        return params.plain(full, builder.loc, **axes[name])

    return two_or_three(builder, x, config.hidden_act, matrix, config.gated)


def _sparse(
    builder: Builder,
    x: Value,
    prefix: str,
    experts: Experts,
    config: EncDecConfig,
    params: Parameters,
) -> Value:
    assignment: SlotOptions = {}
    if experts.capacity_factor:
        assignment = {"slots": "capacity", "capacity_factor": experts.capacity_factor}

    def keep(_logits: Value, chosen: Value, _gates: Value) -> dict[Using, Value]:
        return {"keep": emit_sequence_capacity(builder, experts, chosen)}

    rows, finish = emit_routing(
        builder,
        x,
        params.router(prefix, builder.loc, expert=experts.count, embed=config.hidden_size),
        experts=experts.count,
        top_k=experts.top_k,
        gates=experts.gates,
        operands=keep if experts.sequence_capacity else None,
        **assignment,
    )
    axes = ffn_axes(config.hidden_size, config.intermediate_size)

    def matrix(name: str) -> Value:
        word = params.names.matrix(name, config.gated)
        return params.expert_matrix(prefix, word, builder.loc, axes[name], experts.count)

    return finish(two_or_three(builder, rows, config.hidden_act, matrix, config.gated))
