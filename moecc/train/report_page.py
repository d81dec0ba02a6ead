"""One self-contained page that compares runs: curves, loads of experts, specialisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from moecc.support.page import figure_html, page, require_figures
from moecc.support.untyped import Json
from moecc.train.run_series import CURVES, ROUTER_CURVES, RunSeries, Series

Layers = Sequence[Json]
"""What ``moecc specialise`` says of the layers of a model, as JSON values."""


def report_page(runs: Sequence[RunSeries], specialised: Mapping[str, Layers]) -> str:
    """Return the page, which loads nothing from anywhere.

    Args:
      runs: what is compared.
      specialised: by the name of a run: which tokens went to which expert.

    Raises:
      MachineError: plotly is missing.
    """
    require_figures()
    title = " · ".join(run.name for run in runs)
    body = [_facts(runs), *_alarms(runs), *_curves(runs), *_held_out(runs), *_routers(runs),
            *_tables(specialised)]  # fmt: skip
    return page(title, body)


def _facts(runs: Sequence[RunSeries]) -> str:
    rows = ["<tr><th></th>" + "".join(f"<th>{escape(r.name)}</th>" for r in runs) + "</tr>"]
    for name in runs[0].facts:
        cells = "".join(f"<td>{escape(run.facts.get(name, ''))}</td>" for run in runs)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _alarms(runs: Sequence[RunSeries]) -> Iterator[str]:
    found = [f"{run.name}: {alarm}" for run in runs for alarm in run.alarms()]
    if found:
        yield "<h2>Alarms</h2><ul>"
        yield from (f'<li class="alarm">{escape(text)}</li>' for text in found)
        yield "</ul>"


def _curves(runs: Sequence[RunSeries]) -> Iterator[str]:
    yield "<h2>Training</h2>"
    for name, title in CURVES.items():
        lines = {run.name: s for run in runs if (s := run.scalar(name)) is not None}
        if lines:
            yield _lines(title, lines)


def _held_out(runs: Sequence[RunSeries]) -> Iterator[str]:
    texts = dict.fromkeys(name for run in runs for name in run.held_out)
    if texts:
        yield "<h2>Held-out text</h2>"
    for text in texts:
        lines = {run.name: run.held_out[text] for run in runs if text in run.held_out}
        yield _lines(f"Loss on {text}, nats a token", lines, markers=True)


def _routers(runs: Sequence[RunSeries]) -> Iterator[str]:
    for run in runs:
        if not run.layers:
            continue
        yield f"<h2>Experts of {escape(run.name)}</h2>"
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
            title = "Distance of experts: 0 for copies"
            yield _lines(title, spreads, markers=True)


def _loads(run: RunSeries) -> str:
    """Return a heat map: a row an expert of a layer, its load over an even one."""
    from plotly import graph_objects

    rows, names, steps = [], [], np.zeros(0)
    for layer in run.layers:
        found = run.of_layer(layer, "loads")
        if found is None:
            continue
        steps = found.steps
        rows += [*(found.values * found.values.shape[1]).T]
        names += [f"{layer} · {expert}" for expert in range(found.values.shape[1])]
    heat = graph_objects.Heatmap(
        x=steps, y=names, z=np.array(rows), colorscale="Viridis", zmin=0, zmax=2,
        colorbar={"title": "× even"},
    )  # fmt: skip
    figure = graph_objects.Figure(heat)
    figure.update_yaxes(autorange="reversed")
    title = "Load of each expert over an even load"
    return figure_html(figure, title, 160 + 16 * len(names), "step")


def _lines(title: str, lines: Mapping[str, Series], *, markers: bool = False) -> str:
    from plotly import graph_objects

    mode = "lines+markers" if markers else "lines"
    figure = graph_objects.Figure(
        [
            graph_objects.Scatter(x=s.steps, y=s.values, name=name, mode=mode, showlegend=True)
            for name, s in lines.items()
        ]
    )
    # Beside the curves it would take half of a narrow page.
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return figure_html(figure, title, 360, "step")


def _tables(specialised: Mapping[str, Layers]) -> Iterator[str]:
    for name, layers in specialised.items():
        yield f"<h2>Which tokens go to which expert of {escape(name)}</h2>"
        yield (
            "<p>How much of the first choice the token alone explains; an untrained router also "
            "sends like tokens to like experts.</p>"
        )
        yield from _explained(layers)
        for layer in layers:
            yield _experts(layer)


def _explained(layers: Layers) -> Iterator[str]:
    heads = "layer", "trained", "untrained", "by chance", "entropy of sentinels", "of others"
    yield f"<table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>"
    for layer in layers:
        shares = (layer["explained"], layer["untrained"], layer["by_chance"])
        entropies = (layer["sentinel_entropy"], layer["other_entropy"])
        cells = [f"{share:.0%}" for share in shares]
        cells += ["" if e is None else f"{e:.2f}" for e in entropies]
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        yield f"<tr><td>{escape(str(layer['layer']))}</td>{numbers}</tr>"
    yield "</table>"


def _experts(layer: Json) -> str:
    rows = [f"<tr><th>{escape(str(layer['layer']))}</th><th>share</th><th>tokens</th></tr>"]
    for number, expert in enumerate(layer["experts"]):
        tokens = " ".join(
            f"<code>{escape(str(t['token']))}</code> {t['part']:.0%}" for t in expert["tokens"]
        )
        share = f'<td class="n">{expert["share"]:.0%}</td>'
        rows.append(f"<tr><td>{number}</td>{share}<td>{tokens}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
