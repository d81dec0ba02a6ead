"""The settings of a training step beside its graph: rates, phases, moments, micro-batches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import ceil, cos, pi, prod, sqrt
from typing import Any

from moecc.analysis import CHUNK_BYTES, GROUPS, parameter_groups, trainable
from moecc.errors import InputError, Problem, nearest, raise_problems
from moecc.formats.modelcard import CardEntries
from moecc.formats.source import COLUMN, FIRST, ROW, SECOND
from moecc.ir.conventions import METRIC
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.ops.contraction import ProductOp
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.routing_losses import BALANCE_BIASES, TOTALS, Total
from moecc.ir.traits import Role
from moecc.model.initialise import updated_bias
from moecc.plan.step import StepConfig
from moecc.sharding.layout import Layout
from moecc.support.ranges import element, lengths
from moecc.support.untyped import Json, JsonDict
from moecc.train.recipe import GuardSection, OptimizerSection, ParameterGroup, Schedule
from moecc.train.state import CarriedMoments
from moecc.types import TensorType
from moecc.weights.expr import Expr


def rate_at(section: OptimizerSection, step: int, steps: int) -> float:
    """Return the learning rate of the step with number `step`, from 0.

    After a linear warm-up the rate is constant; or falls as a cosine (Loshchilov and Hutter 2017)
    to `end_factor`; or is constant until the last `decay_steps`, in which it falls linearly (WSD,
    Hu et al. 2024), so that a longer run has the same beginning; or falls with the inverse square
    root of the step (Shazeer and Stern 2018; T5).

    Args:
      section: the highest rate, the schedule and its numbers.
      step: the number of the step.
      steps: the steps of the run.
    """
    done = step + 1
    if done <= section.warmup:
        return section.rate * done / section.warmup
    return section.rate * _factor(section, step, steps)


def _factor(section: OptimizerSection, step: int, steps: int) -> float:
    end = section.end_factor
    if section.schedule is Schedule.COSINE:
        share = _share(step, section.warmup, steps)
        return end + (1 - end) * (1 + cos(pi * share)) / 2
    if section.schedule is Schedule.WSD:
        return 1 - (1 - end) * _share(step, steps - section.decay_steps, steps)
    if section.schedule is Schedule.RSQRT:
        return sqrt(max(section.warmup, 1) / (step + 1))
    return 1.0


def _share(step: int, start: int, stop: int) -> float:
    """Return how much of the way from `start` to the last step before `stop` is done."""
    return min(max((step - start + 1) / max(stop - start, 1), 0.0), 1.0)


# What decides a training step beside its graph: rates, phases, moments, micro-batches.

_REPEATED = ("layer", "expert")
"""The axes along which a parameter is one of many: layers that are rolled, and experts."""


@dataclass(frozen=True)
class ParamSettings:
    """The settings under which one parameter is trained.

    Attributes:
      trained: whether it is; else it has no gradient and no moments.
      rate_factor: the rate of the parameter over that of the schedule.
      decay: the weight decay.
      blocks: the dimensions along which each slice is a parameter by itself: layers, experts.
      over: the other dimensions that products sum over; empty for what is no matrix.
      is_table: whether it is a table of tokens, or makes logits.
      first_step: how many steps are done before it is trained.
    """

    trained: bool
    rate_factor: float
    decay: float
    blocks: tuple[int, ...]
    over: tuple[int, ...]
    is_table: bool
    first_step: int

    @property
    def is_matrix(self) -> bool:
        """Whether products read it."""
        return bool(self.over)


def parameter_settings(graph: Graph, section: OptimizerSection) -> dict[str, ParamSettings]:
    """Return how each parameter of `graph` is trained.

    The first group that matches a parameter holds.  Without one, matrices decay as the optimiser
    says, and nothing else does: by what reads a parameter, never by the number of its axes, which
    rolled norms and vectors of experts have two of.

    Raises:
      InputError: a group matches nothing, all is frozen, or parts of a rolled parameter differ.
    """
    free, kinds = trainable(graph), parameter_groups(graph)
    matched: set[int] = set()
    settings_of, problems = {}, []
    for name, value in graph.params.items():
        if not value.users or not value.type.dtype.is_float:
            continue
        count = next(iter(lengths(name)), 0)
        members = [element(name, at) for at in range(count)] if count else [name]
        numbers = [_first_match(section.groups, member, kinds[name]) for member in members]
        matched.update(numbers)
        if odd := [m for m, n in zip(members, numbers, strict=True) if n != numbers[0]]:
            fault = Problem(
                "equal layers that are rolled belong to different groups",
                name,
                f"the group of {members[0]}",
                f"{odd[0]} is in another",
                "run.rolled = false keeps layers apart",
            )
            problems.append(fault)
        group = (*section.groups, ParameterGroup("*"))[numbers[0]]
        settings_of[name] = _settings(value, free[name], group, section)
    for number, group in enumerate(section.groups):
        hidden = any(group.match == earlier.match for earlier in section.groups[:number])
        if number not in matched and not hidden:
            is_known = group.match in GROUPS
            fault = Problem(
                "a group of parameters matches none",
                f"optimizer.groups[{number}].match",
                f"a glob over names, or one of {', '.join(GROUPS)}",
                group.match,
                "the model has none of them" if is_known else nearest(group.match, GROUPS),
            )
            problems.append(fault)
    if settings_of and not any(settings.trained for settings in settings_of.values()):
        hint = "moecc evaluate measures a model as it is"
        problems.append(Problem("no parameter is trained", "optimizer.groups", hint=hint))
    raise_problems(problems)
    return settings_of


def _first_match(groups: Sequence[ParameterGroup], name: str, kinds: frozenset[str]) -> int:
    """Return the number of the first group that a parameter is in; -1 for none."""
    fits = (
        number
        for number, group in enumerate(groups)
        if group.match in kinds or fnmatchcase(name, group.match)
    )
    return next(fits, -1)


def _settings(
    value: Value, free: bool, group: ParameterGroup, section: OptimizerSection
) -> ParamSettings:
    names = value.type.names
    over = tuple(
        n for n in names if any(n in ProductOp.of_node(node).over for node in _products(value))
    )
    blocks = tuple(n for n in _REPEATED if n in names and n not in over)
    if set(names) == {*over, *blocks}:
        # The rows of a router are those of one matrix.
        blocks = tuple(n for n in blocks if n != "expert")
    is_matrix = bool(over) and len(names) > len(over) + len(blocks)
    return ParamSettings(
        free and not group.freeze,
        group.rate_factor,
        section.decay * is_matrix if group.decay is None else group.decay,
        tuple(names.index(n) for n in blocks),
        tuple(names.index(n) for n in over) if is_matrix else (),
        "vocab" in names,
        group.from_step,
    )


def _products(param: Value) -> Iterator[Node]:
    """Yield the nodes that read `param` as a matrix, through what passes it on and into scans."""
    left, seen = [param], {param}
    while left:
        value = left.pop()
        for node in value.users:
            passed_on: list[Value] = []
            if node.body is not None:
                inner = zip(node.operands, node.body.inputs.values(), strict=True)
                passed_on = [i for v, i in inner if v is value]
            elif node.op.carries or node.op.collective is not None:
                passed_on = list(node.results)
            elif node.op.role(node.operands.index(value)) is Role.MATRIX:
                yield node
            left += [v for v in passed_on if v not in seen]
            seen.update(passed_on)


# Phases of a run: from one step on, groups of parameters are trained that were not before.
#
# Routers alone can so be trained first, while what they choose from stays as it was.


@dataclass(frozen=True)
class Phase:
    """Steps in which the same parameters are trained.

    Attributes:
      first_step: how many steps were done before.
      section: the optimiser's part of the recipe, where groups that begin later are frozen.
    """

    first_step: int
    section: OptimizerSection


def phases_of(section: OptimizerSection) -> tuple[Phase, ...]:
    """Return the phases of a run, in order; the first begins with step 0."""
    firsts = sorted({0, *(group.from_step for group in section.groups if not group.freeze)})
    return tuple(Phase(first, _at(section, first)) for first in firsts)


def phase_at(phases: Sequence[Phase], steps: int) -> int:
    """Return which of `phases` a run is in after so many `steps`: what its next step trains."""
    return bisect_right([phase.first_step for phase in phases], steps) - 1


def section_at(section: OptimizerSection, steps: int) -> OptimizerSection:
    """Return the optimiser's part of a recipe as the step after so many takes it."""
    phases = phases_of(section)
    return phases[phase_at(phases, steps)].section


