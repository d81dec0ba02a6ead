"""``moecc inspect``: describe a model, its convertible FFN blocks and its export targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadFamiliesOption
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.analysis import FFNSearch
    from moecc.families.describe import Description, Parameters
    from moecc.ir.graph import Graph
    from moecc.model.open import Model


@dataclass(frozen=True)
class InspectRequest:
    """The arguments and options of ``moecc inspect``."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face folder, a .gguf, a .moe, or preset:NAME.",
            autocompletion=complete.models,
        ),
    ]
    load: LoadFamiliesOption = None
    format: FormatOption = Format.human


def inspect(request: InspectRequest) -> None:
    """Describe SOURCE from its headers; no weights are read.

    Says the family, layers, parameters, the feed-forward blocks found and how many can be
    upcycled, and which families could hold the result, with the reasons why others cannot.
    """
    from moecc.cli.console import report
    from moecc.support.process import gc_paused

    # Neither imports nor layers leave garbage: of 10,000 layers, the collector would take half of
    # the time, and of three a tenth.
    with gc_paused():
        data = _inspection_of(request)
    report("inspect", data, lambda: inspection_text(data), request.format)


def _inspection_of(request: InspectRequest) -> JsonDict:
    from moecc.cli.files import say_weights
    from moecc.families.outside import load_families
    from moecc.model.open import open_model

    load_families(request.load)
    with open_model(request.source, config_alone=True) as model:
        say_weights(model, request.source)
        return inspection(model)


def inspection(model: Model) -> JsonDict:
    """Return the inspection of `model` as JSON values."""
    from moecc.analysis import find_ffn_blocks
    from moecc.families.describe import describe
    from moecc.ir.structure import without_opaque
    from moecc.ir.unroll import unrolled
    from moecc.model.open import MODEL_TYPE, function_name

    # Repeated layers count once per repetition.
    graph = unrolled(without_opaque(model.graph))
    facts, name = describe(graph), function_name(graph)
    return {
        "source": model.name,
        "format": model.checkpoint.format if model.checkpoint else None,
        "dtype": model.dtype.name if model.checkpoint else None,
        "remarks": model.remarks(),
        "family": graph.attrs.get("family") if name is None else MODEL_TYPE,
        "function": name,
        "layers": facts.layers,
        "stacks": facts.stacks,
        "nodes": len(graph),
        "parameters": _parameters(facts.parameters),
        "flops_per_token": facts.flops_per_token,
        **_flops_of_sequence(facts),
        "ffn_blocks": _blocks(find_ffn_blocks(graph)),
        # A function is no model of a family, with blocks or without.
        "targets": {} if name is not None else _targets(graph),
    }


def _flops_of_sequence(facts: Description) -> dict[str, object]:
    from moecc.families.describe import CONVENTION

    found = facts.sequence
    return {
        "flops_per_sequence": found.paper,
        "flops_convention": CONVENTION,
        "flops_per_sequence_counted": {"weights": found.weights, "attention": found.attention},
        "sequence_lengths": found.lengths,
    }


def _parameters(found: Parameters) -> dict[str, object]:
    from moecc.families.describe import paper_groups

    return {
        "total": found.total,
        "active": found.active,
        "groups": {**paper_groups(found.groups), **found.groups},
    }


def _blocks(search: FFNSearch) -> dict[str, object]:
    return {
        "found": len(search.blocks) + len(search.refusals),
        "convertible": len(search.blocks),
        "refused": [{"where": r.loc, "reason": r.reason} for r in search.refusals],
    }


def _targets(graph: Graph) -> dict[str, object]:
    from moecc.tasks.targets import fits

    return {fit.target: fit.to_json() for fit in fits(graph)}


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
    one, length = ("token", f"of {lengths} tokens") if lengths else ("input", "of fixed length")
    counted = data["flops_per_sequence_counted"]
    family = data["family"] or "no family"
    of_function = f"the blocks of a JAX function, `{data['function']}`"
    rows = [
        f"{data['source']}: "
        + (of_function if data["function"] else f"{family}, {amount(data['layers'], 'layer')}")
        + (stacks if data["stacks"] else "")
        + (f", {data['format']}, {data['dtype']}" if data["format"] else ", no weights"),
        *(f"  remark      {r}" for r in data["remarks"]),
        f"  parameters  {count_text(parameters['total'])} ({groups})",
        f"  groups      {papers}",
        f"  active      {count_text(parameters['active'])} per token",
        f"  FLOPs       {count_text(data['flops_per_token'])} per {one}",
        f"  sequence    {length}: {count_text(data['flops_per_sequence'])} FLOPs as papers count; "
        f"{count_text(counted['weights'])} and {count_text(counted['attention'])} of attention in "
        "the graph",
        f"  FFN blocks  {blocks['found']} found, {blocks['convertible']} can be upcycled",
        *(f"    not {r['where']}: {r['reason']}" for r in _some(blocks["refused"])),
    ]
    return "\n".join([*rows, *_ending(data)])


def _ending(data: JsonDict) -> Iterator[str]:
    """Yield who takes the model."""
    if data["function"]:
        yield "  counted     the blocks alone: what stayed JAX is no part of the graph"
        yield "  read by     moecc.jax.load: the parameters, for the function in your program"
        return
    yield "  targets"
    yield from _target_rows(data["targets"])


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
    from moecc.translate.engines import Verdict, summary

    if not target["fits"]:
        return "does not fit"
    after = f" after {target['after']}" if target["after"] else ""
    engines = [Verdict(**verdict) for verdict in target["engines"]]
    return f"fits{after}" + (f"; runs in: {summary(engines)}" if engines else "")


def _some(refused: list[dict[str, str]], limit: int = 4) -> list[dict[str, str]]:
    if len(refused) <= limit:
        return refused
    more = {"where": "…", "reason": f"{len(refused) - limit} more"}
    return [*refused[:limit], more]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app, "inspect", InspectRequest, inspect, "Example: moecc inspect SmolLM2-135M --format json"
    )
