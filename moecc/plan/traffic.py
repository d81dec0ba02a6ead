"""The collectives of one part of a model, under a strategy."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ir.traits import Cost, RowMove
from moecc.plan.collectives import Transfer
from moecc.plan.exchanges import Rows
from moecc.plan.exchanges import transfers as exchange_transfers
from moecc.plan.shapes import Shape
from moecc.plan.sharding import Sharding
from moecc.plan.strategy import StepConfig, Strategy
from moecc.plan.vias import LOCAL
from moecc.plan.workload import Part, Step, Weight, Workload


def part_transfers(
    part: Part, work: Workload, setting: StepConfig, strategy: Strategy, local: Sharding
) -> Iterator[Transfer]:
    """Yield the collectives of one part, forward and, in training, backward."""
    yield from _gathers(part, setting, strategy, local)
    if setting.train:
        for weight in part.weights:
            yield from _gradient_sums(weight, setting.dtype.itemsize_bytes, strategy, local)
    rows = sparse_rows(part, work, setting, strategy, local)
    yield from _sums(part, setting, strategy, local, rows)
    if rows is not None and strategy.via != LOCAL:
        layout, again = strategy.layout, forwards(strategy.remat, setting.train)
        again += part.onward and setting.train and strategy.remat == "full"
        sliced = layout.tensor_axes if strategy.sliced else ()
        yield from _forward_only(
            exchange_transfers(
                strategy.via, rows, layout.expert_axes, again, sliced
            ),
            setting.train,
        )  # fmt: skip


def forwards(remat: str, train: bool) -> float:
    """Return how often the exchange of a layer's forward pass runs.

    The policy ``save`` keeps the sums of what comes back, and not the rows, which the gradient of
    the gates needs.
    """
    return 1.0 if not train or remat == "none" else 2.0


def _forward_only(found: Iterator[Transfer], train: bool) -> Iterator[Transfer]:
    for t in found:
        if train:
            yield t
        else:
            # The backward pass does each once more.
            yield Transfer(t.op, t.axes, t.tensor_bytes, t.times / 2, t.why, t.waits)


def sparse_rows(
    part: Part, work: Workload, setting: StepConfig, strategy: Strategy, local: Sharding
) -> Rows | None:
    """Return the tokens and rows of a device at `part`, or None where there are no experts."""
    step = next((s for s in part.steps if s.moves is RowMove.TO_SLOTS), None)
    if step is None:
        return None
    layout = strategy.layout
    embed = step.results[0].size("embed")
    exact = local if local.rows == 1 else Sharding(layout)
    # Rows are counted where their tokens are, before any exchange.
    shares = layout.mesh.size(layout.batch_axes) / layout.row_shards
    return Rows(
        tokens=local.elements(step.operands[0]) / embed,
        rows=exact.elements(step.results[0]) / embed / shares,
        row_bytes=embed * setting.dtype.itemsize_bytes,
        devices=layout.mesh.size(layout.expert_axes),
        top_k=part.top_k,
        experts=work.experts,
        dropless=work.dropless,
        tensor=layout.mesh.size(layout.tensor_axes),
    )


def _gathers(
    part: Part, setting: StepConfig, strategy: Strategy, local: Sharding
) -> Iterator[Transfer]:
    """Yield how parameters that are stored in parts are gathered.

    Those of layers are gathered once more for the backward pass, whatever else is kept.
    """
    times = 1
    if setting.train and part.in_layer:
        times += 1 + (part.onward and strategy.remat != "none")
    for weight in part.weights:
        axes = local.stored_axes(weight)
        if axes:
            size = local.used(weight) * setting.dtype.itemsize_bytes
            yield Transfer("all_gather", axes, size, times, "parameters", False)


def _gradient_sums(
    weight: Weight, width: int, strategy: Strategy, local: Sharding
) -> Iterator[Transfer]:
    """Yield how a gradient, with elements of `width` bytes, is summed over the batch."""
    layout = strategy.layout
    stored = local.stored_axes(weight)
    axes = tuple(n for n in stored if n in layout.batch_axes)
    if axes:
        yield Transfer("reduce_scatter", axes, local.used(weight) * width, 1, "gradients", False)
    sums = layout.gradient_axes(weight.of_experts, stored)
    if layout.mesh.size(sums) > 1:
        yield Transfer("all_reduce", sums, local.stored(weight) * width, 1, "gradients", False)


def _sums(
    part: Part, setting: StepConfig, strategy: Strategy, local: Sharding, rows: Rows | None
) -> Iterator[Transfer]:
    """Yield the sums over ``model``: where an axis that it splits is summed over, or made.

    Forward, a product over a split axis leaves a partial sum on each device.  Backward, a product
    that made a split axis leaves partial gradients of its operand; those of several products of one
    operand are added first, and summed once; of an operand from another stack, once a unit.
    What is added up as tokens between devices of experts is summed over ``model`` there, too:
    tokens are fewer than rows.
    """
    layout, width = strategy.layout, setting.dtype.itemsize_bytes
    if layout.mesh.size(layout.tensor_axes) == 1:
        return
    sources: dict[int, tuple[Shape, float]] = {}
    for step in part.steps:
        if strategy.sliced and step.has_rows and _meets_weight(step):
            # The exchange has it.
            continue
        if _sums_split(step, layout.shards):
            times = 1 + (_times_again(step, strategy.remat) if setting.train else 0)
            size = local.elements(step.results[0]) * width
            if rows is not None and step.has_rows and strategy.via in ("ring", "replicated"):
                size = rows.tokens * rows.row_bytes
            yield Transfer("all_reduce", layout.tensor_axes, size, times, "partial sums")
        if setting.train and _makes_split(step, layout.shards):
            sources[step.source] = step.operands[0], step.source_share
    for shape, share in sources.values():
        size = local.elements(shape) * width
        yield Transfer("all_reduce", layout.tensor_axes, size, share, "gradients of partial sums")


def _sums_split(step: Step, shards: dict[str, int]) -> bool:
    """Whether a step leaves partial sums: a product over a split axis, a look-up in one."""
    if step.cost is Cost.LOOK_UP:
        return "vocab" in _split(step.operands[0], shards)
    return bool(set(step.over) & _split(step.axes, shards)) and _meets_weight(step)


def _makes_split(step: Step, shards: dict[str, int]) -> bool:
    if step.cost is not Cost.PRODUCT or not _meets_weight(step):
        return False
    made = _split(step.results[0], shards) - set(step.operands[0].names)
    return bool(made)


def _meets_weight(step: Step) -> bool:
    return any(weight is not None for weight in step.weights)


def _split(shape: Shape, shards: dict[str, int]) -> set[str]:
    """Return the axes of `shape` that products make or sum over and that lie split."""
    axes = {name for name, size in shape if shards.get(name, 1) > 1 and size % shards[name] == 0}
    return axes & {"q", "kv", "mlp", "vocab"}


def _times_again(step: Step, remat: str) -> int:
    return {"none": 0, "save": step.saved_again, "full": step.again}[remat]
