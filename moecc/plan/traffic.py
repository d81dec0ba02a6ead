"""The collectives of one part of a model, under a strategy.

They are those that propagation finds for the part, which passes write into the graph that runs, and
their transposes in the backward pass.  Here they are counted: how often a step of training, or a
forward pass, does each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from moecc.ir.traits import RowMove
from moecc.plan.collectives import Transfer
from moecc.plan.exchange_traffic import Work, exchange
from moecc.plan.exchanges import Rows
from moecc.plan.part_traffic import Carried, Moved, PartTraffic, traffic_of
from moecc.plan.parts import Part
from moecc.plan.sharding import Sharded, Sharding
from moecc.plan.strategy import StepConfig, Strategy
from moecc.plan.workload import Workload
from moecc.sharding.routes import Slice, SparseLayer
from moecc.sharding.vias import Via, via

_WIDE_BYTES = 4


def _moved(carried: Carried, by_route: bool) -> Sequence[Moved]:
    """Return what a step moves, but for what the way to the experts brings itself."""
    return () if by_route and carried.in_route else carried.moved


def part_transfers(
    part: Part, config: StepConfig, strategy: Strategy, local: Sharding
) -> Iterator[Transfer]:
    """Yield the collectives of one part, forward and, in training, backward."""
    sharded = local.sharded
    found = sharded.once(id(part), lambda: traffic_of(part, sharded))
    doing = Work(strategy, config)
    way = None if found.layer is None else via(strategy.via)

    def transfer(one: Moved, times: float, *, waits: bool = True) -> Transfer:
        elements = one.elements * local.rows if one.of_rows else one.elements
        size = elements * max(config.dtype.itemsize_bytes, _WIDE_BYTES * one.is_wide)
        free = one.leaves_work and config.train
        return Transfer(one.op, one.axes, size, times, one.why, waits, one.odd, one.weight, free)

    for one in found.params:
        yield transfer(one, doing.gathers(part), waits=False)
    for one in found.gradients if config.train else ():
        yield _summed(transfer(one, 1, waits=False), config)
    for carried in found.forward:
        # What several layers take is brought to all of them at once, and stays there.
        again = doing.forward(carried.step) if carried.share == 1 else 1
        for one in _moved(carried, way is not None):
            yield transfer(one, again * carried.share)
    for carried in found.backward if config.train else ():
        yield from (transfer(m, carried.share) for m in _moved(carried, strategy.sliced))
    if found.layer is not None and way is not None:
        times = _exchanged((part, found, found.layer), way, doing, sharded)
        yield from (transfer(one, count) for one, count in times.items() if count)


def _summed(gradient: Transfer, config: StepConfig) -> Transfer:
    """Return how a gradient is summed, in a micro-batch of several.

    Those of parameters that are stored in parts are scattered in each micro-batch, by the transpose
    of what gathers the parameter, in the type of the computation.  Others are added first, and
    reduced once.
    """
    if gradient.op != "all_reduce":
        return gradient
    wider = config.reduce_width / config.dtype.itemsize_bytes
    size, times = gradient.tensor_bytes * wider, gradient.times / config.micro_batches
    return gradient._replace(tensor_bytes=size, times=times)


def _exchanged(
    of: tuple[Part, PartTraffic, SparseLayer], way: Via, doing: Work, sharded: Sharded
) -> Counter[Moved]:
    """Return how often each collective of `way` to the experts of a part runs."""
    part, found, layer = of
    strategy = doing.strategy
    routed = sharded.once(
        (id(part), way.name, strategy.sliced),
        lambda: tuple(exchange(layer, way, _slice(layer, strategy), found.steps, sharded)),
    )
    times: Counter[Moved] = Counter()
    for each in routed:
        times[each.moved] += doing.routed(each)
    return times


def _slice(layer: SparseLayer, strategy: Strategy) -> Slice | None:
    return Slice(layer.width, strategy.layout.tensor_axes[0]) if strategy.sliced else None


def sparse_rows(
    part: Part, work: Workload, config: StepConfig, strategy: Strategy, local: Sharding
) -> Rows:
    """Return the tokens and rows of a device at `part`, which has experts."""
    sent = (s for s in part.steps if s.moves is RowMove.TO_SLOTS)
    # Losses and metrics may send a number of each token, too.
    step = next(s for s in sent if "embed" in s.results[0].names)
    layout, rows = strategy.layout, step.results[0]
    embed = rows.size("embed")
    return Rows(
        tokens=local.elements(step.operands[0]) / embed,
        # Rows are counted where their tokens are, before any exchange.
        rows=rows.elements / embed / layout.shards["batch"],
        row_bytes=embed * config.dtype.itemsize_bytes,
        devices=layout.shards["expert"],
        top_k=part.top_k,
        experts=work.experts,
        dropless=work.dropless,
        in_rounds=strategy.in_rounds,
    )
