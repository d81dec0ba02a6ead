"""Where passes come from: installed packages and files of the user's own."""

import pytest

from moecc.errors import UsageError
from moecc.rewrite.pipeline import Pipeline, Registry, installed

from .samples import REGISTRY, TopPass

OWN = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.rewrite.passes import EXACT, Context, Pass, PassResult


@dataclass(frozen=True)
class MinePass(Pass):
    """Do nothing."""

    name: ClassVar[str] = "{name}"
    summary: ClassVar[str] = "do nothing"
    preserves = EXACT
    times: int | None = None

    def apply(self, graph, ctx: Context) -> PassResult:
        return PassResult(changed=False)
'''


def own(folder, name="mine", more=""):
    path = folder / f"own_{name}.py"
    path.write_text(OWN.format(name=name) + more, encoding="utf-8")
    return path


def test_the_passes_of_moecc_come_through_the_entry_point():
    registry = installed()
    assert {"canonicalize", "cse", "dce", "upcycle"} <= set(registry.names())
    assert registry.origins["dce"] == "moecc"
    assert all(registry.get(name).name == name for name in registry.names())


def test_a_file_of_ones_own(tmp_path):
    registry = REGISTRY.with_file(own(tmp_path))
    pipeline = Pipeline.parse("top,mine{times=3}", registry)
    assert str(pipeline) == "top,mine{times=3}"
    assert registry.origins["mine"].endswith("own_mine.py")
    assert "mine" not in REGISTRY


def test_a_name_that_is_taken(tmp_path):
    with pytest.raises(UsageError, match="'top' is defined twice") as caught:
        REGISTRY.with_file(own(tmp_path, "top"))
    assert "another in the tests" in str(caught.value)
    with pytest.raises(UsageError, match="'x' is defined twice"):
        Registry({"x": lambda: TopPass}, {"x": "a"}).extended({"x": lambda: TopPass}, "b")


def test_unknown_names():
    with pytest.raises(UsageError, match="did you mean 'top'"):
        REGISTRY.get("topp")
    with pytest.raises(UsageError, match="passes: bad, every-kind"):
        REGISTRY.get("qqqqqq")


def refused(path, expected):
    with pytest.raises(UsageError, match=expected):
        REGISTRY.with_file(path)


def test_faulty_files_are_blamed_with_their_line(tmp_path):
    refused(tmp_path / "none.py", "no such file")
    path = tmp_path / "faulty.py"
    path.write_text("x = 1\n", encoding="utf-8")
    refused(path, "defines no pass")
    path.write_text("x = 1\ny = (\n", encoding="utf-8")
    refused(path, r"faulty\.py:2: SyntaxError")
    path.write_text("def f():\n    return nothing\n\nf()\n", encoding="utf-8")
    refused(path, r"faulty\.py:2: NameError: name 'nothing'")
    path.write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    refused(path, r"faulty\.py:2: SystemExit: 0")
    path.write_text("x = 1\nraise GeneratorExit\n", encoding="utf-8")
    refused(path, r"faulty\.py:2: GeneratorExit")
    path.write_text("class E(Exception):\n    __str__ = None\nraise E\n", encoding="utf-8")
    refused(path, r"faulty\.py:3: E: its text raises TypeError")
    refused(own(tmp_path, "bad-pattern", "\nfrom moecc.rewrite import P\nP.add(P.any())\n"), "a, b")
    text = tmp_path / "faulty.txt"
    text.write_text("", encoding="utf-8")
    refused(text, "not a Python file")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("@dataclass(frozen=True)\n", "", "is not a dataclass"),
        ('    summary: ClassVar[str] = "do nothing"\n', "", "it has no summary"),
        ("    preserves = EXACT\n", "", "it does not define preserves"),
        ("def apply", "def applied", "it does not define apply"),
        ("int | None", "list[int]", "option 'times' has a type without a text form: list"),
        ("int | None", "tuple[()]", "without a text form"),
        ("int | None", "Nothing", "an annotation cannot be resolved: name 'Nothing'"),
        ('"mine"', '"My Pass"', "is not in kebab-case"),
    ],
)
def test_faulty_classes(tmp_path, old, new, expected):
    path = own(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    refused(path, expected)
