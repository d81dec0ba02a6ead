"""The graphs of training and evaluation that a recipe makes of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from moecc.analysis import document_mixtures, hides_later
from moecc.errors import InputError, raise_problems
from moecc.ir.conventions import LOGITS, convention
from moecc.ir.graph import Graph, Node
from moecc.ir.ops.routing import RouteOp
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.structure import clone
from moecc.model.initialise import set_router_dtype
from moecc.plan.search import batch_problems
from moecc.plan.workload import Batch, length_variables
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.layout import Layout
from moecc.sharding.vias import GSPMD, LOCAL
from moecc.support.untyped import Json, JsonDict
from moecc.train.recipe import Objective, Recipe
from moecc.train.settings import StepSpec, bias_counts, recorded_losses
from moecc.types import float_type


@dataclass(frozen=True)
class Bound:
    """The bound on an expert's rows: a factor, and what it multiplies (see ``assign_slots``)."""

    factor: float
    convention: str = ""


@dataclass(frozen=True)
class MeshPasses:
    """The layout of a graph on a mesh, with collectives of its own.

    Attributes:
      mesh: the mesh, as text.
      rules: layouts by name or file.
      via: how tokens reach experts, of `moecc.sharding.vias`.
      sliced: whether devices along ``model`` each send a part of a row.
      chunks: in how many parts rows are exchanged.
    """

    mesh: str
    rules: tuple[str, ...]
    via: str = LOCAL
    sliced: bool = False
    chunks: int = 1


@dataclass(frozen=True)
class StepPasses:
    """The passes that make the graph of a step.

    Attributes:
      mode: ``train`` or ``eval``.
      documents: of a row, ``several`` or ``one``, kept apart by segments; None without segments.
      tied: whether logits are made by the embedding, of an encoder without a head.
      routed: whether the model has experts; without, nothing is specialised.
      bound: the bound on an expert's rows; None for what the graph says.
      groups: token groups of a micro-batch; None for what the graph says.
      balanced: whether tokens take experts in turn, to time a step.
      weighted: whether rows are weighted at their experts, see `weights_rows`.
      noise: options of ``specialize`` by which training is perturbed.
      losses: options of ``add-losses``; None where none are added.
      mesh: where it is laid on a mesh of its own collectives.
      rolled: whether equal layers are a scan.
      remat: what the backward pass computes again, one of `moecc.plan.step.REMATS`.
      split: the mesh axis along which what goes from layer to layer is kept in parts.
    """

    mode: str = "train"
    documents: str | None = None
    tied: bool = False
    routed: bool = True
    bound: Bound | None = None
    groups: int | None = None
    noise: dict[str, float] = field(default_factory=dict)
    losses: JsonDict | None = field(default_factory=dict)
    balanced: bool = False
    weighted: bool = False
    mesh: MeshPasses | None = None
    rolled: bool = True
    remat: str = "none"
    split: str | None = None

    def __str__(self) -> str:
        return ",".join(self._passes())

    def _passes(self) -> Iterator[str]:
        if self.documents is not None:
            yield _pass("pack-segments", {"documents": self.documents})
        if self.tied:
            yield "tie-head{only=true}"
        if self.routed:
            yield specialize(self.mode, self.bound, self.groups, self.noise)
        if self.losses is not None:
            yield _pass("add-losses", self.losses)
        if self.balanced:
            yield "force-balance"
        yield "fuse-attention"
        if self.weighted and self.routed:
            yield "weight-rows"
        yield "cse"
        if self.mesh is not None:
            yield from _on_mesh(self.mesh)
            yield "cse"
        if self.rolled:
            options: JsonDict = {"remat": self.remat}
            if self.split is not None:
                options["split"] = self.split
            yield _pass("roll-layers", options)


def weights_rows(remat: str, on_mesh: bool) -> bool:
    """Return whether rows are weighted at their experts in a step of training.

    It spares what is made again and sent again.  Where nothing is, on a CPU it costs more than it
    spares: 12 % of the time of a dropless layer of 8 × 1,024 neurons.
    """
    return remat != "none" or on_mesh


