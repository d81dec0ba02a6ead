"""The page of a plan: what it shows, that it loads nothing, and that a browser shows it whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moecc.cli.main import main

from .browser import BROWSER, MISSING, look


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    command = ["plan", "preset:smollm2-135m", "-p", "upcycle{experts=8 top-k=2}"]
    assert main([*command, "--machine", "gpu:h100:8", "--html", str(path)]) == 0
    return path


def test_it_loads_nothing(page: Path) -> None:
    """No script, style sheet, picture or font of another place; plotly's own code aside."""
    text = re.sub(r"<script>.*?</script>", "", page.read_text("utf-8"), flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', text) == []
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=MISSING)
@pytest.mark.parametrize("width", [1100, 480])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(page: Path, width: int, dark: bool) -> None:
    seen = look(page, width=width, dark=dark)
    assert seen.console == []
    assert seen.probe["outside"] == []
    assert seen.probe["wide"] == []
    assert seen.probe["figures"] == 3
    assert seen.probe["traces"][0] == "legendonly", "a click on the legend hides a trace"
    light = seen.probe["text"] == "rgb(26, 26, 26)"
    assert light == (not dark)
