"""Infer a config of the target family that can express the graph, or the reasons against it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from moecc.analysis import find_ffn_blocks, layer_number
from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.families.building import graph_config
from moecc.families.config import FAMILY, ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.experts import ExpertLayer, expert_layers
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS, decoders, mixtures, parse_config
from moecc.ir.graph import Graph
from moecc.support.text import both, either, ranges, with_article
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.families.encdec import EncDecConfig

# Mixtures of transformers that no dense family can become, why, and what is nearest.

NOT_WRITTEN = {
    "qwen3_5_moe": (
        "it is a text model beside an encoder of images, which stays as it is",
        "qwen3_5_moe_text is that text model",
    ),
    "nllb_moe": (
        "moecc reads no M2M100 or NLLB model that could become one",
        "switch_transformers is the encoder-decoder with experts that it writes",
    ),
    "jamba": ("half of its layers are state spaces, which no dense family has", "mixtral"),
}  # fmt: skip
"""By the name of the family: why nothing becomes one, and which target to take instead."""


# Infer a config of an encoder-decoder family that can express the graph.

_PLACE = re.compile(r"(encoder|decoder)\.layers\.(\d{1,9})(?:\.|$)")

Stacks = Mapping[str, Mapping[int, ExpertLayer]]
"""The expert layers of each stack, by number."""


def in_stacks(layers: list[ExpertLayer], names: Iterable[str]) -> Stacks | list[Problem]:
    """Return the expert layers by stack and number, or the problems of their locations."""
    stacks: dict[str, dict[int, ExpertLayer]] = {stack: {} for stack in names}
    problems = []
    for layer in layers:
        match = _PLACE.match(layer.loc)
        if match is None:
            fault = "the location of an expert layer does not state its layer"
            problems.append(Problem(fault, layer.loc or None, "encoder.layers.N.ffn"))
        elif int(match[2]) in stacks[match[1]]:
            problems.append(Problem("a layer has several mixtures of experts", layer.loc))
        else:
            stacks[match[1]][int(match[2])] = layer
    return problems or stacks


def _switch_fields(source: EncDecConfig, stacks: Stacks) -> dict[str, object]:
    from moecc.families.t5 import UNBOUNDED, SwitchTransformersConfig

    layers = [layer for stack in stacks.values() for layer in stack.values()]
    layer = layers[0] if layers else ExpertLayer("", 1, 1)
    fields: dict[str, object] = {
        "num_experts": layer.experts,
        "expert_capacity": layer.sequence_capacity or UNBOUNDED,
    }
    for stack in source.stacks:
        count = _sparse_count(source, stack, stacks[stack])
        fields[f"num_sparse_{stack}_layers"] = 1 if count is None else count
    if isinstance(source, SwitchTransformersConfig):
        # Fields that affect training and not the function.
        fields["router_jitter_noise"] = source.router_jitter_noise
        fields["router_aux_loss_coef"] = source.router_aux_loss_coef
    return fields


def _sparse_count(
    source: EncDecConfig, stack: str, layers: Mapping[int, ExpertLayer]
) -> int | None:
    """Return the number of sparse layers for which transformers selects exactly these."""
    from moecc.families.t5 import SwitchTransformersConfig, spread_layers

    depth = source.layers(stack)
    sparse = tuple(n in layers for n in range(depth))
    if isinstance(source, SwitchTransformersConfig) and source.sparse_layers(stack) == sparse:
        stated: int = getattr(source, f"num_sparse_{stack}_layers")
        return stated
    return next((n for n in range(depth, -1, -1) if spread_layers(depth, n) == sparse), None)


def _switch_reasons(source: EncDecConfig, stacks: Stacks) -> Iterator[Problem]:
    layers = [layer for stack in stacks.values() for layer in stack.values()]
    if not layers:
        wanted = "upcycle{experts=8 top-k=1 gates=switch}"
        hint = f"make some layers sparse first: {wanted} in the pipeline"
        fault = "switch_transformers is a mixture of experts, and no layer here is one"
        yield Problem(fault, hint=hint)
        return
    kinds: dict[ExpertLayer, str] = {}
    for layer in layers:
        kinds.setdefault(layer.without_location(), layer.loc)
    if len(kinds) > 1:
        shown = "; ".join(f"{loc}: {kind}" for kind, loc in kinds.items())
        fault = "switch_transformers has the same experts in every sparse layer"
        yield Problem(fault, found=shown)
    for kind, loc in kinds.items():
        for reason in _layer_reasons(kind, source.intermediate_size):
            yield replace(reason, where=loc)
    for stack in source.stacks:
        if _sparse_count(source, stack, stacks[stack]) is None:
            fault = f"switch_transformers spreads the sparse layers of the {stack} evenly"
            expected = "all, or every n-th from layer 1 on: upcycle{layers=every:2}"
            shown = f"layers {ranges(sorted(stacks[stack]))}" if stacks[stack] else "none"
            yield Problem(fault, expected=expected, found=shown, hint="st_moe can express it")


def _layer_reasons(layer: ExpertLayer, width: int) -> Iterator[Problem]:
    if layer.top_k != 1 or layer.gates != "softmax":
        fault = "switch_transformers sends a token to one expert and multiplies by its probability"
        routing = f"top-{layer.top_k}, {layer.gates}"
        yield Problem(fault, None, "top-1, softmax", routing, "upcycle{top-k=1 gates=switch}")
    if layer.scale != 1:
        fault = "switch_transformers has no factor on the gates"
        yield Problem(fault, expected="1", found=f"{layer.scale:g}")
    if layer.slots != "ragged":
        fault = "switch_transformers counts capacity in tokens of a sequence, not by a factor"
        yield Problem(fault, expected="slots=ragged", found=f"slots={layer.slots}")
    if layer.width != width:
        fault = "experts of switch_transformers are as wide as dense blocks"
        yield Problem(fault, expected=f"{width}", found=f"{layer.width}")
    if layer.shared:
        yield Problem("switch_transformers has no shared expert", hint="upcycle without shared")


Config = TypeVar("Config", bound=ModelConfig)

Layers = Mapping[int, ExpertLayer]
"""Expert layers by their number; the other layers are dense."""


def targets() -> tuple[str, ...]:
    """Return the families that a graph can be exported to."""
    return tuple(CONFIGS)


def check_target(target: str) -> None:
    """Check that `target` is a family that moecc writes.

    Raises:
      InputError: it is a family that no model which moecc reads can become.
      UsageError: it is no family.
    """
    if target in NOT_WRITTEN:
        why, instead = NOT_WRITTEN[target]
        raise InputError(
            f"no model becomes {with_article(target)}: {why}", where="--to", hint=instead
        )
    if target not in CONFIGS:
        hint = nearest(target, CONFIGS)
        if target == "gguf":
            hint = "name the architecture, too: gguf:llama, for example"
        raise UsageError(
            f"unknown target {target!r}", expected=f"one of {', '.join(CONFIGS)}", hint=hint
        )


def propose(
    graph: Graph, target: str, source: ModelConfig | None = None
) -> ModelConfig | list[Problem]:
    """Return the config of `target` that can express `graph`, or the reasons why there is none.

    The config is derived from that of the source, and from the graph's expert layers.  Whether the
    rest of the graph matches is checked by the export.

    Args:
      graph: the graph.
      target: the family.
      source: the config of the source, if it has been read: the graph carries it as JSON.

    Raises: as `check_target`.
    """
    check_target(target)
    if target == FAMILY:
        return graph_config(graph)
    try:
        source = source_config(graph) if source is None else source
    except InputError as error:
        return list(error.problems)
    experts, hint = expert_layers(graph), f"{FAMILY} can express this model"
    if CONFIGS[target].shape() is not source.shape():
        fault = f"{target} is {CONFIGS[target].kind}, and {source.model_type} {source.kind}"
        return [Problem(fault, hint=f"{FAMILY} can express any model")]
    width = None if experts else _dense_width(graph)
    if not isinstance(source, DecoderConfig):
        from moecc.families.encdec import EncDecConfig

        if isinstance(source, EncDecConfig):
            return _propose_encdec(source, experts, target, width)
        if sum(layer.experts for layer in experts) != source.expert_blocks:
            fault = f"{target} has no mixture of experts in the place of a feed-forward block"
            return [Problem(fault, found=f"{len(experts)} expert layers", hint=hint)]
        from moecc.families.bart import BartConfig

        if isinstance(source, BartConfig) and "logits" in graph.outputs:
            # The config does not say whether its file had the vector: the graph does.
            node = graph.outputs["logits"].node
            is_sum = node is not None and node.op.name == "add"
            source = replace(source, has_logits_bias=is_sum)
        stated = getattr(source, "intermediate_size", None)
        if width in (None, stated) or stated is None:
            return source
        changes: JsonDict = {"intermediate_size": width}
        return replace(source, **changes)
    numbers = [layer_number(layer.loc) for layer in experts]
    if None in numbers:
        fault = "the location of an expert layer does not state its layer"
        unplaced = (x for x, number in zip(experts, numbers, strict=True) if number is None)
        return [Problem(fault, layer.loc or None, "layers.N.ffn") for layer in unplaced]
    layers = {n: x for n, x in zip(numbers, experts, strict=True) if n is not None}
    if len(layers) < len(experts):
        return [Problem("a layer has several mixtures of experts", expected="one a layer")]
    return propose_config(source, layers, target, width)


def _dense_width(graph: Graph) -> int | None:
    """Return the one width of the blocks of a dense model, which experts may have become."""
    widths = {block.width for block in find_ffn_blocks(graph).blocks}
    return widths.pop() if len(widths) == 1 else None


def _propose_encdec(
    source: EncDecConfig, experts: list[ExpertLayer], target: str, width: int | None
) -> ModelConfig | list[Problem]:
    from moecc.families.encdec import EncDecConfig
    from moecc.families.t5 import SwitchTransformersConfig

    family = CONFIGS[target]
    assert issubclass(family, EncDecConfig), "the shapes have been compared"
    stacks = in_stacks(experts, source.stacks)
    if isinstance(stacks, list):
        return stacks
    fields, reasons = source.common(), []
    if issubclass(family, SwitchTransformersConfig):
        fields |= _switch_fields(source, stacks)
        reasons = list(_switch_reasons(source, stacks))
    elif experts:
        fault = f"{target} has no mixture of experts"
        reasons = [Problem(fault, found=f"{len(experts)} expert layers")]
    if width is not None:
        fields["intermediate_size"] = width
    return _construct(family, fields, reasons)


def source_config(graph: Graph) -> ModelConfig:
    """Return the config of the checkpoint that `graph` was imported from.

    Raises:
      InputError: the graph has no config, or an invalid one.
    """
    if "config" not in graph.attrs:
        hint = "import the checkpoint with moecc, and keep the line `attr config`"
        raise InputError("the graph does not state what it was imported from", hint=hint)
    return parse_config(graph.attrs["config"], "attr config")


def propose_config(
    source: DecoderConfig, layers: Layers, target: str, width: int | None
) -> DecoderConfig | list[Problem]:
    """Return the config of `target` for a model like `source` whose layers `layers` are sparse.

    `width` is that of all blocks of a mixture that was made dense.  The reasons why there is no
    config are complete, and name the families that could express the model.
    """
    proposal = _try(source, layers, target, width)
    if isinstance(proposal, DecoderConfig) or proposal[-1].hint is not None:
        return proposal
    able = [
        name
        for name in (mixtures() if layers else decoders())  # dense families hold no experts
        if name != target and isinstance(_try(source, layers, name, width, 1), DecoderConfig)
    ]
    if able:
        proposal[-1] = replace(proposal[-1], hint=f"{either(able)} can express this model")
    return proposal


def _try(
    source: DecoderConfig, layers: Layers, target: str, width: int | None, most: int | None = None
) -> DecoderConfig | list[Problem]:
    """Return the config, or the reasons against it; the first `most` are enough to know."""
    family = CONFIGS[target]
    assert issubclass(family, DecoderConfig), "the shapes have been compared"
    if issubclass(family, MoeConfig):
        reasons = list(islice(_sparse_reasons(source, layers, family), most))
        fields = _sparse_fields(source, layers, family)
    else:
        reasons = list(islice(_dense_reasons(source, layers, target, width), most))
        fields = source.common() | ({} if width is None else {"intermediate_size": width})
    return reasons if reasons and most else _construct(family, fields, reasons)


def _construct(
    family: type[Config], fields: JsonDict, reasons: list[Problem]
) -> Config | list[Problem]:
    try:
        config = family(**fields)
    except InputError as error:
        prefix = f"{family.__name__}: "
        return [
            *reasons,
            *(replace(p, where=(p.where or "").removeprefix(prefix)) for p in error.problems),
        ]
    return reasons or config


def _dense_reasons(
    source: DecoderConfig, layers: Layers, target: str, width: int | None
) -> Iterator[Problem]:
    if layers:
        numbers = ranges(sorted(layers))
        yield Problem(f"{target} has no mixture of experts; layers {numbers} here are one")
    elif isinstance(source, MoeConfig) and width is None:
        fault = f"{target} has one width of its blocks, and this model several or none"
        yield Problem(fault, hint=f"{FAMILY} can express this model")


def _sparse_reasons(
    source: DecoderConfig, layers: Layers, family: type[MoeConfig]
) -> Iterator[Problem]:
    target = family.model_type
    if not layers:
        hint = "make some layers sparse first: upcycle{experts=8 top-k=2} in the pipeline"
        yield Problem(f"{target} is a mixture of experts, and no layer here is one", hint=hint)
        return
    kinds: dict[ExpertLayer, int] = {}
    for number, layer in layers.items():
        kinds.setdefault(layer.without_location(), number)
    if len(kinds) > 1:
        shown = "; ".join(f"layer {number}: {kind}" for kind, number in kinds.items())
        yield Problem(f"{target} has the same experts in every sparse layer", found=shown)
    for kind, number in kinds.items():
        slots = layers[number].loc
        for reason in _propose_layer_reasons(kind, family):
            yield replace(reason, where=slots)
        if kind.logits_bias and not (family.has_logits_bias and isinstance(source, family)):
            hint = (
                f"{FAMILY} can express it; or bias=choice, and a family with a bias of the choice"
            )
            yield Problem(f"{target} has no bias of the router's logits", slots, hint=hint)
    yield from _pattern_reasons(source, layers, family)


def _propose_layer_reasons(layer: ExpertLayer, family: type[MoeConfig]) -> Iterator[Problem]:
    target = family.model_type
    conventions = family.conventions()
    if layer.gates not in conventions:
        fault = f"{target} cannot express {layer.gates} gates"
        able = [n for n, f in mixtures().items() if layer.gates in f.conventions() and n != target]
        hint = f"{either(able)} can express them" if able else None
        yield Problem(fault, expected=" or ".join(conventions), found=layer.gates, hint=hint)
    if layer.floor and layer.floor != family.gate_floor:
        fault = f"{target} adds nothing to the sum that gates are divided by"
        able = [n for n, f in mixtures().items() if f.gate_floor == layer.floor]
        hint = f"{either(able)} adds it" if able else None
        yield Problem(fault, expected="0", found=f"{layer.floor:g}", hint=hint)
    if layer.weighs_inputs != family.weighs_inputs:
        reads = "inputs" if family.weighs_inputs else "results"
        fault = f"gates of {target} multiply the {reads} of experts, which are not linear"
        hint = "mixtral takes a llama as it is" if family.weighs_inputs else None
        yield Problem(fault, hint=hint)
    if layer.expert_groups > 1 and not family.limits_groups:
        fault = f"{target} does not restrict a token to some groups of experts"
        yield Problem(fault, expected="1 group", found=f"{layer.expert_groups}")
    if layer.scale != 1 and not family.key("gate_scale"):
        fault = f"{target} has no factor on the gates"
        hint = "upcycle with gate-scale=1, or scale the experts' last matrix instead"
        yield Problem(fault, expected="1", found=f"{layer.scale:g}", hint=hint)
    if layer.bias and not family.has_routing_bias:
        fault = f"{target} has no bias in the choice of experts"
        able = [n for n, f in mixtures().items() if f.has_routing_bias]
        hint = f"{both(able)} have one; upcycle with balance-bias=false makes none"
        yield Problem(fault, hint=hint)
    if layer.slots != "ragged":
        fault = f"{target} computes every choice; it has no capacity"
        yield Problem(fault, expected="slots=ragged", found=f"slots={layer.slots}")
    if layer.groups != 1:
        fault = f"{target} has no token groups"
        yield Problem(fault, expected="groups=1", found=f"groups={layer.groups}")
    if layer.width == 0:
        yield Problem(
            "the experts' width cannot be determined", expected="one or two matrices first"
        )
    yield from _shared_reasons(layer, family)


def _shared_reasons(layer: ExpertLayer, family: type[MoeConfig]) -> Iterator[Problem]:
    target = family.model_type
    if family.has_shared_expert and not layer.shared and not family.shared_is_optional:
        fault = f"{target} has a shared expert in every sparse layer, and there is none"
        gate = "" if family.shared_gate else " shared-gate=none"
        hint = f"keep a part of the neurons for every token: upcycle{{… shared=0.5{gate}}}"
        yield Problem(fault, hint=hint)
    elif layer.shared and not family.has_shared_expert:
        fault = f"{target} has no shared expert"
        able = [n for n, f in mixtures().items() if f.has_shared_expert]
        hint = f"upcycle without shared, or write {either(able)}"
        yield Problem(fault, found=f"one of {layer.shared} neurons", hint=hint)
    elif layer.shared and layer.shared_gate != family.shared_gate:
        has, gate = ("a", "sigmoid") if family.shared_gate else ("no", "none")
        fault = f"the shared expert of {target} has {has} sigmoid gate"
        yield Problem(fault, hint=f"upcycle with shared-gate={gate}")


def _pattern_reasons(
    source: DecoderConfig, layers: Layers, family: type[MoeConfig]
) -> Iterator[Problem]:
    beyond = [number for number in layers if number >= source.num_hidden_layers]
    if beyond:
        numbers = f"layers {ranges(sorted(beyond))}"
        yield Problem(
            "there are more layers than in the source",
            expected=f"{source.num_hidden_layers} layers",
            found=numbers,
        )
    target = family.model_type
    dense = [n for n in range(source.num_hidden_layers) if n not in layers]
    if dense and family.sparse_style == "all":
        fault = (
            f"{target} has an expert layer at every depth; layers {ranges(dense)} here are dense"
        )
        able = [n for n, f in mixtures().items() if f.sparse_style == "step"]
        yield Problem(fault, hint=f"{both(able)} can express that with mlp_only_layers")


def _sparse_fields(
    source: DecoderConfig, layers: Layers, family: type[MoeConfig]
) -> dict[str, object]:
    """Return the fields of a config; what `_sparse_reasons` rejects has a valid stand-in value."""
    layer = next(iter(layers.values()), ExpertLayer("", 1, 1))
    width, always = layer.width or 1, family.renormalises()
    fields = source.common()
    if not family.has_expert_width():
        fields["intermediate_size"] = width
    if family.sparse_style != "all":
        fields |= _pattern(source, layers)
    shared = layer.shared or (None if family.shared_is_optional else width)
    fields |= {
        "norm_topk_prob": layer.gates not in ("softmax", "sigmoid") if always is None else always,
        "gate_scale": layer.scale if family.key("gate_scale") else 1.0,
        "routing_bias": layer.bias and family.has_routing_bias,
        "expert_groups": layer.expert_groups if family.limits_groups else 1,
        "open_groups": layer.open_groups if family.limits_groups else 1,
        "num_experts": layer.experts,
        "experts_per_token": layer.top_k,
        "expert_intermediate_size": width,
        "shared_expert_intermediate_size": shared if family.has_shared_expert else None,
    }
    if isinstance(source, MoeConfig):
        # Fields that affect training and not the function.
        fields["router_aux_loss_coef"] = source.router_aux_loss_coef
        fields["output_router_logits"] = source.output_router_logits
    if not isinstance(source, family):
        return fields | family.from_others()
    return fields | {"router_jitter_noise": source.router_jitter_noise} | source.own_fields()


def _pattern(source: DecoderConfig, layers: Layers) -> dict[str, object]:
    """Return the fields that state which layers are sparse: the source's, if they match."""
    count = source.num_hidden_layers
    sparse = tuple(number in layers for number in range(count))
    if isinstance(source, MoeConfig) and source.sparse_layers == sparse:
        step, dense = source.decoder_sparse_step, source.mlp_only_layers
        return {"decoder_sparse_step": step, "mlp_only_layers": dense}
    for step in range(1, count + 1):
        if sparse == tuple((number + 1) % step == 0 for number in range(count)):
            return {"decoder_sparse_step": step}
    return {"mlp_only_layers": tuple(n for n in range(count) if not sparse[n])}