def specialize(
    mode: str, bound: Bound | None, groups: int | None, noise: Mapping[str, float] | None = None
) -> str:
    """Return the pass that specialises a graph for `mode`."""
    options: JsonDict = {"mode": mode}
    if bound is not None:
        options["capacity-factor"] = bound.factor
        if bound.convention:
            options["convention"] = bound.convention
    if groups is not None:
        options["groups"] = groups
    options |= noise or {}
    return _pass("specialize", options)


def _on_mesh(mesh: MeshPasses) -> Iterator[str]:
    yield f"annotate-sharding{{mesh={mesh.mesh} rules={','.join(mesh.rules)}}}"
    if mesh.via != LOCAL:
        options = " slice=model" if mesh.sliced else ""
        options += f" chunks={mesh.chunks}" if mesh.chunks > 1 else ""
        yield f"expert-parallel{{via={mesh.via}{options}}}"
    yield "lower-collectives"


def _pass(name: str, options: JsonDict) -> str:
    if not options:
        return name
    values = (str(v).lower() if isinstance(v, bool) else str(v) for v in options.values())
    return f"{name}{{{' '.join(map('='.join, zip(options, values, strict=True)))}}}"


def run_passes(graph: Graph, passes: str) -> None:
    """Run the pipeline text `passes` over `graph`, where passes may match nothing."""
    pipeline = Pipeline.parse(passes, installed())
    run_pipeline(graph, pipeline, context=Context(allow_unmatched=True))


def step_graph(graph: Graph, passes: StepPasses) -> Graph:
    """Return the graph of a step of `graph`, which stays as it is.

    Raises:
      InputError: the mesh or the groups do not suit the graph.
    """
    copy = clone(graph)
    run_passes(copy, str(passes))
    return copy


def planning_graph(graph: Graph, passes: StepPasses) -> Graph:
    """Return the graph of a step as a plan takes it: without losses, on no mesh, unrolled."""
    return step_graph(graph, replace(passes, losses=None, mesh=None, rolled=False))


# What a recipe makes of a model: the graphs of training and evaluation, and the step's spec.


def train_graph(graph: Graph, recipe: Recipe) -> Graph:
    """Return the graph of a micro-batch in training, of the model's `graph`, which stays as it is.

    Raises:
      InputError: the recipe does not suit the graph.
    """
    check_objective(graph, recipe.data.objective)
    step = _step_graph(graph, recipe, train_passes(graph, recipe))
    if recipe.routing.bias_rate and not bias_counts(step):
        raise InputError(
            "no layer has a balance bias that could be updated",
            where="routing.bias_rate",
            expected="routers that choose by scores with a bias",
            found=str(recipe.routing.bias_rate),
            hint="upcycle{balance-bias=true} in model.pipeline adds them",
        )
    return step


def eval_graph(graph: Graph, recipe: Recipe) -> Graph:
    """Return the graph of a micro-batch in evaluation, of the model's `graph`.

    Raises:
      InputError: the recipe does not suit the graph.
    """
    return _step_graph(graph, recipe, eval_passes(graph, recipe))


def teacher_graph(graph: Graph, recipe: Recipe, student: Graph) -> Graph:
    """Return the graph of a source that a model is distilled from, in evaluation.

    Args:
      graph: the source's.
      recipe: the recipe.
      student: the graph of a step of the model.

    Raises:
      InputError: its logits are not of the model's tokens.
    """
    if (layout := _layout(student, recipe)) is not None:
        # The same devices have the same sequences, also those that hold experts.
        recipe = replace(recipe, mesh=replace(recipe.mesh, rules=layout.names, via=""))
    passes = replace(eval_passes(graph, recipe), losses=None)
    teacher = _step_graph(graph, recipe, passes)
    of_teacher, of_student = (g.outputs[LOGITS].type if LOGITS in g.outputs else None
                       for g in (teacher, student))  # fmt: skip
    if of_teacher != of_student:
        raise InputError(
            "the source has no logits like those of the model",
            where="loss.distill",
            expected=str(of_student),
            found=str(of_teacher or "hidden states"),
        )
    return teacher


