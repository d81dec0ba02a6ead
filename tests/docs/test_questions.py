"""Questions of engineers are answered in the pages, by paths of files that there are."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, blocks_of

QUESTIONS = {
    "how do I add an operation": (
        "CONTRIBUTING.md#adding-an-operation",
        (
            "moecc/ir/table/elementwise.py",
            "backends/moecc_backends/reference/elementwise.py",
            "backends/moecc_backends/xla/lower/elementwise.py",
        ),
    ),
    "where is `dispatch` lowered": (
        "docs/lowering.md#where-is-dispatch-lowered",
        ("backends/moecc_backends/xla/lower/dispatch_combine.py",),
    ),
    "who decides the dispatch strategy": (
        "docs/lowering.md#who-decides-the-dispatch-strategy",
        ("backends/moecc_backends/xla/dispatch/choose.py",),
    ),
    "what does a plan assume of overlap": (
        "docs/planning.md#what-a-plan-assumes-of-overlap",
        ("moecc/plan/estimate.py",),
    ),
    "which tests guard a promise": (
        "docs/promises.md",
        ("tests/pipeline/test_check.py", "tests/mutants/test_mutants.py", "tests/docs/"),
    ),
}
"""By question: the link that README gives for it, and the paths that the answer must name."""

READERS_OWN = ("NAME", "FILE", "fold_scale")
"""Files that a reader is going to write."""

ENTRY_POINTS = {"moecc.passes", "moecc.backends"}
"""Groups of entry points, which are spelled as modules are."""

_HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)`")
_SUFFIXES = (".py", ".md", ".json", ".svg", ".png", ".rules", ".toml", ".txt")
_MODULE = re.compile(r"`(moecc(?:_passes|_backends)?(?:\.\w+)+)`")


def section(page: Path, anchor: str) -> str:
    """Return the text under the heading with `anchor`, or the page where there is no anchor."""
    text = page.read_text("utf-8")
    if not anchor:
        return text
    for match in _HEADING.finditer(text):
        if re.sub(r"[^\w\- ]", "", match[2].lower()).replace(" ", "-") == anchor:
            after = text[match.end() :]
            following = re.search(rf"^#{{1,{len(match[1])}}} ", after, re.MULTILINE)
            return after[: following.start()] if following else after
    raise AssertionError(f"{page.name} has no heading #{anchor}")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_by_path(question: str) -> None:
    link, paths = QUESTIONS[question]
    name, _, anchor = link.partition("#")
    answer = section(ROOT / name, anchor)
    assert [p for p in paths if f"`{p}`" not in answer] == []
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("question", QUESTIONS)
def test_readme_leads_to_the_answer(question: str) -> None:
    assert f"]({QUESTIONS[question][0]})" in section(ROOT / "README.md", "the-tour")


def test_every_promise_names_a_test() -> None:
    rows = re.findall(
        r"^\| (?!promise|-)(.*?) \| (.*) \|$", section(ROOT / "docs/promises.md", ""), re.M
    )
    assert len(rows) > 20
    guards = ("`tests/", "`benchmarks/", "routing.md#the-papers-numbers")
    assert [promise for promise, by in rows if not any(g in by for g in guards)] == []


@cache
def files() -> tuple[str, ...]:
    """Return the paths of the files that belong to the repository."""
    tops = (
        "moecc", "passes", "backends", "tests", "docs", "examples", "experiments", "benchmarks",
    )  # fmt: skip
    found = [p for top in tops for p in (ROOT / top).rglob("*") if "__pycache__" not in p.parts]
    found += [p for p in ROOT.iterdir() if p.is_file()]
    return tuple(f"/{p.relative_to(ROOT).as_posix()}" for p in found)


def prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    text = page.read_text("utf-8")
    for block in blocks_of(page):
        text = text.replace(block.text, "")
    return text


def is_there(path: str) -> bool:
    """Whether `path` is in the repository, from its root or from a folder below."""
    return any(name.endswith(f"/{path.rstrip('/')}") for name in files())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_of_sources_are_there(page: Path) -> None:
    named = {p for p in _PATH.findall(prose(page)) if p.endswith(_SUFFIXES) and "/" in p}
    named = {p for p in named if not any(own in p for own in READERS_OWN)}
    assert {p for p in named if not is_there(p)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_modules_are_there(page: Path) -> None:
    named = set(_MODULE.findall(prose(page))) - ENTRY_POINTS
    assert {m for m in named if not is_module(m)} == set()


def is_module(name: str) -> bool:
    """Whether `name` is a module, or something that a module or package says by that name."""
    package, *rest = name.split(".")
    folder = {"moecc_passes": "passes/", "moecc_backends": "backends/"}.get(package, "") + package
    for cut in range(len(rest), -1, -1):
        path = "/".join((folder, *rest[:cut]))
        source = next((f for f in (f"{path}.py", f"{path}/__init__.py") if (ROOT / f).exists()), "")
        if source:
            text = (ROOT / source).read_text("utf-8")
            return all(re.search(rf"\b{word}\b", text) for word in rest[cut:])
    return False


def test_what_is_not_there_is_found() -> None:
    assert not is_there("moecc/ir/kept.py")
    assert not is_module("moecc.ir.kept")
    assert not is_module("moecc.launch.process_info.place_of")
    assert is_there("lower/elementwise.py")
    assert is_module("moecc.ir.fingerprint")
