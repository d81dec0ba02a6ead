"""Feed-forward blocks: dense, and as a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

from moecc.families.configs import DecoderConfig, GptOssConfig, MoeConfig
from moecc.families.gpt_oss import clamped_experts
from moecc.families.parameters import Parameters
from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.moe import emit_routing, emit_shared_gate

ACTIVATION_OPS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""The operation of each activation of a config."""

Matrix = Callable[[str], Value]
Bias = Callable[[str], Value | None]


def gated(builder: Builder, x: Value, act: str, matrix: Matrix, bias: Bias) -> Value:
    """Emit ``down(act(gate(x)) · up(x))``; `matrix` and `bias` return the parameters by name.

    The same operations serve a dense block and the experts, whose matrices and rows have an
    additional expert axis.
    """

    def linear(value: Value, name: str, over: str) -> Value:
        y = builder.contract(value, matrix(name), over=over, name=name)
        shift = bias(name)
        return y if shift is None else builder.add(y, shift)

    gate = builder.node(ACTIVATION_OPS[act], linear(x, "gate", "embed")).result
    hidden = builder.mul(gate, linear(x, "up", "embed"))
    return linear(hidden, "down", "mlp")


def two_or_three(
    builder: Builder, x: Value, act: str, matrix: Callable[[str], Value], is_gated: bool
) -> Value:
    """Emit a block without biases: ``down(act(up(x)))``, or with a gate the three of `gated`."""
    if is_gated:
        return gated(builder, x, act, matrix, lambda name: None)
    up = builder.contract(x, matrix("up"), over="embed", name="up")
    hidden = builder.node(ACTIVATION_OPS[act], up).result
    return builder.contract(hidden, matrix("down"), over="mlp", name="down")


def feed_forward(
    builder: Builder, x: Value, layer: int, config: DecoderConfig, params: Parameters
) -> Value:
    """Emit the feed-forward block of one layer on the normalised `x`, ``[batch, seq, embed]``."""
    prefix = params.names.layer.format(layer=layer)
    if isinstance(config, MoeConfig) and config.sparse_layers[layer]:
        return _sparse(builder, x, prefix, config, params)
    return _dense(builder, x, prefix + params.names.dense, config.intermediate_size, config, params)


def _dense(
    builder: Builder,
    x: Value,
    prefix: str,
    width: int,
    config: DecoderConfig,
    params: Parameters,
) -> Value:
    axes = ffn_axes(config.hidden_size, width)

    def matrix(name: str) -> Value:
        full, fused = f"{prefix}{name}_proj.weight", params.names.gate_up
        if not fused or name == "down":
            return params.plain(full, builder.loc, **axes[name])
        at, of = (0 if name == "gate" else width), f"{prefix}{fused}.weight"
        return params.part(full, of, builder.loc, at, ("mlp", 2 * width), axes[name])

    def bias(name: str) -> Value | None:
        if not config.mlp_bias:
            return None
        out = next(iter(axes[name]))
        return params.plain(f"{prefix}{name}_proj.bias", builder.loc, **{out: axes[name][out]})

    return gated(builder, x, config.hidden_act, matrix, bias)


def ffn_axes(embed: int, mlp: int) -> dict[str, dict[str, int]]:
    """Return the axes of the three matrices on disk: outputs first, as PyTorch keeps them."""
    inward, back = {"mlp": mlp, "embed": embed}, {"embed": embed, "mlp": mlp}
    return {"gate": inward, "up": inward, "down": back}


def _sparse(
    builder: Builder, x: Value, prefix: str, config: MoeConfig, params: Parameters
) -> Value:
    embed, experts = config.hidden_size, config.num_experts
    loc = builder.loc
    bias = params.routing_bias(prefix, loc, expert=experts) if config.routing_bias else None
    rows, finish = emit_routing(
        builder,
        x,
        params.router(prefix, builder.loc, expert=experts, embed=embed),
        experts=experts,
        top_k=config.experts_per_token,
        gates=config.gates,
        scale=config.gate_scale,
        tokens=("batch", "seq"),
        bias=bias,
        shift=_router_shift(prefix, builder.loc, config, params),
    )
    if isinstance(config, GptOssConfig) and not config.plain:
        return finish(clamped_experts(builder, rows, prefix, config, params))
    axes = ffn_axes(embed, config.expert_intermediate_size)

    def expert(name: str) -> Value:
        if isinstance(config, GptOssConfig):
            width = config.intermediate_size
            return params.turned_expert(prefix, name, builder.loc, embed, width, experts)
        return params.expert(prefix, name, builder.loc, axes[name], experts)

    out = finish(
        gated(
            builder,
            rows,
            config.hidden_act,
            expert,
            lambda name: None,
        )
    )
    if config.shared_expert_intermediate_size is None:
        return out
    width = config.shared_expert_intermediate_size
    shared_prefix = prefix + params.names.sparse + params.names.shared
    shared = _dense(builder, x, shared_prefix, width, config, params)
    if not config.shared_gate:
        return builder.add(out, shared)
    gate = params.shared_gate(prefix, builder.loc, embed=embed)
    return builder.add(out, emit_shared_gate(builder, x, gate, shared))


def _router_shift(prefix: str, loc: str, config: MoeConfig, params: Parameters) -> Value | None:
    """Return what a family adds to the router's logits, ``[expert]``, if anything."""
    if not isinstance(config, GptOssConfig) or config.plain:
        return None
    name = f"{prefix}{params.names.sparse}{params.names.router.removesuffix('weight')}bias"
    return params.plain(name, loc, expert=config.num_experts)