def _at(section: OptimizerSection, first: int) -> OptimizerSection:
    groups = (replace(g, freeze=g.freeze or g.from_step > first) for g in section.groups)
    return replace(section, groups=tuple(groups))


# The moments that optimisers keep of a parameter: their names, and which of its axes they have.

COUNT = "count"
"""The number of updates, beside the moments."""


def count_of(first_step: int) -> str:
    """Return what the updates are counted as of parameters that are trained after so many steps."""
    return f"{COUNT}.{first_step}" if first_step else COUNT


FACTORED_FROM = 128
"""Adafactor factors the second moment of matrices with both sides as large, as optax does."""


def moment_kinds(optimizer: str, type: TensorType, settings: ParamSettings) -> tuple[str, ...]:
    """Return the kinds of moments that `optimizer` keeps of a parameter; none if it is frozen."""
    if not settings.trained:
        return ()
    if optimizer == "adafactor":
        return (SECOND,) if factored_axes(type, settings) is None else (ROW, COLUMN)
    if optimizer == "muon" and uses_muon(settings):
        return (FIRST,)
    return {"adamw": (FIRST, SECOND), "muon": (FIRST, SECOND)}.get(optimizer, ())


def uses_muon(settings: ParamSettings) -> bool:
    """Return whether Muon orthogonalises a parameter: matrices, but for tables and the head."""
    return settings.is_matrix and not settings.is_table


