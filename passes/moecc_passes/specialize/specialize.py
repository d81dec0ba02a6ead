"""The pass ``specialize``: a graph for training, or one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar, Literal

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph
from moecc.ir.structure import fingerprint
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult, Preserves, Remark
from moecc_passes.add_losses import remove_losses
from moecc_passes.routed import RoutedLayer, causal_values, routed_layers
from moecc_passes.specialize.layer import Keys, specialise
from moecc_passes.specialize.settings import Settings, recorded
from moecc_passes.specialize.undo import undo

TRAIN_ONLY = ("jitter", "input_dropout", "router_noise", "expert_dropout")
"""What perturbs a model on purpose, which only training has use for."""


@dataclass(frozen=True)
class SpecializePass(Pass):
    """Give the routed layers the capacity, the policy and the noise of training or evaluation.

    Weights stay as they are, so one checkpoint serves any capacity factor.  An option that is not
    given is what the graph's attribute ``routing`` says for the mode (the pass ``st-moe`` writes
    it), and what the layer has where that says nothing.  What an earlier specialisation added is
    taken back first, and losses and metrics are made anew.  Random numbers come from one input,
    ``key``.

    Before::

        %p = place %e {tokens=(batch, seq), experts=8} : i32[batch=B, seq=S, choice=2]

    After ``specialize{mode=train capacity-factor=1.25 policy=random}``::

        %u = random_uniform %k, %g : f32[batch=B, seq=S, choice=2]
        %s = keep_choices %g, %u : pred[batch=B, seq=S, choice=2]
        %p = place %e, %s {…, slots=capacity, capacity_factor=1.25, using=keep} : i32[…]
    """

    name: ClassVar[str] = "specialize"
    summary: ClassVar[str] = "set capacity, policy and noise for training or evaluation"
    must_match: ClassVar[bool] = True

    mode: Annotated[Literal["train", "eval"], "what the graph is for"] = "train"
    capacity_factor: Annotated[float | None, "bounds the rows of an expert"] = None
    dropless: Annotated[bool | None, "no bound at all"] = None
    convention: Annotated[
        Literal["tokens", "assignments"] | None,
        "what the factor multiplies: tokens (ST-MoE), or tokens times top-k (V-MoE)",
    ] = None
    rounding: Annotated[Literal["floor", "round", "ceil"] | None, "of the capacity"] = None
    multiple: Annotated[int | None, "the capacity is raised to a multiple of this"] = None
    minimum: Annotated[int | None, "the least capacity"] = None
    groups: Annotated[int | None, "the number of token groups"] = None
    group_size: Annotated[int | None, "the tokens of a group, in place of their number"] = None
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
    expert_dropout: Annotated[float | None, "train: dropout on the experts' hidden values"] = None
    force: Annotated[bool, "allow in a decoder what looks at later tokens"] = False

    @property
    def preserves(self) -> Preserves:
        """What is dropped depends on the routing; `apply` says more."""
        return Preserves("approximate", "capacity, policy and noise decide what experts see")

    def validate(self) -> list[Problem]:
        """Return which options are out of range or contradict each other."""
        return [*self._out_of_range(), *self._contradictions()]

    def _out_of_range(self) -> Iterator[Problem]:
        checks = (
            ("capacity-factor", self.capacity_factor, "more than 0", _within(0, inf, open=True)),
            ("multiple", self.multiple, "at least 1", _within(1, inf)),
            ("minimum", self.minimum, "at least 0", _within(0, inf)),
            ("groups", self.groups, "at least 1", _within(1, inf)),
            ("group-size", self.group_size, "at least 1", _within(1, inf)),
            ("threshold", self.threshold, "at least 0", _within(0, inf)),
            ("jitter", self.jitter, "0 <= jitter < 1", _within(0, 1)),
            ("input-dropout", self.input_dropout, "0 <= rate < 1", _within(0, 1)),
            ("router-noise", self.router_noise, "at least 0", _within(0, inf)),
            ("expert-dropout", self.expert_dropout, "0 <= rate < 1", _within(0, 1)),
        )
        for name, value, expected, fits in checks:
            if value is not None and not fits(value):
                hint = "ST-MoE: 1.25 in training, 2.0 at evaluation" if "factor" in name else None
                yield Problem("an option is out of range", name, expected, str(value), hint)

    def _contradictions(self) -> Iterator[Problem]:
        if self.dropless and self.capacity_factor is not None:
            yield Problem("a capacity factor bounds what is to have no bound", "dropless",
                          found=f"capacity-factor={self.capacity_factor}",
                          hint="leave one of them out")  # fmt: skip
        if self.groups is not None and self.group_size is not None:
            yield Problem("groups are given by their number or by their size", "group-size",
                          found=f"groups={self.groups} group-size={self.group_size}",
                          hint="leave one of them out")  # fmt: skip
        for field in TRAIN_ONLY if self.mode == "eval" else ():
            if getattr(self, field):
                yield Problem("an evaluation is not perturbed", field.replace("_", "-"),
                              "nothing, with mode=eval", str(getattr(self, field)),
                              "mode=train has it; ST-MoE has none of it in pre-training"
                              )  # fmt: skip
        if self.threshold is not None and self.policy in ("all", "none"):
            yield Problem(f"policy={self.policy} compares with no threshold", "threshold",
                          found=str(self.threshold), hint="policy=random threshold=0.2 is ST-MoE's"
                          )  # fmt: skip

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Specialise every routed layer.

        Raises:
          InputError: a layer of a decoder would see later tokens, or cannot have what is asked for.
        """
        before = fingerprint(graph)
        losses = remove_losses(graph)
        undo(graph)
        settings = Settings.of(self).over(recorded(graph, self.mode))
        layers = routed_layers(graph)
        causal = causal_values(graph)
        is_decoder = {y.name: y.dispatch.operands[0] in causal for y in layers}
        problems = [p for y in layers for p in self._misfits(y, settings, is_decoder[y.name])]
        if problems:
            raise InputError(problems)
        keys = Keys(graph)
        for layer in layers:
            specialise(layer, settings, keys)
        if layers:
            graph.attrs["mode"] = self.mode
        for remark in _remarks(routed_layers(graph), settings, is_decoder, self.mode):
            ctx.remark(remark)
        if losses is not None:
            # They look at capacity and policy, so they are made anew.
            losses.apply(graph, ctx)
        changed = fingerprint(graph) != before
        result = PassResult(changed, len(layers), {"layers": len(layers), "keys": keys.count})
        result.preserves = self.preserves if changed else EXACT
        return result

    def _misfits(
        self, layer: RoutedLayer, settings: Settings, is_decoder: bool
    ) -> Iterator[Problem]:
        looks_ahead = settings.priority or layer.placing.op.name == "expert_choice"
        if looks_ahead and is_decoder and not self.force:
            what = "batch-prioritised routing" if settings.priority else "expert choice"
            yield Problem(
                f"{what} in a decoder decides about a token by later ones", layer.name,
                hint="ST-MoE (Appendix D) has it in encoders only; force=true allows it",
            )  # fmt: skip
        if self.policy in ("threshold", "random") and layer.top_k == 1:
            yield Problem(
                f"policy={self.policy} decides about second experts, and there are none",
                layer.name, "top-k of 2 or more", "top-k=1", "ST-MoE has top-k=2",
            )  # fmt: skip
        if settings.expert_dropout:
            yield from _cannot_drop(layer, settings)