def check_objective(graph: Graph, objective: Objective) -> None:
    """Raise InputError if `graph` predicts no targets of the objective.

    An encoder alone sees the next token, and a decoder alone nothing behind a mask.
    """
    is_encoder = "hidden" in graph.output_names and LOGITS not in graph.output_names
    if is_encoder and objective is not Objective.MASKED:
        raise InputError(
            f"an encoder alone has no objective {objective.value}: it predicts no next token",
            where="data.objective",
            expected=Objective.MASKED.value,
            found=objective.value,
            hint='an encoder is trained and evaluated by the objective "masked", on documents',
        )
    is_causal = any(hides_later(node) for node in graph.every_node())
    if is_causal and "decoder_tokens" not in graph.inputs and objective is Objective.MASKED:
        raise InputError(
            "a decoder alone has no objective masked: no token of it sees what follows a mask",
            where="data.objective",
            expected=Objective.CAUSAL.value,
            found=objective.value,
        )


def _step_graph(graph: Graph, recipe: Recipe, passes: StepPasses) -> Graph:
    """Return the graph of a step, with routers in the type of the recipe."""
    step, asked = step_graph(graph, passes), float_type(recipe.routing.router_dtype)
    set_router_dtype(step, asked.name, float_type(recipe.run.dtype), where="routing.router_dtype")
    _check_batch(graph, recipe)
    return step


def _check_batch(graph: Graph, recipe: Recipe) -> None:
    """Raise InputError if an array of the batch would have no equal parts on the mesh."""
    layout = _layout(graph, recipe)
    if layout is None or recipe.mesh.partition == GSPMD:
        return
    sizes = batch_sizes(graph, recipe)
    lengths = tuple((name, sizes[name]) for name in length_variables(graph))
    raise_problems(batch_problems(layout, Batch(recipe.data.batch, lengths)))


def train_passes(graph: Graph, recipe: Recipe) -> StepPasses:
    """Return the passes of training."""
    options = recorded_losses(graph) or {}
    options |= {"replace": True, "metrics": True, "parts": recipe.run.micro_batches}
    # The step computes it with the cross entropy, where logits are in memory a chunk at a time.
    options.pop("output-z-coef", None)
    if recipe.routing.balance is not None:
        options["balance-coef"] = recipe.routing.balance
    if recipe.routing.z_loss is not None:
        options["z-coef"] = recipe.routing.z_loss
    if recipe.run.attention_z:
        options["attention-z-coef"] = recipe.run.attention_z
    return _passes(graph, recipe, "train", recipe.routing.capacity_factor, options)


def eval_passes(graph: Graph, recipe: Recipe) -> StepPasses:
    """Return the passes of evaluation: metrics without losses, and the capacity of evaluation."""
    told = {"replace": True, "parts": recipe.run.micro_batches, "balance-coef": 0.0, "z-coef": 0.0}
    return _passes(graph, recipe, "eval", recipe.routing.eval_capacity_factor, told)


def step_spec(graph: Graph, recipe: Recipe, platform: str = "cpu") -> StepSpec:
    """Return what decides the step of `recipe` besides its graph.

    Args:
      graph: the model's.
      recipe: the recipe.
      platform: what it is lowered for.
    """
    coefficient = (recorded_losses(graph) or {}).get("output-z-coef", 0.0)
    return StepSpec(
        batch_sizes(graph, recipe),
        recipe.step_config,
        recipe.optimizer,
        recipe.run.guard,
        recipe.routing.bias_rate,
        (recipe.run.output_z or float(coefficient)),
        bool(recipe.loss.distill),
        platform=platform,
        layout=_layout(graph, recipe) if recipe.mesh.partition == GSPMD else None,
    )


