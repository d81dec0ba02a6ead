"""A page of HTML that loads nothing: figures of plotly and tables, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from moecc.support.extras import require
from moecc.version import __version__

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --ground: #fff; --line: #ddd; --soft: #f4f4f4;
  --alarm: #a40000 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --ground: #15181c; --line: #3a3f45;
  --soft: #24292f; --alarm: #ff8a80 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: var(--text); background: var(--ground) }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left;
  vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.alarm { color: var(--alarm) } code { background: var(--soft); padding: 0 .2rem }
.figure, .wide { overflow-x: auto }
"""

# Plotly writes its colours into the figure, so they are set again for a dark page.
_THEME = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function recolour() {
  const text = dark.matches ? "#e6e6e6" : "#1a1a1a", line = dark.matches ? "#3a3f45" : "#e5e5e5";
  for (const each of document.querySelectorAll(".js-plotly-plot")) {
    const change = { "font.color": text, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)" };
    for (const axis of Object.keys(each.layout).filter(k => /^[xy]axis/.test(k))) {
      change[axis + ".gridcolor"] = line; change[axis + ".zerolinecolor"] = line;
      change[axis + ".linecolor"] = line;
    }
    Plotly.relayout(each, change);
  }
}
addEventListener("load", recolour); dark.addEventListener("change", recolour);
"""


def page(
    title: str, body: Iterable[str], *, figures: bool = True, style: str = "", script: str = ""
) -> str:
    """Return a page with a title and the parts of its body, which are HTML.

    Args:
      title: the title.
      body: the parts.
      figures: whether there are figures among them, which need plotly.
      style: rules beside those of every page.
      script: what runs behind the body.

    Raises:
      MachineError: plotly is missing.
    """
    if figures:
        require_figures()
    scripts = [_plotly(), _THEME] if figures else []
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">', f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{style}</style>", *(f"<script>{each}</script>" for each in scripts),
        "</head><body>", f"<h1>{escape(title)}</h1>", *body, f"<p>moecc {escape(__version__)}</p>",
        f"<script>{script}</script>" if script else "", "</body></html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def require_figures() -> None:
    """Raise MachineError if plotly, which draws figures, is missing."""
    require("a page", ("report",))


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text


def figure_html(figure: Figure, title: str, height: int, x_title: str = "") -> str:
    """Return a figure as a part of a page, as wide as the page."""
    figure.update_layout(
        title=title, height=height, template="plotly_white", xaxis_title=x_title,
        margin={"l": 60, "r": 20, "t": 60, "b": 45},
    )  # fmt: skip
    # The bar of tools would lie over the title of a narrow page; dragging zooms without it.
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, include_mathjax=False,
        config={"responsive": True, "displayModeBar": False},
    )  # fmt: skip
    return f'<div class="figure">{text}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Return a table of texts, which are escaped.

    Args:
      heads: of the columns; empty ones for a table without a head.
      rows: the cells.
      numbers: the columns that hold numbers.
    """
    right = set(numbers)

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if at in right else ''}>{escape(text)}</{tag}>"
            for at, text in enumerate(texts)
        )

    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'
