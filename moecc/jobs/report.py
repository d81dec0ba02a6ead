"""``moecc report``: runs compared on one self-contained page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from moecc.jobs.command import Force, Report, SequenceLength, Spelling, check_writable, write_whole
from moecc.support.lazy import graph_objects, np
from moecc.support.page import drawing, render_page, require_figures
from moecc.support.untyped import Json, JsonDict
from moecc.train.run import CURVES, ROUTER_CURVES, RunSeries, Series, read_run

Layers = Sequence[Json]
"""The report of ``moecc specialise`` on the layers of a model, as JSON values."""


def report_page(runs: Sequence[RunSeries], specialised: Mapping[str, Layers]) -> str:
    """Return the page, which loads nothing from anywhere.

    Args:
      runs: what is compared.
      specialised: by the name of a run: which tokens went to which expert.

    Raises:
      MachineError: plotly is missing.
    """
    require_figures()
    sections = [("Training", list(_curves(runs))), ("Held-out text", list(_held_out(runs)))]
    sections += [(f"Experts of {r.name}", list(_router(r))) for r in runs if r.layers]
    names = runs[0].facts
    return render_page(
        "runs.html",
        " · ".join(run.name for run in runs),
        figures=True,
        fact_heads=["", *(run.name for run in runs)],
        facts=[[name, *(run.facts.get(name, "") for run in runs)] for name in names],
        alarms_title="Alarms",
        alarms=[f"{run.name}: {alarm}" for run in runs for alarm in run.alarms()],
        sections=sections,
        specialised=[
            {"name": name, "explained": _explained(layers), "layers": layers}
            for name, layers in specialised.items()
        ],
    )


def _curves(runs: Sequence[RunSeries]) -> Iterator[JsonDict]:
    for name, title in CURVES.items():
        lines = {run.name: s for run in runs if (s := run.scalar(name)) is not None}
        if lines:
            yield _lines(title, lines)


def _held_out(runs: Sequence[RunSeries]) -> Iterator[JsonDict]:
    texts = dict.fromkeys(name for run in runs for name in run.held_out)
    for text in texts:
        lines = {run.name: run.held_out[text] for run in runs if text in run.held_out}
        yield _lines(f"Loss on {text}, nats a token", lines, markers=True)


def _router(run: RunSeries) -> Iterator[JsonDict]:
    yield _loads(run)
    for kind, title in ROUTER_CURVES.items():
        lines = {n: s for n in run.layers if (s := run.of_layer(n, kind)) is not None}
        if lines:
            yield _lines(title, lines)
    spreads = {
        layer: Series(s.steps, s.values.mean(axis=1))
        for layer in run.layers
        if (s := run.spread(layer)) is not None
    }
    if spreads:
        yield _lines("Distance of experts: 0 for copies", spreads, markers=True)


def _loads(run: RunSeries) -> JsonDict:
    """Return a heat map: a row an expert of a layer, its load over an even one."""
    rows, names, steps = [], [], np.zeros(0)
    for layer in run.layers:
        loads = run.of_layer(layer, "loads")
        if loads is None:
            continue
        steps = loads.steps
        rows += [*(loads.values * loads.values.shape[1]).T]
        names += [f"{layer} · {expert}" for expert in range(loads.values.shape[1])]
    heat = graph_objects.Heatmap(
        x=steps,
        y=names,
        z=np.array(rows),
        colorscale="Viridis",
        zmin=0,
        zmax=2,
        colorbar={"title": "× even"},
    )
    figure = graph_objects.Figure(heat)
    figure.update_yaxes(autorange="reversed")
    title = "Load of each expert over an even load"
    return drawing(figure, title, 160 + 16 * len(names), "step")


def _lines(title: str, lines: Mapping[str, Series], *, markers: bool = False) -> JsonDict:
    mode = "lines+markers" if markers else "lines"
    figure = graph_objects.Figure(
        [
            graph_objects.Scatter(x=s.steps, y=s.values, name=name, mode=mode, showlegend=True)
            for name, s in lines.items()
        ]
    )
    # Beside the curves it would take half of a narrow page.
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return drawing(figure, title, 360, "step")


def _explained(layers: Layers) -> list[list[str]]:
    rows = []
    for layer in layers:
        shares = (layer["explained"], layer["untrained"], layer["by_chance"])
        entropies = (layer["sentinel_entropy"], layer["other_entropy"])
        rows.append([layer["layer"], *(f"{share:.0%}" for share in shares)])
        rows[-1] += ["" if e is None else f"{e:.2f}" for e in entropies]
    return rows


def report(
    runs: Annotated[Sequence[str], Spelling("RUN…")],
    *,
    html: Annotated[str, Spelling("FILE")],
    data: Annotated[str | None, Spelling("DIR")] = None,
    sequence: SequenceLength = 512,
    force: Force = False,
) -> Report:
    """Write a page that compares runs.

    It has curves, held-out losses, loads of experts and alarms; with --data also which tokens go to
    which expert, beside routers that learnt nothing. The page is one file and loads nothing.

    Args:
      runs: Folder that moecc train wrote.
      html: File to write the page to.
      data: Token folder over which the experts are traced.
      sequence: Number of tokens in a sequence of that folder.

    Example:
      moecc report dense sparse --html runs.html --data tokens/heldout
    """
    from moecc.jobs.evaluate import EvaluationSpec
    from moecc.jobs.specialise import specialisation

    check_writable(html, force=force)
    runs = list(dict.fromkeys(runs))
    folders = [read_run(run) for run in runs]
    names = Counter(run.name for run in folders)
    folders = [
        run if names[run.name] == 1 else replace(run, name=path)
        for run, path in zip(folders, runs, strict=True)
    ]
    specialised = {}
    if data is not None:
        spec = EvaluationSpec(seq=sequence, batches=8)
        for path, run in zip(runs, folders, strict=True):
            if run.layers:
                specialised[run.name] = specialisation(path, data, spec)
    write_whole(html, report_page(folders, specialised).encode(), force=force)
    facts = {"html": html, "runs": {run.name: run.facts for run in folders}}
    return Report("report", facts, lambda: f"written to {html}", is_aside=True)
