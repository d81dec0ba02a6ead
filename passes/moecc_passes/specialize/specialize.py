"""The pass ``specialize``: a graph for training or evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.ir.structure import fingerprint
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves, Remark, advice
from moecc.rewrite.pattern import NearMiss
from moecc_passes.add_losses import remove_losses
from moecc_passes.inputs import is_decoder as is_decoder_at
from moecc_passes.inputs import mask_misfit, mask_name
from moecc_passes.routed import NOTHING_ROUTED, RoutedLayer, causal_values, routed_layers
from moecc_passes.specialize.layer import Keys, ModeConfig, drop, recorded, specialise, undo

# The options of ``specialize``.


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


# Checks of the options of ``specialize``, alone and for a layer.

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


# What ST-MoE advises against among the options of ``specialize``.

NOISE = (
    ("jitter", "jitter"),
    ("input_dropout", "dropout on the router's input"),
    ("router_noise", "noise on the router's logits"),
    ("dropout", "dropout"),
    ("expert_dropout", "expert dropout"),
)
"""Options that make training noisy, and what they are."""


def lints(item: SpecializeOptions) -> list[Problem]:
    """Return the lints of the options, in training."""
    if item.mode != "train":
        return []
    found = [
        advice(f"in pre-training {what} costs quality", field.replace("_", "-"), "section 3.2",
               expected="0; fine-tuning is another matter (section 4.1)",
               value=getattr(item, field))
        for field, what in NOISE
        if getattr(item, field)
    ]  # fmt: skip
    if item.dropout and item.expert_dropout is not None and item.expert_dropout < item.dropout:
        what = "experts have less dropout than the rest, and overfit sooner"
        least, place = f"{item.dropout:g} or more", "expert-dropout"
        found.append(advice(what, place, "section 4.1", expected=least, value=item.expert_dropout))
    return found


# The remarks of ``specialize`` on layers that it changed.


def remarks(
    layers: list[RoutedLayer], settings: ModeConfig, is_decoder: dict[str, bool], mode: str
) -> Iterator[Remark]:
    """Yield remarks on the layers as they are now."""
    bounded = [y for y in layers if y.assignment.slots == "capacity"]
    leaks = [y for y in bounded if is_decoder[y.name] and _looks_ahead(y)]
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


def _looks_ahead(layer: RoutedLayer) -> bool:
    attrs = layer.assigner.attrs
    return layer.top_k > 1 and attrs.get("order") == "choice"


@dataclass(frozen=True)
class SpecializePass(SpecializeOptions, Pass):
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

    name: ClassVar[str] = "specialize"
    summary: ClassVar[str] = "set capacity, policy and noise for training or evaluation"
    must_match: ClassVar[bool] = True

    @property
    def preserves(self) -> Preserves:
        """What is dropped depends on the routing; `apply` is more precise."""
        return Preserves("approximate", "capacity, policy and noise decide what experts see")

    def validate(self) -> list[Problem]:
        """Return which options are out of range or contradict each other."""
        return problems(self)

    def validate_after(self, earlier: Sequence[Pass]) -> list[Problem]:
        """Return contradictions with an earlier conversion."""
        return list(problems_after(self, earlier))

    def lints(self) -> list[Problem]:
        """Return what the paper would not do in training."""
        return lints(self)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Specialise every routed layer.

        Raises:
          InputError: a layer of a decoder would see later tokens, or does not support the options.
        """
        before = fingerprint(graph)
        losses = remove_losses(graph)
        undo(graph, self.covers)
        settings = ModeConfig.of(self).over(recorded(graph, self.mode))
        layers = self._layers(graph)
        causal = causal_values(graph)
        is_decoder = {y.name: y.dispatch.operands[0] in causal for y in layers}
        problems = [p for y in layers for p in misfits(self, y, settings, is_decoder[y.name])]
        if problems:
            raise InputError(problems)
        stats = self._specialise(graph, layers, settings)
        if layers:
            graph.attrs["mode"] = self.mode
        for remark in remarks(self._layers(graph), settings, is_decoder, self.mode):
            ctx.remark(remark)
        if losses is not None:
            # They read capacity and policy, so they are computed again.
            losses.apply(graph, ctx)
        result = PassResult(fingerprint(graph) != before, len(layers), stats)
        result.near_misses = [] if layers else [self._near_miss(graph)]
        result.preserves = self.preserves if result.changed else EXACT
        return result

    def covers(self, loc: str) -> bool:
        """Return whether the option ``layers`` selects the location `loc`."""
        return self.layers == "all" or fnmatchcase(loc, self.layers)

    def _layers(self, graph: Graph) -> list[RoutedLayer]:
        return [y for y in routed_layers(graph) if self.covers(y.assigner.loc)]

    def _near_miss(self, graph: Graph) -> NearMiss:
        routed = routed_layers(graph)
        if not routed:
            return NOTHING_ROUTED
        places = f"{routed[0].name} … {routed[-1].name}"
        return NearMiss("specialize", "the graph", f"layers={self.layers} names none of {places}")

    def _specialise(
        self, graph: Graph, layers: list[RoutedLayer], settings: ModeConfig
    ) -> dict[str, int]:
        keys, dropped = Keys(graph), 0
        for layer in layers:
            specialise(layer, settings.at(layer.assigner.loc), keys)
        if settings.padding_mask is False:
            _erase_unused_masks(graph)
        if settings.dropout and layers:
            dropped = drop(graph, settings.dropout, keys, self.covers)
        return {"layers": len(layers), "keys": keys.count, "dropouts": dropped}


def _erase_unused_masks(graph: Graph) -> None:
    for name in ("mask", "decoder_mask"):
        if name in graph.inputs and not graph.inputs[name].users:
            graph.erase_input(name)