def factored_axes(type: TensorType, settings: ParamSettings) -> tuple[str, str] | None:
    """Return the axes that Adafactor's row and column means are taken over, or None.

    The largest axis of each block, and the next (Shazeer and Stern 2018, §4, as optax has it).
    """
    left = [d for d in range(type.rank) if d not in settings.blocks]
    sides = sorted(left, key=lambda d: type.shape[d])
    if len(sides) < 2 or type.shape[sides[-2]] < FACTORED_FROM:
        return None
    return type.names[sides[-1]], type.names[sides[-2]]


def moment_types(
    optimizer: str, params: Mapping[str, TensorType], settings: Mapping[str, ParamSettings]
) -> dict[str, dict[str, TensorType]]:
    """Return the types of all moments, by kind and parameter."""
    types: dict[str, dict[str, TensorType]] = {}
    for name, type in params.items():
        factored = factored_axes(type, settings[name]) or ("", "")
        # A factor of a second moment lacks the axis that its means are taken over.
        missing = dict(zip((ROW, COLUMN), factored, strict=True))
        for kind in moment_kinds(optimizer, type, settings[name]):
            axes = (type[n] for n in type.names if n != missing.get(kind))
            types.setdefault(kind, {})[name] = type.with_axes(axes)
    return types


# What decides a compiled step, besides its graph.


