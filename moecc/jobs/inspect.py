"""``moecc inspect``: describe a model, its feed-forward blocks and its export targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import lcm
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

from moecc.jobs.command import Load, Report, Spelling, say_weights
from moecc.support.process import gc_paused
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.families.config import ModelConfig
    from moecc.model.open import OpenedModel

MANY_LAYERS = 64
"""The number of layers from which a model without weights is inspected by its repetitions."""

DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""The fields of a config that count layers."""

_SHOWN = 4
"""The number of refused blocks that are shown."""


def inspect(source: Annotated[str, Spelling(complete="models")], *, load: Load = ()) -> Report:
    """Describe a model from its headers; no weights are read.

    The report has the family, layers, parameters, the feed-forward blocks and how many can be
    upcycled, and which families could hold the result, with the reasons why others cannot.

    Args:
      source: Hugging Face folder, .gguf file, .moe graph, or preset:NAME.

    Example:
      moecc inspect SmolLM2-135M --format json
    """
    from moecc.model.open import is_function_folder, load_files, open_model, stated_config

    load_files(load)
    named_otherwise = source.endswith(".moe") or is_function_folder(source)
    config = None if named_otherwise else stated_config(source)
    deep = None if config is None else deep_inspection(config, source)
    if deep is not None:
        return Report("inspect", deep, lambda: inspection_text(deep))
    # Neither imports nor layers leave garbage: of 10,000 layers, the collector would take half of
    # the time, and of three a tenth.
    with gc_paused(), open_model(source, config_alone=True) as model:
        say_weights(model, source)
        data = inspection(model)
    return Report("inspect", data, lambda: inspection_text(data))


def inspection(model: OpenedModel) -> JsonDict:
    """Return the inspection of `model` as JSON values."""
    from moecc.analysis import find_ffn_blocks
    from moecc.families.describe import CONVENTION, describe, paper_groups
    from moecc.formats.open import wrapped_in
    from moecc.ir.structure import without_opaque
    from moecc.ir.unroll import unrolled
    from moecc.jobs.targets import fits
    from moecc.model.open import function_name, program_type

    # Repeated layers count once per repetition.
    graph = unrolled(without_opaque(model.graph))
    facts, name, search = describe(graph), function_name(graph), find_ffn_blocks(graph)
    groups, wrapped = facts.parameters.groups, wrapped_in(model.checkpoint)
    targets = [] if name is not None else fits(graph, wrapped)
    return {
        "source": model.name,
        "format": model.checkpoint.format if model.checkpoint else None,
        "dtype": model.dtype.name if model.checkpoint else None,
        "remarks": model.remarks(),
        "family": graph.attrs.get("family") if name is None else program_type(graph),
        "function": name,
        "layers": facts.layers,
        "stacks": facts.stacks,
        "nodes": len(graph),
        "parameters": {
            "total": facts.parameters.total,
            "active": facts.parameters.active,
            "groups": {**paper_groups(groups), **groups},
        },
        "flops_per_token": facts.sequence.per_token,
        "flops_per_sequence": facts.sequence.paper,
        "flops_convention": CONVENTION,
        "flops_per_sequence_counted": {
            "weights": facts.sequence.weights,
            "attention": facts.sequence.attention,
        },
        "sequence_lengths": facts.sequence.lengths,
        "ffn_blocks": {
            "found": len(search.blocks) + len(search.refusals),
            "convertible": len(search.blocks),
            "refused": [{"where": r.loc, "reason": r.reason} for r in search.refusals],
        },
        # A function is no model of a family, with blocks or without.
        "targets": {fit.target: fit.to_json() for fit in targets},
    }