def _cannot_drop(layer: RoutedLayer, settings: Settings) -> Iterator[Problem]:
    bounded = {**layer.placing.attrs, **settings.placement()}["slots"] == "capacity"
    if not bounded:
        yield Problem(
            "dropout in experts needs slots that can be numbered", layer.name,
            "a capacity", "dropless rows", "capacity-factor=1.25, say",
        )  # fmt: skip
    if layer.last_matrix is None:
        yield Problem("the last matrix of the experts was not found", layer.name,
                      hint="expert-dropout=0.0")  # fmt: skip


def _within(least: float, below: float, *, open: bool = False) -> Callable[[float], bool]:
    return lambda value: (least < value if open else least <= value) and value < below


def _remarks(
    layers: list[RoutedLayer], settings: Settings, is_decoder: dict[str, bool], mode: str
) -> Iterator[Remark]:
    bounded = [y for y in layers if y.placing.attrs["slots"] == "capacity"]
    leaks = [y for y in bounded if is_decoder[y.name] and _looks_ahead(y)]
    if leaks:
        yield Remark(
            leaks[0].name,
            "in a decoder under a capacity the paper's order lets later tokens decide whether a "
            "second choice finds a slot; order=token is strictly causal",
        )
    for layer in bounded:
        attrs = layer.placing.attrs
        fits = attrs["capacity_factor"] / layer.top_k
        if layer.placing.op.name == "place" and attrs["convention"] == "tokens" and fits < 1:
            yield Remark(layer.name, f"at most {fits:.1%} of the choices find a slot")
    if mode == "eval" and settings.policy == "random":
        yield Remark("", "policy=random makes an evaluation random, too; policy=all does not")


def _looks_ahead(layer: RoutedLayer) -> bool:
    attrs = layer.placing.attrs
    return layer.top_k > 1 and attrs.get("order") == "choice"