def batch_sizes(graph: Graph, recipe: Recipe) -> dict[str, int]:
    """Return what the variables of the inputs of `graph` stand for in a batch of `recipe`.

    Raises:
      InputError: the graph has more lengths than a recipe says.
    """
    lengths = length_variables(graph)
    sequence_lengths = (recipe.data.seq, recipe.data.decoder_seq or recipe.data.seq)
    if len(lengths) > len(sequence_lengths):
        raise InputError("a recipe has two lengths at most", found=", ".join(lengths))
    sizes = dict(zip(lengths, sequence_lengths, strict=False))
    for value in graph.inputs.values():
        if "batch" in value.type and isinstance(name := value.type["batch"].size, str):
            sizes[name] = recipe.data.batch
    return sizes


def _passes(graph: Graph, recipe: Recipe, mode: str, factor: float, losses: Json) -> StepPasses:
    data = recipe.data
    if data.packing:
        raise_problems(document_mixtures(graph, max(data.seq, data.decoder_seq)))
    routed = any(node.op.assigns_slots for node in graph.every_node())
    bound = Bound(factor) if factor and routed else None
    groups = _groups(graph, recipe, mode) if routed else None
    run = recipe.run
    mesh = _mesh(graph, recipe, specialize(mode, bound, groups))
    return StepPasses(
        mode,
        documents="several" if recipe.data.packing else "one",
        tied=recipe.data.objective is Objective.MASKED and "logits" not in graph.output_names,
        routed=routed,
        bound=bound,
        groups=groups,
        noise=_noise(graph, recipe, routed=routed) if mode == "train" else {},
        losses=dict(losses) if routed or losses.get("attention-z-coef") else None,
        balanced=routed and recipe.routing.force_balance and mode == "train",
        weighted=mode == "train" and weights_rows(run.remat, bool(recipe.mesh.mesh)),
        mesh=mesh,
        rolled=run.rolled,
        remat=run.remat if mode == "train" else "none",
    )


def _noise(graph: Graph, recipe: Recipe, *, routed: bool) -> dict[str, float]:
    """Return the options by which training is perturbed.

    Raises:
      InputError: there are some, and the model has no experts, or its experts no slots to drop.
    """
    names = ("jitter", "dropout", "expert_dropout")
    options = {n: float(value) for n in names if (value := getattr(recipe.routing, n))}
    if options and not routed:
        raise InputError(
            "a model without experts is trained as it is",
            where=", ".join(f"routing.{n}" for n in options),
            expected="0",
            found=", ".join(map(str, options.values())),
            hint="upcycle in model.pipeline makes experts",
        )
    assigners = (node for node in graph.every_node() if node.op.assigns_slots)
    is_bounded = recipe.routing.capacity_factor or all(
        node.op.chooses or SlotsOp.of_node(node).slots == "capacity" for node in assigners
    )
    if "expert_dropout" in options and not is_bounded:
        raise InputError(
            "dropout in experts needs slots that can be numbered",
            where="routing.expert_dropout",
            expected="a capacity",
            found="dropless rows",
            hint="routing.capacity_factor = 1.25, for example",
        )
    return {n.replace("_", "-"): value for n, value in options.items()}


def _groups(graph: Graph, recipe: Recipe, mode: str) -> int | None:
    """Return the token groups of a micro-batch; None where the graph says their size.

    Raises:
      InputError: micro-batches would cut them.
    """
    parts = recipe.run.micro_batches
    if not recipe.routing.groups and _records_group_size(graph, mode):
        return None
    groups = recipe.routing.groups or recipe.data.batch
    if groups % parts or recipe.data.batch % parts:
        raise InputError(
            "micro-batches hold whole token groups and sequences",
            where="run.micro_batches",
            expected=f"a divisor of {recipe.data.batch} sequences and {groups} groups",
            found=str(parts),
        )
    return groups // parts


