"""The page of a plan: what it shows, that it loads nothing, and that a browser shows it whole."""

import re

import pytest

from moecc.cli.main import main


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "plan.html"
    command = ["plan", "preset:smollm2-135m", "-p", "upcycle{experts=8 top-k=2}"]
    assert main([*command, "--machine", "gpu:h100:8", "--html", str(path)]) == 0
    return path


def test_it_loads_nothing(page):
    """No script, style sheet, picture or font of another place; plotly's own code aside."""
    text = re.sub(r"<script>.*?</script>", "", page.read_text("utf-8"), flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', text) == []
    assert "@import" not in text
    assert "url(" not in text