@dataclass(frozen=True)
class StepSpec:
    """The settings under which a graph is trained, or run.

    Attributes:
      sizes: what the variables of the graph stand for, for the whole batch.
      config: the settings of the step.
      optimizer: the update; None for the forward pass alone.
      guard: which steps are skipped; None for none.
      bias_rate: step of the loss-free balance bias.
      output_z: coefficient of the z-loss of the output's softmax.
      distill: whether a batch has the logits of a teacher, and the coefficient of the divergence.
      platform: what it is lowered for, ``tpu``, ``gpu`` or ``cpu``.
      layout: what XLA's partitioner shards the graph by; None where the graph is on a mesh, or
        runs on one device.
      chunk_bytes: logits of about so many bytes are in memory at once, on each device.
    """

    sizes: Mapping[str, int]
    config: StepConfig
    optimizer: OptimizerSection | None = None
    guard: GuardSection | None = field(default_factory=GuardSection)
    bias_rate: float = 0.0
    output_z: float = 0.0
    distill: bool = False
    platform: str = "cpu"
    layout: Layout | None = None
    chunk_bytes: int = CHUNK_BYTES


# Numbers of a whole batch that the losses of its micro-batches are divided by.


def totals_of(graph: Graph) -> dict[str, Total]:
    """Return the totals that the graph of a micro-batch takes, by the names of its inputs."""
    return {name: Total(**said) for name, said in (graph.attrs.get(TOTALS) or {}).items()}


def counted(total: Total, batch: Json, parts: int) -> Any:
    """Return a total of a batch; arrays are NumPy's or jax's.

    Args:
      total: what is counted.
      batch: the masks ``[batch, seq]`` by name, and all else that it holds.
      parts: the micro-batches that it is cut into.
    """
    mask = batch[total.mask]
    if total.unit == "token":
        return mask.sum()
    if total.unit == "sequence":
        return mask.reshape(mask.shape[0], -1).any(1).sum()
    groups = mask.size // total.group_size if total.group_size else total.groups * parts
    return mask.reshape(groups, -1).any(1).sum()


# The loss-free balance bias: found in a graph, and updated by what a batch chose.
#
# It is no parameter of the optimiser: it has no gradient, and is updated once a step, by the
# choices of the whole batch (Wang et al. 2024; DeepSeek-V3).


def bias_counts(graph: Graph) -> CardEntries:
    """Return the outputs that count choices, one for each layer, by the balance bias in `graph`."""
    counts: Mapping[str, str] = graph.attrs.get(BALANCE_BIASES) or {}
    outputs = {}
    for name in graph.params:
        layers = max(lengths(name), default=0)
        members = [element(name, at) for at in range(layers)] if layers else [name]
        if all(member in counts for member in members):
            outputs[name] = tuple(counts[member] for member in members)
    return outputs


def moved(bias: Any, counts: Any, rate: float) -> Any:
    """Return a bias after a step, with a mean of zero: a common part decides nothing.

    Args:
      bias: ``[expert]``, or ``[layer, expert]``.
      counts: how many choices of the batch name each expert, of the same shape.
      rate: the step, γ.
    """
    updated = updated_bias(bias, counts, rate)
    return updated - updated.mean(-1)[..., None]


# All moments of a model that was made of a trained one, by what a state saves them as.

SAVED = "moments.{}.{}"
"""The name of a saved moment, from its kind and its parameter."""


def saved_moments(graph: Graph, section: OptimizerSection) -> dict[str, dict[str, TensorType]]:
    """Return the types of the moments that training `graph` keeps, by kind and parameter."""
    settings = parameter_settings(graph, section)
    types = {n: graph.params[n].type for n in settings}
    return moment_types(section.name, types, settings)


def carried_moments(
    graph: Graph,
    section: OptimizerSection,
    before: Mapping[str, Mapping[str, TensorType]],
    count: int,
) -> dict[str, Expr]:
    """Return the moments of `graph` before its first step, over those of the model before.

    Args:
      graph: what a pipeline made of the model before, unrolled; its weights read the tensors of
        that model, by which its moments are saved, too.
      section: the optimiser, of both.
      before: the types of the moments before, as `saved_moments` returns them of that model.
      count: the updates that they are made of, which go on to be counted.
    """
    carried = CarriedMoments(graph, before, count, section.b1, section.b2, SAVED.format)
    return {
        SAVED.format(kind, name): carried.moment(name, kind, type)
        for kind, types in saved_moments(graph, section).items()
        for name, type in types.items()
    }


