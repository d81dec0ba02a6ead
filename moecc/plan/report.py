"""A plan as JSON values, and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from textwrap import wrap

from moecc.plan.collectives import BOUND, PartCost, is_exact, sent_bytes
from moecc.plan.machines import Machine, efficiency_range, fraction_remark, memory_fraction
from moecc.plan.search import Ranking, seconds_text, why_slower
from moecc.plan.step import StepConfig, Strategy, mesh_text
from moecc.plan.time import EXPOSED_ERROR, Estimate
from moecc.plan.workload import Workload
from moecc.support.text import amount, count_text, digits_text, size_text, time_text
from moecc.support.untyped import JsonDict


@dataclass(frozen=True)
class Idea:
    """Something that one would try beside the best plan.

    Attributes:
      name: what it is.
      how: its numbers: ``4 stages of 8 layers``.
      options: what asks for it; empty where nothing does.
      command: the whole command line, where the model's is known.
      lowered: whether moecc compiles it.
      seconds: of a step; None where it is impossible.
      total_bytes: of a device; None likewise.
      why: why it is faster, slower, or impossible.
    """

    name: str
    how: str
    options: str = ""
    lowered: bool = False
    seconds: float | None = None
    total_bytes: float | None = None
    why: str = ""
    command: str = ""


COLUMNS = 100
_INDENT = 14


def plan_json(
    model: str,
    work: Workload,
    machine: Machine,
    config: StepConfig,
    ranking: Ranking,
    explored: Iterable[Idea] = (),
) -> JsonDict:
    """Return the plan as the JSON values that ``docs/cli.md`` lists."""
    best = ranking.best
    return {
        "model": model,
        "machine": {
            "name": machine.name,
            "devices": machine.devices,
            "usable_bytes": machine.usable_bytes,
            "peak_flops": machine.peak(config.compute_type.name),
            "hbm_bytes_per_second": machine.hbm_bytes_per_second,
            "sources": list(machine.sources),
        },
        **step_json(work, config),
        "experts": work.experts,
        "model_flops": best.model_flops,
        "best": {
            **_plan(best, work),
            "memory_fraction": memory_fraction(machine, best.memory.total),
        },
        "others": [
            {**_summary(slower, work), "why_slower": why_slower(slower, best)}
            for slower in ranking.others
        ],
        "lossy": _summary(ranking.lossy, work) if ranking.lossy else None,
        "tried": ranking.tried,
        "fitting": ranking.fitting,
        "explored": [asdict(idea) for idea in explored],
        "run": None,
    }


def run_json(data: JsonDict, tokens: float, price: float | None) -> JsonDict:
    """Return the time and the cost of a run of planned steps, and of nothing but steps.

    Args:
      data: what `plan_json` returned.
      tokens: of the whole run, or inputs where all sizes are fixed.
      price: of an hour of a device, in any currency.
    """
    steps = ceil(tokens / data["batch"]["tokens"])
    hours = steps * data["best"]["seconds"] / 3600
    device_hours = hours * data["machine"]["devices"]
    return {
        "tokens": tokens,
        "steps": steps,
        "days": hours / 24,
        "device_hours": device_hours,
        "price": price,
        "cost": None if price is None else device_hours * price,
    }


def step_json(work: Workload, config: StepConfig) -> JsonDict:
    """Return what a step computes, of a plan and of a compilation, as JSON values."""
    return {
        "step": config.step,
        "optimizer": config.optimizer if config.train else None,
        "dtype": config.compute_type.name,
        "weight_dtype": config.weight_type.name,
        "reduce_dtype": config.reduce_type.name if config.train else None,
        "batch": {
            "tokens": work.batch.tokens * config.micro_batches,
            "sequences": work.batch.sequences * config.micro_batches,
            "lengths": dict(work.batch.lengths),
            "micro_batches": config.micro_batches,
        },
        "parameters": work.parameters,
    }


def searched_json(ranking: Ranking, work: Workload) -> list[JsonDict]:
    """Return the strategies that fit, fastest first and 2,000 of them, in a few numbers."""
    return [_summary(estimate, work) for estimate in ranking.searched[:2000]]


def _strategy(strategy: Strategy) -> JsonDict:
    return {
        "mesh": dict(strategy.layout.sizes),
        "rules": list(strategy.layout.names),
        "dense_weights": strategy.layout.dense_weights,
        "via": strategy.via,
        "dispatch": strategy.dispatch,
        "remat": strategy.remat,
        "sliced": strategy.sliced,
    }


def _summary(estimate: Estimate, work: Workload) -> JsonDict:
    return {
        **_strategy(estimate.strategy),
        "exact": is_exact(estimate.strategy.via, work.dropless),
        "seconds": estimate.seconds,
        "mfu": estimate.mfu,
        "total_bytes": estimate.memory.total,
    }


def _plan(estimate: Estimate, work: Workload) -> JsonDict:
    memory = estimate.memory
    return {
        **_summary(estimate, work),
        "flops": estimate.flops,
        "memory_bytes": memory.kinds(),
        "arguments_bytes": memory.arguments,
        "temporary_bytes": memory.temporaries,
        "fits": estimate.fits,
        "seconds_by_kind": estimate.by_kind,
        "seconds_interval": list(estimate.interval),
        "exposed_bytes": sum(row["exposed_bytes"] for row in estimate.overlap.values()),
        "collectives": estimate.collectives,
        "parts": [_part(part, estimate) for part in estimate.parts],
        "attention": attention_json(estimate),
    }


def attention_json(estimate: Estimate) -> list[JsonDict]:
    """Return the kernel of each attention, and why the machine's others are not used."""
    return [
        {"part": name, "kernel": choice.kernel.name, "why": dict(choice.reasons)}
        for name, choice in estimate.attention
    ]


