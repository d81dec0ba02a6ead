"""The human-readable report of a compilation, with the plan's prediction beside each figure."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.ahead.request import CompileReport
from moecc.plan.report import batch_text
from moecc.support.text import amount, count_text, size_text


def compile_text(data: CompileReport) -> str:
    """Return the human-readable report.

    Args:
      data: the result of `moecc.ahead.worker.report`.
    """
    return "\n".join([*_heading(data), *_memory(data), *_work(data), *_collectives(data)])


def _heading(data: CompileReport) -> Iterator[str]:
    machine = data["machine"]
    step = f"training with {data['optimizer']}" if data["optimizer"] else "forward pass"
    mesh = " x ".join(f"{name} {size}" for name, size in data["mesh"].items())
    yield (
        f"{data['model']} for {machine['name']}: {amount(machine['devices'], 'device')}, {step}, "
        f"{data['dtype']}, weights {data['weight_dtype']}"
    )
    yield f"  parameters   {data['parameters']:,}"
    yield f"  batch        {batch_text(data['batch'])}"
    capacity = data["capacity"]
    bound = (
        "" if capacity is None else f", capacity {capacity['factor']} x {capacity['convention']}"
    )
    layout = f"{mesh}, dense weights {data['dense_weights']}"
    yield f"  mesh         {layout}, remat {data['remat']}{bound}"
    yield f"  program      {_program(data)}"
    yield f"  passes       {data['pipeline']}"
    seconds, host = data["seconds"], size_text(data["host_peak_bytes"])
    yield (
        f"  compiled     in {seconds['compile']:.1f} s after {seconds['lower']:.1f} s of lowering, "
        f"with {host} of host memory{', with the least effort' if data['quick'] else ''}"
    )


def _program(data: CompileReport) -> str:
    """Return where the program's collectives come from, and how tokens reach their experts."""
    whose = {
        "explicit": "the graph's own collectives in one shard_map",
        "gspmd": "collectives by XLA's partitioner (GSPMD)",
    }[data["partition"]]
    if data["via"] is None:
        return whose
    return f"{whose}, experts via {data['via']}{' in slices' if data['sliced'] else ''}"


def _memory(data: CompileReport) -> Iterator[str]:
    usable, needed = data["machine"]["usable_bytes"], data["needed_bytes"]
    predicted = data["predicted"]
    spare = size_text(abs(usable - needed))
    fits = f"fits, {spare} to spare" if data["fits"] else f"does not fit: {spare} too much"
    yield f"  a device     {size_text(needed)} of {size_text(usable)}: {fits}"
    if data["would_fit"]:
        yield f"               {data['would_fit']}, by the plan"
    yield f"{'':15}{'compiled':>12}{'planned':>12}"
    memory = data["memory"] or {}
    rows = (
        ("arguments", "arguments_bytes", predicted["arguments_bytes"]),
        ("temporaries", "temporaries_bytes", predicted["temporaries_bytes"]),
    )
    for title, key, planned in rows:
        found = size_text(memory[key]) if key in memory else "-"
        yield f"    {title:<11}{found:>12}{size_text(planned):>12}"
    if "outputs_bytes" in memory:
        new = memory["outputs_bytes"] - memory["aliased_bytes"]
        yield f"    {'new outputs':<11}{size_text(new):>12}"
    yield f"    {'peak':<11}{size_text(needed):>12}{size_text(predicted['needed_bytes']):>12}"


def _work(data: CompileReport) -> Iterator[str]:
    if data["memory"] is None:
        return
    flops, model = data["flops"], data["model_flops"]
    yield f"    {'FLOPs':<11}{count_text(flops):>12}{count_text(data['predicted']['flops']):>12}"
    share = model / max(flops, 1)
    # What kernels and loops hide is said below; without them only attention computes less.
    skips = share > 1 and not data["opaque"] and not data["unknown_loops"]
    more = ": attention skips blocks of masked scores" if skips else ""
    yield f"    of the model alone {count_text(model)}, {share:.0%} of what is computed{more}"
    if data["unknown_loops"]:
        yield f"    {data['unknown_loops']} loops of unknown length are counted once"
    for name, count in data["opaque"].items():
        yield f"    {count} runs of {name} have multiplications that the program does not show"


def _collectives(data: CompileReport) -> Iterator[str]:
    found, predicted = data["collectives"], data["predicted"]["collectives"]
    if not found:
        return
    yield f"  {'collectives of a device':<25}{'text':>6}{'runs':>8}{'bytes':>12}{'planned':>12}"
    for kind in sorted({*found, *predicted}):
        total = found.get(kind, {"count": 0, "runs": 0, "bytes": 0})
        planned = size_text(predicted[kind]["bytes"]) if kind in predicted else "-"
        yield (
            f"    {kind:<23}{total['count']:>6}{total['runs']:>8}"
            f"{size_text(total['bytes']):>12}{planned:>12}"
        )
        if "worst_bytes" in total:
            worst = size_text(total["worst_bytes"])
            yield f"      balanced: where all rows go to one device, {worst}"
    if not data["quick"]:  # Nothing is beside products where nothing was tried.
        yield from _overlap(data)


def _overlap(data: CompileReport) -> Iterator[str]:
    """Yield how much of the collectives is beside products, and how much is waited for."""
    pairs = (data["overlap"], data["predicted"]["overlap"])
    beside, planned = (sum(k["overlapped_bytes"] for k in kinds.values()) for kinds in pairs)
    exposed, waiting = (sum(k["exposed_bytes"] for k in kinds.values()) for kinds in pairs)
    yield f"    {'beside products':<37}{size_text(beside):>12}{size_text(planned):>12}"
    yield f"    {'exposed':<37}{size_text(exposed):>12}{size_text(waiting):>12}"