# Metrics of routing, made of the sums that the graphs of micro-batches return.
#
# They work on numbers and arrays of NumPy and of jax alike.

LOSSES = "losses"
"""The graph attribute with the options with which ``add-losses`` added losses."""

LONG = {"z": "router_z"}
"""Losses that an option abbreviates."""

ROWS, ASKED = "rows", "asked"


def recorded_losses(graph: Graph) -> JsonDict | None:
    """Return the options with which losses were added, as a pipeline spells them, or None."""
    options = graph.attrs.get(LOSSES)
    if not isinstance(options, Mapping):
        return None
    return {name.replace("_", "-"): v for name, v in options.items() if v is not None}


def coefficients(graph: Graph) -> dict[str, float]:
    """Return the coefficients of the losses of routers, by the output that is the loss."""
    options = graph.attrs.get(LOSSES)
    named = options if isinstance(options, Mapping) else {}
    return {
        f"loss.{LONG.get(name, name)}": float(value)
        for key, value in named.items()
        if (name := key.removesuffix("_coef")) != key and value
    }


def finished(sums: Json) -> JsonDict:
    """Return what the sums over a batch say of each routed layer, beside all other outputs.

    ``loads``: each expert's share of the rows with a slot; ``dropped``: the share of the choices
    that got none; ``max_violation``: the largest load over the mean, less 1 (Wang et al. 2024);
    ``dead_experts``: those without a row.

    Args:
      sums: the outputs of the graph of a micro-batch, added.
    """
    metrics = dict(sums)
    for name, rows in sums.items():
        if not (name.startswith(METRIC) and name.endswith(f".{ROWS}")):
            continue
        layer = name.removesuffix(ROWS)
        total = rows.sum()
        loads = rows / (total + (total == 0))
        metrics[f"{layer}loads"] = loads
        metrics[f"{layer}max_violation"] = loads.max() * rows.shape[0] - 1
        metrics[f"{layer}dead_experts"] = (rows == 0).sum()
        if f"{layer}{ASKED}" in sums:
            asked = sums[f"{layer}{ASKED}"]
            metrics[f"{layer}dropped"] = (asked - total) / (asked + (asked == 0))
    return metrics


# Micro-batches: parts of a batch that hold whole token groups.


def rows_together(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Return how many sequences a micro-batch cannot part: those of a token group, one at least.

    Args:
      graph: of a micro-batch.
      sizes: what its variables stand for.

    Raises:
      InputError: a token group ends within a sequence of another.
    """
    nodes = [n for n in graph.every_node() if n.op.assigns_slots]
    counted_rows = [_rows(node, sizes) for node in nodes]
    problems = [problem for _, problem in counted_rows if problem is not None]
    raise_problems(problems)
    rows = sorted({number for number, _ in counted_rows} | {1})
    odd = [n for n in rows if rows[-1] % n]
    if odd:
        raise InputError(
            "the token groups of layers do not fit into one another",
            expected=f"divisors of {rows[-1]} sequences",
            found=", ".join(map(str, odd)),
        )
    return rows[-1]


def _rows(node: Node, sizes: Mapping[str, int]) -> tuple[int, Problem | None]:
    attrs, type = SlotsOp.of_node(node), node.results[-1].type
    batch, *lengths = (_size(type[n].size, sizes) for n in attrs.tokens)
    sequence = prod(lengths)
    tokens = attrs.group_size or batch * sequence // max(attrs.groups, 1)
    rows = max(ceil(tokens / max(sequence, 1)), 1)
    if tokens % max(sequence, 1) == 0 or (rows == 1 and sequence % max(tokens, 1) == 0):
        return rows, None
    return rows, Problem(
        "token groups do not end with a sequence",
        node.loc,
        f"a divisor or a multiple of {sequence} tokens",
        f"{tokens} tokens",
    )


def _size(size: object, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sizes[str(size)]