def _part(part: PartCost, estimate: Estimate) -> JsonDict:
    layout = estimate.strategy.layout
    return {
        "name": part.name,
        "count": part.count,
        "bound": part.bound,
        "flops": part.flops,
        "hbm_bytes": part.hbm_bytes,
        "seconds": {
            "total": part.seconds,
            "compute": part.compute_seconds,
            "hbm": part.hbm_seconds,
            "local": part.local_seconds,
            "waiting": part.waiting_seconds,
            "hidden": part.hidden_seconds,
        },
        "transfers": [
            {
                "op": c.op,
                "axes": list(c.axes),
                "why": c.why,
                "times": part.count * c.times,
                "tensor_bytes": c.tensor_bytes,
                "sent_bytes": sent_bytes(c.op, layout.size(c.axes), c.tensor_bytes),
                "seconds": part.count * c.seconds,
            }
            for c in part.collectives
        ],
    }


# --- for people ----------------------------------------------------------------------------


def plan_text(data: JsonDict) -> str:
    """Return the plan for people.

    Args:
      data: what `plan_json` returned.
    """
    rows = (*_heading(data), *_memory_rows(data), *_time_rows(data), *_traffic(data))
    below = (*_others(data), *_ideas(data))
    return "\n".join(line for row in (*rows, *below) for line in _within(row))


def _within(row: str) -> list[str]:
    """Return a row in lines that a terminal shows whole; what is carried over stands below it.

    Commands stay whole, to be copied.
    """
    if len(row) <= COLUMNS or row.startswith("             moecc "):
        return [row]
    below = " " * (_INDENT if row.startswith("  ") else 2)
    return wrap(
        row, COLUMNS, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
    )


def _heading(data: JsonDict) -> list[str]:
    best, machine, batch = data["best"], data["machine"], data["batch"]
    rate = batch["tokens"] / best["seconds"] / machine["devices"]
    return [
        f"{data['model']} on {machine['name']}: {amount(machine['devices'], 'device')}, "
        f"{step_text(data)}, {data['dtype']}, weights {data['weight_dtype']}",
        f"  batch       {batch_text(batch)}",
        f"  plan        {_name(best, data['experts'])}",
        f"  step        {seconds_text(best['seconds'])}, "
        f"{rate:,.0f} {unit_of(batch)}s/s a device, {best['mfu']:.1%} of the peak (model FLOPs)",
        _interval(best),
        *(f"  attention   {attention_text(choice)}" for choice in best["attention"]),
        *(f"  run         {text}" for text in [run_text(data)] if text),
    ]


def run_text(data: JsonDict) -> str:
    """Return the tokens, time and cost of a whole run in words; empty without one."""
    run = data["run"]
    if run is None:
        return ""
    text = f"{count_text(run['tokens'])} {unit_of(data['batch'])}s: {amount(run['steps'], 'step')}"
    text += f", {time_text(run['days'] * 86_400)}, {digits_text(run['device_hours'])} device hours"
    if run["cost"] is not None:
        text += f", {digits_text(run['cost'])} at {run['price']:g} an hour"
    return f"{text}, steps alone"


def _interval(best: JsonDict) -> str:
    """Return how far off the time of a step may be, and on what that rests."""
    low, high = map(seconds_text, best["seconds_interval"])
    share = EXPOSED_ERROR
    exposed = best["seconds_by_kind"]["exchange"] + best["seconds_by_kind"]["parameters"]
    within = f", {seconds_text(exposed)} of exposed collectives ± {share:.0%}" if exposed else ""
    slow, fast = efficiency_range()
    return (
        f"  interval    {low} to {high}: products at {fast:.0%} to {slow:.0%} of the peak{within}"
    )


def attention_text(choice: JsonDict) -> str:
    """Return the kernel of an attention in words, of a value of `attention_json`."""
    why = "; ".join(f"not {name}: {reason}" for name, reason in choice["why"].items())
    return f"{choice['part']}: {choice['kernel']}{f' ({why})' if why else ''}"


def step_text(data: JsonDict) -> str:
    """Return which step is meant, and the optimiser of a training step."""
    return f"training with {data['optimizer']}" if data["optimizer"] else "forward pass"