def _records_group_size(graph: Graph, mode: str) -> bool:
    modes = graph.attrs.get("routing")
    routing = modes.get(mode) if isinstance(modes, Mapping) else None
    return isinstance(routing, Mapping) and bool(routing.get("group_size"))


def _mesh(graph: Graph, recipe: Recipe, specialised: str) -> MeshPasses | None:
    section = recipe.mesh
    layout = _layout(graph, recipe)
    if layout is None or section.partition == GSPMD:
        return None
    _check_used(layout)
    via = section.via or _via(graph, layout, specialised)
    return MeshPasses(str(layout.mesh), layout.names, via)


def _check_used(layout: Layout) -> None:
    """Raise InputError if no rule shards anything over the mesh."""
    if layout.names:
        return
    axis = max(layout.sizes, key=lambda name: layout.sizes[name])
    raise InputError(
        f"nothing is sharded over the mesh axis {axis!r}",
        where="mesh.mesh",
        expected="an axis that shards the batch or weights: data, fsdp, model",
        found=str(layout.mesh),
        hint=f"data={layout.mesh.devices} shards the batch",
    )


def _layout(graph: Graph, recipe: Recipe) -> Layout | None:
    mesh = recipe.step_config.device_mesh
    if mesh is None:
        return None
    counts = {SlotsOp.of_node(node).experts for node in graph.every_node() if node.op.assigns_slots}
    return Layout(mesh, min(counts, default=0), stated=recipe.mesh.rules)


def _via(graph: Graph, layout: Layout, specialised: str) -> str:
    """Return how tokens reach experts where the recipe leaves it open: as the slots allow."""
    if layout.shards["expert"] == 1:
        return LOCAL
    if not set(layout.expert_axes) <= set(layout.batch_axes):
        return "replicated"
    copy = clone(graph)
    run_passes(copy, specialised)
    assigners = [node for node in copy.every_node() if node.op.assigns_slots]
    bounded = all(SlotsOp.of_node(node).slots == "capacity" for node in assigners)
    return "capacity" if bounded else "ring"


# What a reader of a run should know of its model before it begins.

SMALL_FACTOR = 0.01
"""A factor of a rate below this is a remark: it may have been meant as the rate itself."""


def training_remarks(graph: Graph, recipe: Recipe) -> Iterator[str]:
    """Yield remarks on training the model whose graph is `graph` by `recipe`."""
    for number, group in enumerate(recipe.optimizer.groups):
        if group.rate_factor < SMALL_FACTOR:
            factor, rate = group.rate_factor, recipe.optimizer.rate
            yield (
                f"optimizer.groups.{number}.rate_factor = {factor:g} times optimizer.rate is at "
                f"most {factor * rate:.3g} for {group.match}; a rate of {factor:g} is "
                f"rate_factor = {factor / rate:.3g}"
            )
    if recipe.run.dtype == "f16":
        yield (
            "run.dtype = f16: gradients below 6e-8 become 0, as losses are not scaled; bf16 has "
            "the range of f32"
        )
    routing = recipe.routing
    if not any(node.op.assigns_slots for node in graph.every_node()):
        unread = [f.name for f in fields(routing) if getattr(routing, f.name) != f.default]
        if unread:
            names = ", ".join(f"routing.{name}" for name in unread)
            yield f"a model without experts is trained as if {names} had the default"
    fixed = [node.loc for node in graph.every_node() if node.op.routes and _is_constant(node)]
    if fixed:
        more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        yield (
            f"{', '.join(fixed[:3])}{more}: the gates of a token are the same whatever the router "
            "says, so that only the router's own losses train it; top-k=2, or gates=switch for one "
            "expert a token, trains it by the model's loss"
        )


def _is_constant(node: Node) -> bool:
    """Whether the gates of a ``route`` do not depend on the logits of what is chosen."""
    attrs = RouteOp.of_node(node)
    how = convention(attrs.gates)
    if attrs.top_k == 1:
        return not how.learns_at_top_1
    return how.constant_sum and not how.renormalised