def deep_inspection(config: ModelConfig, name: str) -> JsonDict | None:
    """Return the inspection of a deep model whose layers repeat; None for any other model.

    Each repetition of the layers adds the same to every number of an inspection. The numbers thus
    follow from two models of few layers, and a third one shows that they do.
    """
    from moecc.families import build
    from moecc.families.describe import SequenceFlops
    from moecc.model.open import OpenedModel

    values = vars(config)
    depths = {key: values[key] for key in DEPTHS if values.get(key, 0) > MANY_LAYERS}
    lists = [(key, v) for key, v in values.items() if isinstance(v, tuple)]
    by_layer = [(key, v) for key, v in lists if len(v) in depths.values()]
    steps = lcm(*(v for key, v in values.items() if key.endswith("sparse_step") and v))
    periods = range(steps, MANY_LAYERS // 4, steps)
    period = next((p for p in periods if all(v[p:] == v[:-p] for _, v in by_layer)), None)
    # Lists of the numbers of layers, for instance of dense ones, name none that repeats.
    numbers = (v for key, v in lists if key.endswith("_layers") and (key, v) not in by_layer)
    first = max((int(n) for v in numbers for n in v), default=0) + 2
    if not depths or period is None or first > MANY_LAYERS // 4:
        return None
    base = {key: depth - (depth - first) // period * period for key, depth in depths.items()}

    def at(shallow: Mapping[str, int]) -> JsonDict:
        sizes: JsonDict = {key: v[: max(shallow.values())] for key, v in by_layer}
        sizes.update(shallow)
        facts = inspection(OpenedModel(build(replace(config, **sizes)), name))
        # What is rounded for each model is made of sums again.
        return {**facts, "flops_per_token": None}

    try:
        data = start = at(base)
        for key, depth in depths.items():
            once = _difference(start, at({**base, key: base[key] + period}))
            if _repeated(start, once, 2, period) != at({**base, key: base[key] + 2 * period}):
                return None
            data = _repeated(data, once, (depth - base[key]) // period, period)
    except ValueError:
        return None
    counted, lengths = data["flops_per_sequence_counted"], data["sequence_lengths"]
    per_token = SequenceFlops(0, counted["weights"], counted["attention"], lengths).per_token
    return {**data, "flops_per_token": per_token}


def _difference(start: Any, end: Any) -> Any:
    """Return what `end` adds to the numbers and lists of `start`.

    Raises ValueError where they differ otherwise.
    """
    if isinstance(start, dict) and isinstance(end, dict) and start.keys() == end.keys():
        return {key: _difference(start[key], end[key]) for key in start}
    if type(start) is int and type(end) is int:
        return end - start
    if isinstance(start, list) and end[: len(start)] == start:
        return end[len(start) :]
    if start != end:
        raise ValueError(f"{start!r} became {end!r}")
    return None


def _repeated(data: Any, once: Any, times: int, period: int) -> Any:
    """Return `data` with `once` added `times` times, each of `period` layers."""
    if isinstance(data, dict):
        return {key: _repeated(data[key], once[key], times, period) for key in data}
    if not isinstance(data, list):
        return data if once is None else data + once * times

    def renumbered(entry: JsonDict, by: int) -> JsonDict:
        where = re.sub(r"(?<=layers\.)\d+", lambda m: str(int(m[0]) + by), entry["where"])
        return {**entry, "where": where}

    return [*data, *(renumbered(entry, n * period) for n in range(times) for entry in once)]


def inspection_text(data: JsonDict) -> str:
    """Return a human-readable inspection."""
    from moecc.families.describe import PAPER_GROUPS
    from moecc.support.text import amount, count_text

    parameters, blocks = data["parameters"], data["ffn_blocks"]
    named = {k: f"{k} {count_text(v)}" for k, v in parameters["groups"].items()}
    groups = ", ".join(text for k, text in named.items() if k not in PAPER_GROUPS)
    papers = ", ".join(text for k, text in named.items() if k in PAPER_GROUPS)
    stacks = " (" + ", ".join(f"{n} {k}" for k, n in data["stacks"].items()) + ")"
    lengths = " and ".join(map(str, data["sequence_lengths"].values()))
    # A model of images takes no tokens, and all of its sizes are fixed.
    unit, length = "input", "of fixed length"
    if lengths:
        unit, length = f"token of a sequence of {lengths}", f"of {lengths} tokens"
    counted = data["flops_per_sequence_counted"]
    family = data["family"] or "no family"
    shown = blocks["refused"]
    if len(shown) > _SHOWN:
        shown = [*shown[:_SHOWN], {"where": "…", "reason": f"{len(shown) - _SHOWN} more"}]
    from moecc.model.open import MODULE_TYPE

    program, stayed, reader = "a JAX function", "JAX", "moecc.jax.load"
    if data["family"] == MODULE_TYPE:
        program, stayed, reader = "a PyTorch model", "PyTorch", "moecc.torch.load"
    of_function = f"the blocks of {program}, `{data['function']}`"
    rows = [
        f"{data['source']}: "
        + (of_function if data["function"] else f"{family}, {amount(data['layers'], 'layer')}")
        + (stacks if data["stacks"] else "")
        + (f", {data['format']}, {data['dtype']}" if data["format"] else ", no weights"),
        *(f"  remark      {r}" for r in data["remarks"]),
        f"  parameters  {count_text(parameters['total'])} ({groups})",
        f"  groups      {papers}",
        f"  active      {count_text(parameters['active'])} per token",
        f"  FLOPs       {count_text(data['flops_per_token'])} per {unit}",
        f"  sequence    {length}: {count_text(data['flops_per_sequence'])} FLOPs as papers count; "
        f"{count_text(counted['weights'])} and {count_text(counted['attention'])} of attention in "
        "the graph",
        f"  FFN blocks  {blocks['found']} found, {blocks['convertible']} can be upcycled",
        *(f"    not {r['where']}: {r['reason']}" for r in shown),
    ]
    if data["function"]:
        rows += [
            f"  counted     the blocks alone: what stayed {stayed} is no part of the graph",
            f"  read by     {reader}: the parameters, for your program",
        ]
    else:
        rows += ["  targets", *_target_rows(data["targets"])]
    return "\n".join(rows)


def _target_rows(targets: JsonDict) -> Iterator[str]:
    """Yield a line for each target; those that are no target for the same reasons share theirs."""
    said: dict[tuple[str, bool], list[str]] = {}
    for name, target in targets.items():
        why = [f"        {line}" for r in target["reasons"] for line in r.splitlines()]
        key = "\n".join([_fit_text(target), *why]), bool(target["fits"])
        said.setdefault(key, []).append(name)
    for (text, fits), names in said.items():
        if len(names) == 1 or fits:
            yield from (f"    {name:12} {text}" for name in names)
        else:
            shown = wrap(", ".join(names), 96, initial_indent="    ", subsequent_indent="    ")
            yield "\n".join([*shown, f"        {text}"])


def _fit_text(target: JsonDict) -> str:
    from moecc.translate.engines import EngineVerdict, summary

    if not target["fits"]:
        return "does not fit"
    after = f" after {target['after']}" if target["after"] else ""
    engines = [EngineVerdict(**verdict) for verdict in target["engines"]]
    return f"fits{after}" + (f"; runs in: {summary(engines)}" if engines else "")
