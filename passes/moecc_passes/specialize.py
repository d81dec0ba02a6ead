"""The passes ``specialize`` and ``record-modes``: a graph for training or evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from moecc.analysis import find_ffn_blocks
from moecc.errors import Problem, raise_problems
from moecc.ir.builder import Builder
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.moe import emit_dropout, emit_jitter, emit_noise, emit_priority, emit_rescaled
from moecc.ir.ops.routing import Policy, RouteOp
from moecc.ir.structure import fingerprint, replace_value
from moecc.rewrite import P, fits
from moecc.rewrite.passes import EXACT, Bounds, Context, Pass, PassResult, Preserves, Remark, advice
from moecc.rewrite.pattern import NearMiss
from moecc.types import KEY, TensorType
from moecc_passes.add_losses import remove_losses
from moecc_passes.routed import (
    FACTOR,
    NOTHING_ROUTED,
    PRODUCT,
    RoutedLayer,
    causal_values,
    is_decoder,
    mask_misfit,
    mask_name,
    padding_mask,
    routed_layers,
)

# The settings of a mode for routed layers, and their record in a graph.

ATTRIBUTE = "routing"
"""The graph attribute that stores the settings of its modes."""

UNSAID = "as-is"
"""The value of a policy that leaves a layer unchanged."""

ASSIGNMENT = (
    "capacity_factor", "convention", "rounding", "multiple", "minimum", "cap", "groups",
    "group_size", "order",
)  # fmt: skip
"""Settings that are attributes of ``assign_slots``."""


GROUP = Bounds(1, hint="ST-MoE has 2 to 8 sequences in a group")
DecoderGroupSize = Annotated[
    int | None, "tokens per group in the decoder of an encoder-decoder, if it differs", Bounds(1)
]


@dataclass(frozen=True)
class ModeConfig:
    """The options of ``specialize``, and the settings of a mode; None leaves a layer unchanged."""

    mode: Annotated[Literal["train", "eval"], "purpose of the graph"] = "train"
    layers: Annotated[str, "all, or a glob over locations: encoder.*, layers.3.ffn"] = "all"
    capacity_factor: Annotated[
        float | None, "bound on the rows of an expert, as a multiple of its mean load", FACTOR
    ] = None
    dropless: Annotated[bool | None, "whether to remove every bound"] = None
    convention: Annotated[
        Literal["tokens", "assignments"] | None,
        "quantity that the factor multiplies: tokens (ST-MoE), or tokens times top-k (V-MoE)",
    ] = None
    rounding: Annotated[Literal["floor", "round", "ceil"] | None, "rounding of the capacity"] = None
    multiple: Annotated[int | None, "number of which the capacity is a multiple", Bounds(1)] = None
    minimum: Annotated[int | None, "minimum capacity", Bounds(1)] = None
    cap: Annotated[bool | None, "whether the capacity is at most the tokens of a group"] = None
    groups: Annotated[int | None, "the number of token groups", Bounds(1)] = None
    group_size: Annotated[
        int | None, "tokens per group, in place of the number of groups", GROUP
    ] = None
    decoder_group_size: DecoderGroupSize = None
    order: Annotated[
        Literal["choice", "token"] | None,
        "order in which slots are assigned: first choices before second choices, or "
        "token by token, which is strictly causal",
    ] = None
    policy: Annotated[
        Literal["as-is", "all", "none", "threshold", "random"],
        "policy that keeps choices after the first",
    ] = "as-is"
    threshold: Annotated[float | None, "threshold for renormalised gates; none: 0.2", Bounds(0)] = (
        None
    )
    padding_mask: Annotated[
        bool | None, "whether an input mask excludes padding from slots and losses"
    ] = None
    priority: Annotated[
        bool | None,
        "whether tokens are served in the order of their probability "
        "(batch-prioritised routing); not causal",
    ] = None
    after_drop: Annotated[
        Literal["keep", "rescale"] | None, "treatment of the remaining gates after a drop"
    ] = None
    jitter: Annotated[
        float | None,
        "train: half-width of the uniform noise around 1 that multiplies the "
        "router's input (Switch: 0.01)",
        Bounds(0, 1),
    ] = None
    input_dropout: Annotated[
        float | None, "train: dropout rate of the router's input", Bounds(0, 1)
    ] = None
    router_noise: Annotated[
        float | None, "train: standard deviation of normal noise on the logits", Bounds(0)
    ] = None
    dropout: Annotated[
        float | None,
        "train: dropout rate of the outputs of sublayers and of the hidden values of dense blocks",
        Bounds(0, 1),
    ] = None
    expert_dropout: Annotated[
        float | None, "train: dropout rate of the experts' hidden values", Bounds(0, 1)
    ] = None
    force: Annotated[bool, "allow routing in a decoder that depends on later tokens"] = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that change a layer, by name."""
        names = [f.name for f in fields(ModeConfig) if f.name not in ("mode", "layers", "force")]
        values = {name: getattr(self, name) for name in names}
        return {name: v for name, v in values.items() if v is not None and v != UNSAID}

    def over(self, defaults: ModeConfig) -> ModeConfig:
        """Return these settings, completed by `defaults`."""
        mine, more = self.settings(), defaults.settings()
        if "groups" in mine:
            more = {n: v for n, v in more.items() if not n.endswith("group_size")}
        if "group_size" in mine:
            more.pop("groups", None)
        return ModeConfig(**{**more, **mine})

    def at(self, loc: str) -> ModeConfig:
        """Return the settings for a layer at `loc`: decoders may have other groups."""
        if self.decoder_group_size is None:
            return self
        size = self.decoder_group_size if is_decoder(loc) else self.group_size
        return replace(self, group_size=size, decoder_group_size=None)

    def assignment(self) -> dict[str, Any]:
        """Return the attributes of ``assign_slots`` that the settings determine."""
        attrs = {n: v for n, v in self.settings().items() if n in ASSIGNMENT}
        if self.group_size:
            attrs["groups"] = 1
        elif self.groups:
            attrs["group_size"] = 0
        if self.dropless:
            attrs |= {"slots": "ragged", "capacity_factor": 0.0}
        elif self.capacity_factor is not None:
            attrs["slots"] = "capacity"
        return attrs


