"""The passes ``specialize`` and ``record-modes``: a graph for training or evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.ir.ops.routing import Policy
from moecc.ir.structure import fingerprint
from moecc.rewrite.passes import EXACT, Bounds, Context, Pass, PassResult, Preserves, Remark, advice
from moecc.rewrite.pattern import NearMiss
from moecc_passes.add_losses import remove_losses
from moecc_passes.routed import (
    NOTHING_ROUTED,
    RoutedLayer,
    causal_values,
    mask_misfit,
    mask_name,
    routed_layers,
)
from moecc_passes.routed import is_decoder as is_decoder_at
from moecc_passes.specialize.layer import (
    ATTRIBUTE,
    FACTOR,
    GROUP,
    ModeConfig,
    RandomKeys,
    drop,
    recorded,
    specialise,
    undo,
)

# Checks of the options of ``specialize``, alone and for a layer.

NOISE = {
    "jitter": "jitter",
    "input_dropout": "dropout on the router's input",
    "router_noise": "noise on the router's logits",
    "dropout": "dropout",
    "expert_dropout": "expert dropout",
}
"""Options that perturb a model on purpose, which only training uses, and what they are."""

FURTHER = ("none", "threshold", "random")
"""Policies about choices after the first."""

CAPACITY = ("capacity_factor", "convention", "rounding", "multiple", "minimum", "cap")
"""Options that determine how many rows an expert takes."""


def problems(item: ModeConfig) -> Iterator[Problem]:
    """Yield the contradictions of the options, independent of the model."""
    hint = "omit one of them"
    for field in CAPACITY if item.dropless else ():
        value, name = getattr(item, field), field.replace("_", "-")
        if value is not None:
            message = f"{name} bounds rows, contradicting dropless"
            yield Problem(message, "dropless", found=f"{name}={value}", hint=hint)
    sizes = {"group-size": item.group_size, "decoder-group-size": item.decoder_group_size}
    for name, size in sizes.items():
        if item.groups is not None and size is not None:
            message = "groups are defined by their number or by their size"
            yield Problem(message, name, found=f"groups={item.groups} {name}={size}", hint=hint)
    for field in NOISE if item.mode == "eval" else ():
        if value := getattr(item, field):
            yield Problem(
                "an evaluation is not perturbed",
                field.replace("_", "-"),
                "nothing, with mode=eval",
                str(value),
                "mode=train has it; ST-MoE has none of it in pre-training",
            )
    if item.threshold is not None and item.policy in ("all", "none"):
        message, hint = f"policy={item.policy} compares with no threshold", "threshold"
        yield Problem(
            message, hint, found=str(item.threshold), hint="policy=random threshold=0.2 is ST-MoE's"
        )


def problems_after(item: ModeConfig, earlier: Sequence[Pass]) -> Iterator[Problem]:
    """Yield the contradictions of the options with an earlier conversion, if there is one."""
    conversion = next((p for p in reversed(earlier) if hasattr(p, "top_k")), None)
    if conversion is None:
        return
    routing = getattr(conversion, "routing", "token-choice")
    if item.policy in FURTHER and (conversion.top_k == 1 or routing != "token-choice"):
        yield Problem(
            f"policy={item.policy} decides about second experts, and there are none",
            "policy",
            "token choice with top-k of 2 or more",
            f"{conversion.name}{{top-k={conversion.top_k} routing={routing}}}",
            "ST-MoE has top-k=2 and, in training, policy=random threshold=0.2",
        )
    is_dropless = getattr(conversion, "slots", "") == "ragged" and routing != "expert-choice"
    if item.expert_dropout and item.capacity_factor is None and is_dropless:
        yield Problem(
            "dropout in experts needs slots that can be numbered",
            "expert-dropout",
            "a capacity",
            "dropless rows",
            "capacity-factor=1.25, as ST-MoE trains",
        )


def misfits(
    item: ModeConfig, layer: RoutedLayer, settings: ModeConfig, is_decoder: bool
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
        routing = "expert choice" if chooses else "batch-prioritised routing"
        option = "; layers=encoder.*" if is_decoder_at(layer.assigner.loc) else ""
        yield Problem(
            f"{routing} in a decoder decides about a token by later ones",
            layer.name,
            hint=f"ST-MoE (Appendix D) has it in encoders only{option}; force=true allows it",
        )
    if item.policy in FURTHER and (layer.top_k == 1 or layer.route is None):
        yield Problem(
            f"policy={item.policy} decides about second experts, and there are none",
            layer.name,
            "token choice with top-k of 2 or more",
            f"top-k={layer.top_k}" if layer.route else f"no best choice: {_kind(layer)}",
            "ST-MoE has top-k=2",
        )
    if item.priority and layer.route is None:
        yield Problem(
            "batch-prioritised routing goes by the probability of the first choice",
            layer.name,
            "token choice",
            _kind(layer),
            "priority=false",
        )
    for field in ("jitter", "input_dropout", "router_noise") if layer.scorer is None else ():
        if getattr(item, field):
            yield Problem(
                "there is no router to perturb",
                layer.name,
                found=_kind(layer),
                hint=f"leave {field.replace('_', '-')} out",
            )
    if settings.padding_mask:
        graph, type, loc = layer.assigner.graph, layer.slots.type, layer.assigner.loc
        misfit = mask_misfit(graph, type, layer.tokens, loc)
        yield from [misfit] if misfit else []
    if settings.expert_dropout:
        slots = {**layer.assigner.attrs, **settings.assignment()}["slots"]
        if slots != "capacity" and not layer.experts_choose:
            yield Problem(
                "dropout in experts needs slots that can be numbered",
                layer.name,
                "a capacity",
                "dropless rows",
                "capacity-factor=1.25, say",
            )
        if layer.last_matrix is None:
            message = "the last matrix of the experts was not found"
            yield Problem(message, layer.name, hint="expert-dropout=0.0")


def _kind(layer: RoutedLayer) -> str:
    if layer.experts_choose:
        return "experts choose tokens"
    return "experts by a hash" if layer.scorer is None else "one expert of each prototype"


# What ST-MoE advises against among the options of ``specialize``.


def lints(item: ModeConfig) -> Iterator[Problem]:
    """Yield the lints of the options, in training."""
    for field, noise in NOISE.items() if item.mode == "train" else ():
        if value := getattr(item, field):
            yield advice(
                f"in pre-training {noise} costs quality",
                field.replace("_", "-"),
                "section 3.2",
                expected="0; fine-tuning is another matter (section 4.1)",
                value=value,
            )
    rate = item.expert_dropout
    if item.mode == "train" and item.dropout and rate is not None and rate < item.dropout:
        message = "experts have less dropout than the rest, and overfit sooner"
        expected = f"{item.dropout:g} or more"
        yield advice(message, "expert-dropout", "section 4.1", expected=expected, value=rate)


# The remarks of ``specialize`` on layers that it changed.


def remarks(
    layers: list[RoutedLayer], settings: ModeConfig, is_decoder: dict[str, bool], mode: str
) -> Iterator[Remark]:
    """Yield remarks on the layers as they are now."""
    bounded = [y for y in layers if y.assignment.slots == "capacity"]
    leaks = [
        y
        for y in bounded
        if is_decoder[y.name] and y.top_k > 1 and y.assigner.attrs.get("order") == "choice"
    ]
    if leaks:
        yield Remark(
            leaks[0].name,
            "in a decoder under a capacity the paper's order lets later tokens decide whether a "
            "second choice finds a slot; order=token is strictly causal",
        )
    for layer in bounded:
        attrs = layer.assignment
        fits = attrs.capacity_factor / layer.top_k
        if not layer.experts_choose and attrs.convention == "tokens" and fits < 1:
            yield Remark(layer.name, f"at most {fits:.1%} of the choices find a slot")
    for layer in layers:
        name = mask_name(layer.assigner.loc)
        if name in layer.assigner.graph.inputs and "mask" not in layer.given():
            yield Remark(layer.name, f"routes padding, too; padding-mask=true goes by %{name}")
    if mode == "eval" and settings.policy == "random":
        yield Remark("", "policy=random makes an evaluation random, too; policy=all does not")


@dataclass(frozen=True)
class SpecializePass(ModeConfig, Pass):
    """Set the capacity, the policy and the noise of training or evaluation on the routed layers.

    Weights stay as they are, so one checkpoint serves any capacity factor.  An option that is not
    given is what the graph's attribute ``routing`` says for the mode (the pass ``st-moe`` writes
    it), and what the layer has where that says nothing.  What an earlier specialisation added is
    taken back first, and losses and metrics are made anew.  Random numbers come from one input,
    ``key``.

    Before::

        %p = assign_slots %e {tokens=(batch, seq), experts=8} : i32[batch=B, seq=S, choice=2]

    After ``specialize{mode=train capacity-factor=1.25 policy=random}``::

        %u = random_uniform %k, %g : f32[batch=B, seq=S, choice=2]
        %s = keep_choices %g, %u : pred[batch=B, seq=S, choice=2]
        %p = assign_slots %e, %s {…, slots=capacity, capacity_factor=1.25, using=keep} : i32[…]
    """

    name = "specialize"
    summary = "set capacity, policy and noise for training or evaluation"
    must_match = True

    @property
    def preserves(self) -> Preserves:
        """What is dropped depends on the routing; `apply` is more precise."""
        return Preserves("approximate", "capacity, policy and noise decide what experts see")

    def validate(self) -> list[Problem]:
        """Return which options are out of range or contradict each other."""
        return [*super().validate(), *problems(self)]

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return contradictions with an earlier conversion."""
        return list(problems_after(self, earlier))

    def lints(self) -> list[Problem]:
        """Return what the paper would not do in training."""
        return list(lints(self))

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Specialise every routed layer.

        Raises:
          InputError: a layer of a decoder would see later tokens, or does not support the options.
        """
        before = fingerprint(graph)
        losses = remove_losses(graph)
        undo(graph, self.covers)
        settings = self.over(recorded(graph, self.mode))
        routed = routed_layers(graph)
        layers = [y for y in routed if self.covers(y.assigner.loc)]
        causal = causal_values(graph)
        is_decoder = {y.name: y.dispatch.operands[0] in causal for y in layers}
        problems = [p for y in layers for p in misfits(self, y, settings, is_decoder[y.name])]
        if problems:
            raise InputError(problems)
        keys, dropped = RandomKeys(graph), 0
        for layer in layers:
            specialise(layer, settings.at(layer.assigner.loc), keys)
        for name in ("mask", "decoder_mask") if settings.padding_mask is False else ():
            if name in graph.inputs and not graph.inputs[name].users:
                graph.erase_input(name)
        if settings.dropout and layers:
            dropped = drop(graph, settings.dropout, keys, self.covers)
        if layers:
            graph.attrs["mode"] = self.mode
        changed = [y for y in routed_layers(graph) if self.covers(y.assigner.loc)]
        for remark in remarks(changed, settings, is_decoder, self.mode):
            ctx.remark(remark)
        if losses is not None:
            # They read capacity and policy, so they are computed again.
            losses.apply(graph, ctx)
        stats = {"layers": len(layers), "keys": keys.count, "dropouts": dropped}
        result = PassResult(fingerprint(graph) != before, len(layers), stats)
        if not routed:
            result.near_misses = [NOTHING_ROUTED]
        elif not layers:
            reason = f"layers={self.layers} names none of {routed[0].name} … {routed[-1].name}"
            result.near_misses = [NearMiss("specialize", "the graph", reason)]
        result.preserves = self.preserves if result.changed else EXACT
        return result

    def covers(self, loc: str) -> bool:
        """Return whether the option ``layers`` selects the location `loc`."""
        return self.layers == "all" or fnmatchcase(loc, self.layers)


MODES = ("train", "eval")
"""The modes that a graph can be specialised for."""


@dataclass(frozen=True)
class RecordModesPass(Pass):
    """Record the defaults of ``specialize`` for each mode in the graph.

    Before::

        graph model { … }

    After ``record-modes``::

        attr routing = {"train": {"capacity_factor": 1.25, "policy": "random", …}, "eval": {…}}
    """

    name = "record-modes"
    summary = "record the settings of training and evaluation in the graph"
    preserves = EXACT

    train_capacity_factor: Annotated[float, "capacity factor in training", FACTOR] = 1.25
    eval_capacity_factor: Annotated[float, "capacity factor in evaluation", FACTOR] = 2.0
    train_policy: Annotated[Policy, "policy that keeps second choices in training"] = "random"
    eval_policy: Annotated[Policy, "policy that keeps second choices in evaluation"] = "all"
    threshold: Annotated[float, "gate threshold of the policies", Bounds(0)] = 0.2
    group_size: Annotated[
        int | None, "tokens per group; none: the whole batch is one group", GROUP
    ] = None
    decoder_group_size: Annotated[
        int | None,
        "tokens per group in the decoder of an encoder-decoder, if it differs",
        Bounds(1),
    ] = None

    def settings(self, mode: str) -> ModeConfig:
        """Return the settings of `mode`, one of `MODES`."""
        policy: Policy = getattr(self, f"{mode}_policy")
        return ModeConfig(
            capacity_factor=getattr(self, f"{mode}_capacity_factor"),
            policy=policy,
            threshold=self.threshold if policy in ("threshold", "random") else None,
            group_size=self.group_size,
            decoder_group_size=self.decoder_group_size,
        )

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Write the attribute ``routing`` of the graph."""
        before = graph.attrs.get(ATTRIBUTE)
        graph.attrs[ATTRIBUTE] = {mode: self.settings(mode).settings() for mode in MODES}
        return PassResult(changed=graph.attrs[ATTRIBUTE] != before, matched=len(MODES))
