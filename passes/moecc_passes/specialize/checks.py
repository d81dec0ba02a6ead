"""Checks of the options of ``specialize``, alone and for a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf

from moecc.errors import Problem
from moecc.pipeline.passes import Pass
from moecc_passes.inputs import is_decoder as is_decoder_at
from moecc_passes.inputs import mask_misfit
from moecc_passes.routed import RoutedLayer
from moecc_passes.specialize.mode_config import ModeConfig
from moecc_passes.specialize.options import SpecializeOptions

TRAIN_ONLY = ("jitter", "input_dropout", "router_noise", "dropout", "expert_dropout")
"""Options that perturb a model on purpose, which only training uses."""

FURTHER = ("none", "threshold", "random")
"""Policies about choices after the first."""

CAPACITY = ("capacity_factor", "convention", "rounding", "multiple", "minimum", "cap")
"""Options that determine how many rows an expert takes."""


def problems(item: SpecializeOptions) -> list[Problem]:
    """Return the problems of the options, independent of the model."""
    return [*_out_of_range(item), *_contradictions(item)]


def _out_of_range(item: SpecializeOptions) -> Iterator[Problem]:
    checks = (
        ("capacity-factor", item.capacity_factor, "more than 0", _within(0, inf, open=True)),
        ("multiple", item.multiple, "at least 1", _within(1, inf)),
        ("minimum", item.minimum, "at least 1", _within(1, inf)),
        ("groups", item.groups, "at least 1", _within(1, inf)),
        ("group-size", item.group_size, "at least 1", _within(1, inf)),
        ("decoder-group-size", item.decoder_group_size, "at least 1", _within(1, inf)),
        ("threshold", item.threshold, "at least 0", _within(0, inf)),
        ("jitter", item.jitter, "0 <= jitter < 1", _within(0, 1)),
        ("input-dropout", item.input_dropout, "0 <= rate < 1", _within(0, 1)),
        ("router-noise", item.router_noise, "at least 0", _within(0, inf)),
        ("dropout", item.dropout, "0 <= rate < 1", _within(0, 1)),
        ("expert-dropout", item.expert_dropout, "0 <= rate < 1", _within(0, 1)),
    )
    hints = {
        "capacity-factor": "ST-MoE: 1.25 in training, 2.0 at evaluation",
        "group-size": "ST-MoE has 2 to 8 sequences in a group",
    }
    for name, value, expected, fits in checks:
        if value is not None and not fits(value):
            yield Problem("an option is out of range", name, expected, str(value), hints.get(name))


def _within(least: float, below: float, *, open: bool = False) -> Callable[[float], bool]:
    return lambda value: (least < value if open else least <= value) and value < below


def _contradictions(item: SpecializeOptions) -> Iterator[Problem]:
    for field in CAPACITY if item.dropless else ():
        value = getattr(item, field)
        if value is not None:
            name = field.replace("_", "-")
            yield Problem(f"{name} bounds rows, contradicting dropless", "dropless",
                          found=f"{name}={value}", hint="omit one of them")  # fmt: skip
    sizes = {"group-size": item.group_size, "decoder-group-size": item.decoder_group_size}
    for name, size in sizes.items():
        if item.groups is not None and size is not None:
            yield Problem("groups are defined by their number or by their size", name,
                          found=f"groups={item.groups} {name}={size}",
                          hint="omit one of them")  # fmt: skip
    for field in TRAIN_ONLY if item.mode == "eval" else ():
        if getattr(item, field):
            yield Problem("an evaluation is not perturbed", field.replace("_", "-"),
                          "nothing, with mode=eval", str(getattr(item, field)),
                          "mode=train has it; ST-MoE has none of it in pre-training"
                          )  # fmt: skip
    if item.threshold is not None and item.policy in ("all", "none"):
        yield Problem(f"policy={item.policy} compares with no threshold", "threshold",
                      found=str(item.threshold), hint="policy=random threshold=0.2 is ST-MoE's"
                      )  # fmt: skip


def problems_after(item: SpecializeOptions, earlier: Sequence[Pass]) -> Iterator[Problem]:
    """Yield the contradictions of the options with an earlier conversion, if there is one."""
    made = next((p for p in reversed(earlier) if hasattr(p, "top_k")), None)
    if made is None:
        return
    routing = getattr(made, "routing", "token-choice")
    if item.policy in FURTHER and (made.top_k == 1 or routing != "token-choice"):
        found = f"{made.name}{{top-k={made.top_k} routing={routing}}}"
        yield Problem(f"policy={item.policy} decides about second experts, and there are none",
                      "policy", "token choice with top-k of 2 or more", found,
                      "ST-MoE has top-k=2 and, in training, policy=random threshold=0.2"
                      )  # fmt: skip
    if item.expert_dropout and item.capacity_factor is None and _is_dropless(made):
        yield Problem("dropout in experts needs slots that can be numbered", "expert-dropout",
                      "a capacity", "dropless rows", "capacity-factor=1.25, as ST-MoE trains"
                      )  # fmt: skip


def _is_dropless(made: Pass) -> bool:
    return (
        getattr(made, "slots", "") == "ragged" and getattr(made, "routing", "") != "expert-choice"
    )


def misfits(
    item: SpecializeOptions, layer: RoutedLayer, settings: ModeConfig, is_decoder: bool
) -> Iterator[Problem]:
    """Yield why the settings are not valid for `layer`.

    Args:
      item: the options.
      layer: a routed layer.
      settings: the options, completed by the graph's mode.
      is_decoder: whether the layer is after a causal mask.
    """
    chooses = layer.experts_choose
    if (settings.priority or chooses) and is_decoder and not item.force:
        what = "expert choice" if chooses else "batch-prioritised routing"
        other = "; layers=encoder.*" if is_decoder_at(layer.assigner.loc) else ""
        yield Problem(
            f"{what} in a decoder decides about a token by later ones", layer.name,
            hint=f"ST-MoE (Appendix D) has it in encoders only{other}; force=true allows it",
        )  # fmt: skip
    if item.policy in FURTHER and (layer.top_k == 1 or layer.route is None):
        yield Problem(
            f"policy={item.policy} decides about second experts, and there are none",
            layer.name, "token choice with top-k of 2 or more",
            f"top-k={layer.top_k}" if layer.route else f"no best choice: {_kind(layer)}",
            "ST-MoE has top-k=2",
        )  # fmt: skip
    if item.priority and layer.route is None:
        yield Problem(
            "batch-prioritised routing goes by the probability of the first choice",
            layer.name, "token choice", _kind(layer), "priority=false",
        )  # fmt: skip
    for field in ("jitter", "input_dropout", "router_noise") if layer.scorer is None else ():
        if getattr(item, field):
            yield Problem("there is no router to perturb", layer.name, found=_kind(layer),
                          hint=f"leave {field.replace('_', '-')} out")  # fmt: skip
    if settings.padding_mask:
        graph, type, loc = layer.assigner.graph, layer.slots.type, layer.assigner.loc
        misfit = mask_misfit(graph, type, layer.tokens, loc)
        yield from [misfit] if misfit else []
    if settings.expert_dropout:
        yield from _cannot_drop(layer, settings)


def _kind(layer: RoutedLayer) -> str:
    if layer.experts_choose:
        return "experts choose tokens"
    return "experts by a hash" if layer.scorer is None else "one expert of each prototype"


def _cannot_drop(layer: RoutedLayer, settings: ModeConfig) -> Iterator[Problem]:
    bounded = {**layer.assigner.attrs, **settings.assignment()}["slots"] == "capacity"
    if not bounded and not layer.experts_choose:
        yield Problem(
            "dropout in experts needs slots that can be numbered", layer.name,
            "a capacity", "dropless rows", "capacity-factor=1.25, say",
        )  # fmt: skip
    if layer.last_matrix is None:
        yield Problem("the last matrix of the experts was not found", layer.name,
                      hint="expert-dropout=0.0")  # fmt: skip
