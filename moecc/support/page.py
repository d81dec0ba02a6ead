"""Pages of HTML: one template engine, which escapes every value, and pages that load nothing."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING

from moecc.support.extras import require
from moecc.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment
    from plotly.graph_objects import Figure

    from moecc.support.untyped import JsonDict


def render(template: str, **values: object) -> str:
    """Return a template of ``moecc/support/templates`` filled with values, which are escaped."""
    text = _environment().get_template(template).render(values)
    # JSON can state half of a surrogate pair, which no file of UTF-8 holds.
    return text.encode("utf-8", "backslashreplace").decode()


def render_page(
    template: str, title: str, *, scripts: Iterable[str] = (), figures: bool = False,
    **values: object,
) -> str:  # fmt: skip
    """Return a page whose content-security policy permits its own scripts and no connection.

    Args:
      template: the name of a template that extends ``page.html``.
      title: the title and heading.
      scripts: names of script files beside the templates.
      figures: whether the page draws figures, which needs plotly.
      values: the values of the template, which are escaped.

    Raises:
      MachineError: plotly is missing.
    """
    sources = [_source(name) for name in scripts]
    if figures:
        require_figures()
        sources = [_plotly(), _source("figures.js"), *sources]
    hashes = [b64encode(sha256(source.encode()).digest()).decode() for source in sources]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    # Plotly sets styles in attributes and in elements of its own.
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return render(
        template, title=title, policy=policy, scripts=sources, version=__version__, **values
    )


def require_figures() -> None:
    """Raise MachineError if plotly, which draws figures, is missing."""
    require("a page", ("report",))


def drawing(figure: Figure, title: str, height: int, x_title: str = "") -> JsonDict:
    """Return a figure as JSON values for the ``figure`` macro, as wide as the page.

    Args:
      figure: the figure of plotly.
      title: its title.
      height: in pixels.
      x_title: the title of the horizontal axis.
    """
    import json

    figure.update_layout(
        title=title, height=height, template="plotly_white", xaxis_title=x_title,
        margin={"l": 60, "r": 20, "t": 60, "b": 45},
    )  # fmt: skip
    return {
        name: _escaped(value) for name, value in json.loads(figure.to_json(engine="json")).items()
    }


def _escaped(value: object) -> object:
    """Return JSON values with every string escaped: plotly reads texts as markup of its own."""
    if isinstance(value, str):
        return escape(value, quote=False)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return value


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("moecc.support"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text