def recorded(graph: Graph, mode: str) -> ModeConfig:
    """Return the settings of `mode` recorded in `graph`; empty if there are none."""
    modes = graph.attrs.get(ATTRIBUTE)
    record = modes.get(mode) if isinstance(modes, Mapping) else None
    names = {f.name for f in fields(ModeConfig)}
    entries = record.items() if isinstance(record, Mapping) else ()
    return ModeConfig(**{name: value for name, value in entries if name in names})


# Undo an earlier specialisation, so that a graph may change its mode.

ORIGIN = "specialize/"
"""The prefix of the origins of added nodes."""


def is_added(value: Value) -> bool:
    """Return whether a specialisation made `value`."""
    return value.node is not None and value.node.origin.startswith(ORIGIN)


def undo(graph: Graph, covers: Callable[[str], bool]) -> None:
    """Remove all additions of specialisations, including a key that becomes unused.

    Args:
      graph: the graph.
      covers: returns whether a location is affected.
    """
    for layer in routed_layers(graph):
        operands = {w: v for w, v in layer.given().items() if not is_added(v)}
        if covers(layer.assigner.loc) and operands != layer.given():
            reassign_slots(layer.assigner, operands, {})
    for node in (*graph, graph.terminator):
        for index, value in enumerate(() if node.origin.startswith(ORIGIN) else node.operands):
            if is_added(value) and value.node is not None and covers(value.node.loc):
                before = original(value)
                # An output may be an added mask or number, which has no original.
                if before is not value and before.type == value.type:
                    node.set_operand(index, before)
    graph.erase_dead(ORIGIN)
    keys = [n for n, v in graph.inputs.items() if v.type.dtype.kind == "key" and not v.users]
    for name in keys:
        graph.erase_input(name)


def original(value: Value) -> Value:
    """Return the value that specialisations changed to `value`."""
    while is_added(value) and (match := fits(CHANGED, value.node)):
        value = match.value("x")
    return value


_x = P.any("x")

CHANGED = (
    # Jitter, noise, and the end of rescaled gates.
    P.mul(_x, P.random_uniform(P.any(), P.any()))
    | P.add(_x, P.random_normal(P.any(), P.any()))
    | P.mul(_x, P.div(P.any(), P.any()))
    | P.mask(_x, P.any())
    # Dropout.
    | P.select(P.any(), P.constant(), _x)
    | P.scale(_x)
)
"""How a specialisation changes a value, one step each; see `moecc.ir.moe`."""


