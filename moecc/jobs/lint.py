"""``moecc lint``: what the design guide advises against in a model or a pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from math import sqrt
from typing import Annotated, Literal

from moecc.analysis import parameter_groups, trainable
from moecc.errors import Problem, UsageError
from moecc.families.experts import expert_layers
from moecc.formats.run import split_reference
from moecc.formats.store import is_address
from moecc.ir.graph import Graph, Value
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.unroll import unrolled
from moecc.jobs.command import Load, Report, Spelling
from moecc.model.open import open_model, registry_with
from moecc.presets import PREFIX
from moecc.rewrite.passes import advice, too_many_experts, too_much_capacity
from moecc.rewrite.pipeline import Pipeline
from moecc.weights.draws import Normal, TruncatedNormal

# Lints of a model or a pipeline: what the design guide of ST-MoE advises against.

_NAME = re.compile(r"[\w./-]+")
"""A text that may be the name of a folder as well as that of a pass."""

LEAST_LOGIT_STD, MOST_LOGIT_STD = 0.03, 3.0
"""Of a router's logits for a normalised input; Switch's initialisation has √0.1."""


def lint(
    target: Annotated[str, Spelling("MODEL|PIPELINE", complete="models_or_pipelines")],
    *,
    cores: Annotated[int | None, Spelling("N", low=1)] = None,
    warnings: Literal["report", "error"] = "report",
    load: Load = (),
) -> Report:
    """Show what the design guide advises against.

    The guide is that of ST-MoE; each finding cites its section. No weights are read. The warnings
    that other commands print are shown, too.

    Args:
      target: Model, or text of a pipeline.
      cores: Number of cores of the machine that a model is for.
      warnings: Treatment of findings: report them, or also end with exit code 1.

    Example:
      moecc lint 'upcycle{experts=512 gates=softmax}' --warnings error
    """
    registry = registry_with(load)
    is_named = target.startswith(PREFIX) or target.endswith((".moe", ".gguf"))
    is_named = is_named or is_address(target)
    if is_named or os.path.exists(target) or split_reference(target) is not None:
        kind = "model"
        with open_model(target, config_alone=True) as model:
            warned = [Problem(text, model.name) for text in model.warnings]
            findings = merged([*warned, *graph_lints(model.graph, cores)])
    else:
        kind = "pipeline"
        try:
            pipeline = Pipeline.parse(target, registry)
        except UsageError as error:
            if _NAME.fullmatch(target) is None:
                raise
            there = f"neither a pass nor a model: there is no file or folder {target!r}"
            raise UsageError(there, hint=error.problems[0].hint) from None
        findings = merged([*pipeline.warnings(), *pipeline.lints()])
    rows = [asdict(problem) for problem in findings]
    return Report(
        "lint",
        {"target": target, "kind": kind, "findings": rows},
        lambda: "\n".join(map(str, findings)) or f"nothing to say against this {kind}",
        exit_code=int(bool(findings) and warnings == "error"),
    )


def graph_lints(graph: Graph, cores: int | None) -> Iterator[Problem]:
    """Yield the lints of a graph."""
    flat = unrolled(graph)
    for layer in expert_layers(flat):
        yield from too_many_experts(layer.experts, layer.loc)
        if cores is not None and layer.experts > cores:
            yield advice("there is more than one expert for each core", layer.loc, "section 5.1",
                         expected=f"at most {cores}", value=layer.experts)  # fmt: skip
        if layer.top_k > 1 and layer.gates in ("softmax", "sigmoid"):
            yield advice("gates of several experts are not renormalised over those chosen",
                         layer.loc, "appendix G", expected="renormalised",
                         value=layer.gates)  # fmt: skip
    for node in flat:
        if node.op.assigns_slots and node.attrs["slots"] == "capacity":
            attrs = SlotsOp.of_node(node)
            yield from too_much_capacity(attrs.capacity_factor, attrs.experts, node.loc)
    groups, trained = parameter_groups(flat), trainable(flat)
    for name, value in flat.params.items():
        if "router" not in groups[name] or not value.type.dtype.is_float:
            continue
        products = [node for node in value.users if node.op.is_product]
        if products and any(node.attrs["precision"] != "f32" for node in products):
            yield advice("the router is not computed in float32", f"param %{name}", "section 3.4",
                         expected="contract {precision=f32}")  # fmt: skip
        if not trained.get(name, True) and any(trained.values()):
            yield advice("the router is frozen, so that no loss can balance the experts",
                         f"param %{name}", "appendix A")  # fmt: skip
        yield from _initial(value)


def _initial(value: Value) -> Iterator[Problem]:
    """Yield a lint for a router that is drawn, and with logits far from the paper's."""
    drawn, width = value.weight, value.type.by_name.get("embed")
    if not isinstance(drawn, (Normal, TruncatedNormal)) or width is None:
        return
    std = drawn.std * sqrt(int(str(width.size)))
    if not LEAST_LOGIT_STD <= std <= MOST_LOGIT_STD:
        yield advice("the router's logits begin far from those of the paper",
                     f"param %{value.name}", "section 6.2",
                     expected=f"a standard deviation of {LEAST_LOGIT_STD:g} to "
                              f"{MOST_LOGIT_STD:g}", value=float(std))  # fmt: skip


def merged(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems, with those that differ in their place alone merged into one."""
    places: dict[Problem, list[str]] = {}
    for problem in problems:
        places.setdefault(replace(problem, where=None), []).append(problem.where or "")
    return [
        replace(
            p, where=where[0] if len(where) == 1 else f"{where[0]} … {where[-1]} ({len(where)})"
        )
        for p, where in places.items()
    ]
