"""The options of ``specialize``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class SpecializeOptions:
    """The options of ``specialize``; None leaves a layer's setting unchanged."""

    mode: Annotated[Literal["train", "eval"], "what the graph is for"] = "train"
    layers: Annotated[str, "all, or a glob over locations: encoder.*, layers.3.ffn"] = "all"
    capacity_factor: Annotated[float | None, "bounds the rows of an expert"] = None
    dropless: Annotated[bool | None, "no bound at all"] = None
    convention: Annotated[
        Literal["tokens", "assignments"] | None,
        "what the factor multiplies: tokens (ST-MoE), or tokens times top-k (V-MoE)",
    ] = None
    rounding: Annotated[Literal["floor", "round", "ceil"] | None, "of the capacity"] = None
    multiple: Annotated[int | None, "the capacity is raised to a multiple of this"] = None
    minimum: Annotated[int | None, "the least capacity"] = None
    cap: Annotated[bool | None, "whether it is at most the tokens of a group"] = None
    groups: Annotated[int | None, "the number of token groups"] = None
    group_size: Annotated[int | None, "the tokens of a group, in place of their number"] = None
    decoder_group_size: Annotated[
        int | None, "that of the decoder of an encoder-decoder, if it differs"
    ] = None
    order: Annotated[
        Literal["choice", "token"] | None,
        "first choices before second ones, or token by token, which is strictly causal",
    ] = None
    policy: Annotated[
        Literal["as-is", "all", "none", "threshold", "random"], "which further choices are kept"
    ] = "as-is"
    threshold: Annotated[
        float | None, "what the policy compares renormalised gates with; none: 0.2"
    ] = None
    padding_mask: Annotated[
        bool | None, "padding, by an input mask, gets no slot and counts in no loss"
    ] = None
    priority: Annotated[
        bool | None, "tokens take turns by probability (batch-prioritised routing); not causal"
    ] = None
    after_drop: Annotated[
        Literal["keep", "rescale"] | None, "what becomes of the gates that are left after a drop"
    ] = None
    jitter: Annotated[float | None, "train: the router's input times 1 ± this (Switch: 0.01)"] = (
        None
    )
    input_dropout: Annotated[float | None, "train: dropout on the router's input"] = None
    router_noise: Annotated[float | None, "train: the std of normal noise on the logits"] = None
    dropout: Annotated[
        float | None, "train: dropout on what sublayers add, and on the hidden values of dense ones"
    ] = None
    expert_dropout: Annotated[float | None, "train: dropout on the experts' hidden values"] = None
    force: Annotated[bool, "allow in a decoder what looks at later tokens"] = False