def reassign_slots(old: Node, operands: dict[str, Value], attrs: dict[str, object]) -> Node:
    """Replace the assigning node `old` by one with other operands and attributes."""
    graph = old.graph
    allowed = old.op.attrs["using"].choices
    more = {w: v for w, v in operands.items() if w in allowed}
    assigner = graph.append(
        old.op,
        [old.operands[0], *more.values()],
        {**old.attrs, **attrs, "using": tuple(more)},
        names=[v.name for v in old.results],
        loc=old.loc,
        origin=old.origin,
        before=old,
    )
    for before, after in zip(old.results, assigner.results, strict=True):
        name = before.name
        replace_value(before, after)
        graph.rename(before, graph.fresh(f"{name}.old"))
        graph.rename(after, name)
    old.erase()
    return assigner


NextKey = Callable[[], Value]
"""Returns an unused key."""

FOLDED = P.fold_key(P.any(), by=P.attr("by"))


class RandomKeys:
    """Keys for the random numbers of a graph, all derived from one input."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # Layers specialised before that are not changed now use up their numbers already.
        used = (match.attr("by") for n in graph if (match := fits(FOLDED, n)))
        self.first = self.next = 1 + max(used, default=-1)

    def __call__(self) -> Value:
        """Return the next key, created at the top of the graph."""
        graph = self.graph
        keys = (v for v in graph.inputs.values() if v.type.dtype == KEY and not v.type.axes)
        key = next(keys, None) or graph.input(graph.fresh("key"), TensorType(KEY))
        # At the top, and without a location: layers of one structure stay equal.
        builder = Builder(graph, origin=f"{ORIGIN}key", before=next(iter(graph), None))
        self.next += 1
        return builder.fold_key(key, by=self.next - 1)

    @property
    def count(self) -> int:
        """How many keys were made."""
        return self.next - self.first


def specialise(layer: RoutedLayer, settings: ModeConfig, next_key: NextKey) -> None:
    """Set capacity, policy and noise of a mode on `layer`, without earlier additions."""
    product, scorer = layer.router, layer.scorer
    if scorer is not None and product is not None:
        x, builder = product.operands[0], _builder(product, "perturb")
        if settings.input_dropout:
            x = emit_dropout(builder, x, next_key(), settings.input_dropout)
        if settings.jitter:
            x = emit_jitter(builder, x, next_key(), settings.jitter)
        product.set_operand(0, x)
    if scorer is not None and settings.router_noise:
        builder = _builder(scorer, "noise")
        noisy = emit_noise(builder, scorer.operands[0], next_key(), settings.router_noise)
        scorer.set_operand(0, noisy)
    operands = _operands(layer, settings, next_key)
    attrs = {n: v for n, v in settings.assignment().items() if n in layer.assigner.op.attrs}
    if layer.experts_choose:
        # Experts always choose a bounded number of tokens.
        attrs = {n: v for n, v in attrs.items() if n not in ("slots", "convention")}
        attrs["capacity_factor"] = attrs.get("capacity_factor") or layer.assignment.capacity_factor
    assigner = reassign_slots(layer.assigner, operands, attrs)
    if settings.after_drop == "rescale":
        builder = _builder(layer.combine, "rescale")
        rescaled = emit_rescaled(builder, layer.gates, assigner.results[-1])
        layer.combine.set_operand(3, rescaled)
    if settings.expert_dropout:
        # Last, because slots must have numbers before dropout can be drawn for them.
        last = layer.last_matrix
        assert last is not None, "checked before anything was changed"
        builder = _builder(last, "dropout")
        dropped = emit_dropout(builder, last.operands[0], next_key(), settings.expert_dropout)
        last.set_operand(0, dropped)


def _operands(layer: RoutedLayer, settings: ModeConfig, next_key: NextKey) -> dict[str, Value]:
    """Return the operands of the slot assignment besides the experts, by word."""
    operands, route, assigner = layer.given(), layer.route, layer.assigner
    policy = settings.settings().get("policy", "all")
    if policy != "all" and layer.top_k > 1 and route is not None:
        # The policy decides by gates that add up to one.
        builder = _builder(assigner, "policy")
        gates, attrs = original(layer.gates), RouteOp.of_node(route)
        if not convention(attrs.gates).renormalised:
            gates = builder.div(gates, builder.sum(gates, axes=layer.choice))
        elif attrs.scale != 1:
            gates = builder.scale(gates, by=1 / attrs.scale)
        numbers = [builder.random_uniform(next_key(), gates)] if policy == "random" else []
        bound = 0.2 if settings.threshold is None else settings.threshold
        operands["keep"] = builder.keep_choices(
            gates, *numbers, policy=policy, threshold=bound, choice=layer.choice
        )
    if settings.priority and route is not None:
        operands["priority"] = emit_priority(_builder(assigner, "priority"), route.operands[0])
    if settings.padding_mask:
        type, tokens = layer.slots.type, layer.tokens
        operands["mask"] = padding_mask(assigner.graph, type, tokens, assigner.loc)
    elif settings.padding_mask is not None:
        operands.pop("mask", None)
    return operands


def _builder(before: Node, why: str) -> Builder:
    return Builder(before.graph, loc=before.loc, origin=f"{ORIGIN}{why}", before=before)


# Dropout outside experts: on the outputs of sublayers, and on hidden values of dense blocks.

SUM = P.add(P.any(), P.any())

Operand = tuple[Node, int]
"""A node, and the position of one of its operands."""


def drop(
    graph: Graph, rate: float, next_key: Callable[[], Value], covers: Callable[[str], bool]
) -> int:
    """Add dropout to every sublayer and every dense hidden value; return to how many.

    A sublayer is norm, layer, dropout, and the sum with the residual stream (ST-MoE, eq. 4).

    Args:
      graph: the graph.
      rate: the dropout rate.
      next_key: returns an unused key.
      covers: returns whether a location is affected.
    """
    operands = [*sublayers(graph), *((b.down, 0) for b in find_ffn_blocks(graph).blocks)]
    covered = [(node, index) for node, index in operands if covers(node.loc)]
    for node, index in covered:
        value = node.operands[index]
        node.set_operand(index, emit_dropout(_builder(node, "dropout"), value, next_key(), rate))
    return len(covered)


def sublayers(graph: Graph) -> list[Operand]:
    """Return the operands of residual sums that are computed from the stream.

    A backward search ends at the previous sums, so all searches together are linear.
    """
    sums: dict[Value, Operand] = {}
    for node in graph:
        if not fits(SUM, node) or not node.result.type.dtype.is_float:
            continue
        a, b = node.operands
        if a.type != b.type:
            continue
        for stream, branch, index in ((a, b, 1), (b, a, 0)):
            if _depends_on(stream, branch, sums):
                sums[node.result] = (node, index)
                break
    return list(sums.values())


def _depends_on(stream: Value, branch: Value, sums: dict[Value, Operand]) -> bool:
    """Return whether `branch` is computed from `stream`, through at least one product."""
    seen, left = {branch}, [branch]
    reaches = multiplies = False
    while left:
        node = left.pop().node
        multiplies |= fits(PRODUCT, node) is not None
        for value in node.operands if node is not None else ():
            reaches |= value is stream
            if value is not stream and value not in seen and value not in sums:
                seen.add(value)
                left.append(value)
    return reaches and multiplies


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
    item: ModeConfig, layer: RoutedLayer, settings: ModeConfig, is_causal: bool
) -> Iterator[Problem]:
    """Yield why the settings are not valid for `layer`.

    Args:
      item: the options.
      layer: a routed layer.
      settings: the options, completed by the graph's mode.
      is_causal: whether the layer is after a causal mask.
    """
    chooses = layer.experts_choose
    if (settings.priority or chooses) and is_causal and not item.force:
        routing = "expert choice" if chooses else "batch-prioritised routing"
        option = "; layers=encoder.*" if is_decoder(layer.assigner.loc) else ""
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
    layers: list[RoutedLayer], settings: ModeConfig, is_causal: dict[str, bool], mode: str
) -> Iterator[Remark]:
    """Yield remarks on the layers as they are now."""
    bounded = [y for y in layers if y.assignment.slots == "capacity"]
    leaks = [
        y
        for y in bounded
        if is_causal[y.name] and y.top_k > 1 and y.assigner.attrs.get("order") == "choice"
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

    # What is dropped depends on the routing; `apply` is more precise.
    preserves = Preserves("approximate", "capacity, policy and noise decide what experts see")

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
        is_causal = {y.name: y.dispatch.operands[0] in causal for y in layers}
        problems = [p for y in layers for p in misfits(self, y, settings, is_causal[y.name])]
        raise_problems(problems)
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
        for remark in remarks(changed, settings, is_causal, self.mode):
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
    decoder_group_size: DecoderGroupSize = None

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
