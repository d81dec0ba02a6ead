"""Infer a config of an encoder-decoder family that can express the graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from moecc.errors import Problem
from moecc.families.configs import (
    STACKS,
    EncDecConfig,
    SwitchTransformersConfig,
)
from moecc.families.configs.switch import UNBOUNDED
from moecc.families.experts import ExpertLayer
from moecc.families.listing import ranges

_PLACE = re.compile(r"(encoder|decoder)\.layers\.(\d{1,9})(?:\.|$)")

Stacks = Mapping[str, Mapping[int, ExpertLayer]]
"""The expert layers of each stack, by number."""


def in_stacks(layers: list[ExpertLayer]) -> Stacks | list[Problem]:
    """Return the expert layers by stack and number, or the problems of their locations."""
    found: dict[str, dict[int, ExpertLayer]] = {stack: {} for stack in STACKS}
    problems = []
    for layer in layers:
        match = _PLACE.match(layer.loc)
        if match is None:
            what = "the location of an expert layer does not state its layer"
            problems.append(Problem(what, layer.loc or None, "encoder.layers.N.ffn"))
        elif int(match[2]) in found[match[1]]:
            problems.append(Problem("a layer has several mixtures of experts", layer.loc))
        else:
            found[match[1]][int(match[2])] = layer
    return problems or found


def encdec_fields(
    source: EncDecConfig, stacks: Stacks, family: type[EncDecConfig]
) -> tuple[dict[str, object], list[Problem]]:
    """Return the fields of a config of `family`, and the reasons why it cannot fit the model."""
    fields = source.common()
    layers = [layer for stack in stacks.values() for layer in stack.values()]
    if issubclass(family, SwitchTransformersConfig):
        return {**fields, **_switch_fields(source, stacks)}, [*_switch_reasons(source, stacks)]
    what = f"{family.model_type} has no mixture of experts"
    found = f"{len(layers)} expert layers"
    return fields, [Problem(what, found=found)] if layers else []


def _switch_fields(source: EncDecConfig, stacks: Stacks) -> dict[str, object]:
    layer = _first(stacks)
    fields: dict[str, object] = {
        "num_experts": layer.experts,
        "expert_capacity": layer.sequence_capacity or UNBOUNDED,
    }
    for stack in STACKS:
        count = _sparse_count(source, stack, stacks[stack])
        fields[f"num_sparse_{stack}_layers"] = 1 if count is None else count
    if isinstance(source, SwitchTransformersConfig):
        # Fields that affect training and not the function.
        fields["router_jitter_noise"] = source.router_jitter_noise
        fields["router_aux_loss_coef"] = source.router_aux_loss_coef
    return fields


def _first(stacks: Stacks) -> ExpertLayer:
    return next((x for stack in stacks.values() for x in stack.values()), ExpertLayer("", 1, 1))


def _sparse_count(
    source: EncDecConfig, stack: str, layers: Mapping[int, ExpertLayer]
) -> int | None:
    """Return the number of sparse layers for which transformers selects exactly these."""
    depth = source.layers(stack)
    if isinstance(source, SwitchTransformersConfig):
        stated: int = getattr(source, f"num_sparse_{stack}_layers")
        if {n for n, is_sparse in enumerate(source.sparse_layers(stack)) if is_sparse} == set(
            layers
        ):
            return stated
    for count in range(depth, -1, -1):
        step = depth // count if count else depth
        if {n for n in range(depth) if step == 1 or n % step == 1} == set(layers):
            return count
    return None


def _switch_reasons(source: EncDecConfig, stacks: Stacks) -> Iterator[Problem]:
    layers = [layer for stack in stacks.values() for layer in stack.values()]
    if not layers:
        wanted = "upcycle{experts=8 top-k=1 gates=switch}"
        hint = f"make some layers sparse first: {wanted} in the pipeline"
        what = "switch_transformers is a mixture of experts, and no layer here is one"
        yield Problem(what, hint=hint)
        return
    kinds: dict[ExpertLayer, str] = {}
    for layer in layers:
        kinds.setdefault(layer.without_slots(), layer.loc)
    if len(kinds) > 1:
        found = "; ".join(f"{loc}: {kind}" for kind, loc in kinds.items())
        what = "switch_transformers has the same experts in every sparse layer"
        yield Problem(what, found=found)
    for kind, loc in kinds.items():
        for reason in _layer_reasons(kind, source.intermediate_size):
            yield replace(reason, where=loc)
    for stack in STACKS:
        if _sparse_count(source, stack, stacks[stack]) is None:
            what = f"switch_transformers spreads the sparse layers of the {stack} evenly"
            expected = "all, or every n-th from layer 1 on: upcycle{layers=every:2}"
            found = f"layers {ranges(sorted(stacks[stack]))}" if stacks[stack] else "none"
            yield Problem(what, expected=expected, found=found, hint="st_moe can express it")


def _layer_reasons(layer: ExpertLayer, width: int) -> Iterator[Problem]:
    if layer.top_k != 1 or layer.gates != "softmax":
        what = "switch_transformers sends a token to one expert and multiplies by its probability"
        found = f"top-{layer.top_k}, {layer.gates}"
        yield Problem(what, None, "top-1, softmax", found, "upcycle{top-k=1 gates=switch}")
    if layer.scale != 1:
        what = "switch_transformers has no factor on the gates"
        yield Problem(what, expected="1", found=f"{layer.scale:g}")
    if layer.slots != "ragged":
        what = "switch_transformers counts capacity in tokens of a sequence, not by a factor"
        yield Problem(what, expected="slots=ragged", found=f"slots={layer.slots}")
    if layer.width != width:
        what = "experts of switch_transformers are as wide as dense blocks"
        yield Problem(what, expected=f"{width}", found=f"{layer.width}")
    if layer.shared:
        yield Problem("switch_transformers has no shared expert", hint="upcycle without shared")
