"""A real browser without a window: what it says of a page that it has run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.pages import with_probe

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
MISSING = "no Chromium: apt-get install chromium"

# Texts outside of their boxes, parts outside of the window, and what clicks and keys change.
_PROBE = """
addEventListener("load", () => setTimeout(() => {
  const found = {outside: [], wide: [], traces: [], links: 0, title: document.title};
  const scrolls = e => e.closest(".figure, .wide");
  for (const e of document.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect();
    if (box.width && !scrolls(e) && box.right > innerWidth + 1)
      found.wide.push(e.tagName + ": " + (e.textContent || "").slice(0, 40));
  }
  for (const svg of document.querySelectorAll("svg.main-svg")) {
    const around = svg.getBoundingClientRect();
    for (const t of svg.querySelectorAll("text")) {
      const box = t.getBoundingClientRect();
      if (box.width && (box.left < around.left - 1 || box.right > around.right + 1 ||
          box.top < around.top - 1 || box.bottom > around.bottom + 1))
        found.outside.push(t.textContent.slice(0, 40));
    }
  }
  const name = document.querySelector("h1");
  found.text = getComputedStyle(name).color;
  found.ground = getComputedStyle(document.body).backgroundColor;
  found.tables = document.querySelectorAll("table").length;
  found.figures = document.querySelectorAll(".js-plotly-plot").length;
  const fold = document.querySelector("details > summary");
  if (fold) {
    fold.click();
    found.unfolds = fold.parentElement.open;
    fold.focus();
    found.focused = document.activeElement === fold;
  }
  const find = document.querySelector("input[type=search]");
  if (find) {
    find.value = "ROUTE";
    find.dispatchEvent(new Event("input"));
    const nodes = [...document.querySelectorAll(".node")].filter(e => e.offsetParent !== null);
    found.searched = nodes.map(e => e.textContent);
    for (const e of document.querySelectorAll("body *")) {
      const box = e.getBoundingClientRect();
      if (box.width && !scrolls(e) && box.right > innerWidth + 1)
        found.wide.push(e.tagName + ": " + (e.textContent || "").slice(0, 40));
    }
  }
  const plot = [...document.querySelectorAll(".js-plotly-plot")].find(p => p.data.length > 1);
  const done = () => {
    document.body.setAttribute("data-probe", JSON.stringify(found));
  };
  if (!plot) return done();
  Plotly.restyle(plot, {visible: "legendonly"}, [0]).then(() => {
    found.traces = plot._fullData.map(d => d.visible);
    done();
  });
}, 500));
"""


@dataclass(frozen=True)
class Seen:
    """What a browser found of a page.

    Attributes:
      console: the errors that the page logged.
      probe: what the probe found.
    """

    console: list[str]
    probe: dict[str, Any]


def look(page: Path, *, width: int, dark: bool, shot: Path | None = None) -> Seen:
    """Open a page in a window of some width and run the probe in it."""
    probed = page.with_name(f"probed-{page.name}")
    probed.write_text(with_probe(page.read_text("utf-8"), _PROBE), "utf-8")
    done = _chromium(probed, width, dark, "--dump-dom", "--enable-logging=stderr", "--v=0")
    if shot is not None:
        _chromium(page, width, dark, f"--screenshot={shot}")
    (found,) = re.findall(r'data-probe="([^"]*)"', done.stdout) or ["{}"]
    text = found.replace("&quot;", '"').replace("&gt;", ">").replace("&lt;", "<")
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(errors, json.loads(text.replace("&amp;", "&")))


def _chromium(page: Path, width: int, dark: bool, *more: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None, "asked before"
    theme = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0") if dark else ()
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},2400",
        "--virtual-time-budget=8000", "--host-resolver-rules=MAP * ~NOTFOUND", *theme, *more,
        page.resolve().as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