def unit_of(batch: JsonDict) -> str:
    """Return what a batch is counted in: a token, or an input where all sizes are fixed."""
    return "token" if batch["lengths"] else "input"


def batch_text(batch: JsonDict) -> str:
    """Return a batch in words: tokens, sequences and their lengths, micro-batches."""
    lengths = " and ".join(f"{n}" for n in batch["lengths"].values())
    sequences = amount(batch["sequences"], "sequence")
    within = f": {sequences} of {lengths}" if lengths else " of fixed size"
    parts = batch["micro_batches"]
    behind = f", in {parts:,} micro-batches" if parts > 1 else ""
    return f"{amount(batch['tokens'], unit_of(batch))}{within}{behind}"


def _name(plan: JsonDict, experts: int) -> str:
    """Return a plan in words; without experts nothing is said of the ways to them."""
    words = [mesh_text(plan["mesh"]) or "one device", f"rules {','.join(plan['rules'])}"]
    if plan["dense_weights"] == "split":
        along = " over the experts' axis" if experts else ""
        words.append(f"dense weights split{along}")
    if experts:
        words.append(f"experts via {plan['via']}{' in slices' if plan['sliced'] else ''}")
        words.append(f"{plan['dispatch']} dispatch")
    return ", ".join([*words, f"remat {plan['remat']}"])


def _memory_rows(data: JsonDict) -> list[str]:
    best, usable = data["best"], data["machine"]["usable_bytes"]
    kinds = ", ".join(f"{n} {b / 1e9:.2f}" for n, b in best["memory_bytes"].items() if b >= 5e6)
    left = usable - best["total_bytes"]
    remark = fraction_remark(best["memory_fraction"], best["total_bytes"], usable)
    return [
        f"  memory      {size_text(best['total_bytes'])} of {size_text(usable)} a device, "
        f"{size_text(abs(left))} {'to spare' if left >= 0 else 'too much'}",
        *(f"              {line}" for line in (kinds, remark) if line),
    ]


def _time_rows(data: JsonDict) -> list[str]:
    rows = [
        f"  {'part':34} {'count':>5} {'bound':>8} {'total':>9} {'compute':>9} {'hbm':>9} "
        f"{'network':>9} {'TFLOPs':>8}"
    ]
    for part in data["best"]["parts"]:
        times = part["seconds"]
        network = times["waiting"] + times["hidden"]
        shown = (times["total"], times["compute"], times["hbm"], network)
        if times["total"] < data["best"]["seconds"] * 1e-4:
            continue
        rows.append(
            f"  {part['name']:34} {part['count']:>5} {part['bound']:>8} "
            + " ".join(f"{seconds_text(t) if t else '-':>9}" for t in shown)
            + f" {part['flops'] / 1e12:>8.1f}"
        )
    return rows


def _traffic(data: JsonDict) -> list[str]:
    rows = []
    for op, row in data["best"]["collectives"].items():
        rows.append(
            f"  {op:34} {row['count']:>5.0f} {'':>8} {seconds_text(row['seconds']):>9} "
            f"{row['tensor_bytes'] / 1e9:>9.2f} {row['sent_bytes'] / 1e9:>9.2f}"
        )
    if not rows:
        return ["  no collectives"]
    title = (
        f"  {'collective':34} {'count':>5} {'':>8} {'time':>9} {'GB':>9} {'GB sent':>9}   a device"
    )
    return [title, *rows]


def _others(data: JsonDict) -> list[str]:
    best = data["best"]
    rows = [f"  {data['fitting']} of {data['tried']} plans fit; the next best"]
    for plan in data["others"]:
        slower = plan["seconds"] / best["seconds"] - 1
        rows.append(f"    {slower:+7.1%}  {_name(plan, data['experts'])}")
        rows.append(f"             {plan['why_slower']}")
    if not data["others"]:
        rows = [f"  {data['fitting']} of {data['tried']} plans fit"]
    lossy = data["lossy"]
    if lossy is not None:
        gain = 1 - lossy["seconds"] / best["seconds"]
        rows.append(f"  {gain:.1%} faster, if rows beyond {BOUND} times the mean may be lost:")
        rows.append(f"    {_name(lossy, data['experts'])}")
    return rows


def _ideas(data: JsonDict) -> list[str]:
    """Return what one would try, with what it would take beside the best plan."""
    rows = ["  what one would try"] if data["explored"] else []
    for idea in data["explored"]:
        seconds, size = idea["seconds"], idea["total_bytes"]
        how = f"{idea['name']}: {idea['how']}" if idea["how"] else idea["name"]
        if seconds is None or size is None:
            rows += [f"    {'not':>7}  {how}", f"             {idea['why']}"]
            continue
        slower = seconds / data["best"]["seconds"] - 1
        rows += [f"    {slower:+7.1%}  {how}, {size_text(size)}", f"             {idea['why']}"]
        if idea["options"]:
            rows.append(f"             {idea['command'] or idea['options']}")
    return rows
