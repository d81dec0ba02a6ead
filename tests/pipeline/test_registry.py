"""Where passes come from: installed packages and files of the user's own."""

from pathlib import Path
from unittest.mock import patch

import pytest

from moecc.errors import UsageError
from moecc.ir import OPS
from moecc.rewrite.passes import PassCrash
from moecc.rewrite.pipeline import Pipeline, Registry, installed

from .samples import REGISTRY, TopPass

OWN = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecc.rewrite import P, Rule
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Preserves


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


def own(folder, name="mine"):
    path = folder / f"own_{name}.py"
    path.write_text(OWN.format(name=name), encoding="utf-8")
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
    assert registry.with_file(tmp_path / "own_mine.py").names() == registry.names()


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
    with pytest.raises(UsageError, match="passes: none is installed, so install moecc again; if"):
        Registry({}, {}).get("dce")


def refused(path, expected):
    with pytest.raises(UsageError, match=expected):
        REGISTRY.with_file(path)


def test_what_validate_returns_is_checked(tmp_path):
    path = own(tmp_path)
    path.write_text(f"{path.read_text()}\n    def validate(self):\n        return ['odd times']\n")
    with pytest.raises(PassCrash, match="'odd times' is no Problem") as caught:
        Pipeline.parse("mine", REGISTRY.with_file(path))
    assert caught.value.exit_code == 1


FAULTY = {
    "no pass": ("x = 1\n", "defines no pass"),
    "syntax": ("x = 1\ny = (\n", r"faulty\.py:2: SyntaxError"),
    "a name": ("def f():\n    return nothing\n\nf()\n", r"faulty\.py:2: NameError: name 'nothing'"),
    "an exit": ("import sys\nsys.exit(0)\n", r"faulty\.py:2: SystemExit: 0"),
    "an exit of a generator": ("x = 1\nraise GeneratorExit\n", r"faulty\.py:2: GeneratorExit"),
    "no text": (
        "class E(Exception):\n    __str__ = None\nraise E\n",
        r"faulty\.py:3: E: its text raises TypeError",
    ),
    "an expression": (
        "from moecc.weights.arithmetic import Scale\nclass Mine(Scale):\n    pass\n",
        r"faulty\.py:2: TypeError: Mine is a weight expression of its own(.|\n)* compose those of",
    ),
    "a pattern": ("from moecc.rewrite import P\nP.add(P.any())\n", "a, b"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTY)
def test_faulty_files_are_blamed_with_their_line(tmp_path, case):
    text, expected = FAULTY[case]
    path = tmp_path / "faulty.py"
    path.write_text(text, encoding="utf-8")
    refused(path, expected)


LIBRARY = """
from moecc.ir.operation import Op, operation

@operation("mine", "x")
class MineOp(Op):
    infer = staticmethod(lambda x: x.type)
"""


def test_a_file_that_is_loaded_and_imported(tmp_path, monkeypatch):
    library, user = tmp_path / "own_library.py", tmp_path / "user.py"
    library.write_text(LIBRARY, encoding="utf-8")
    user.write_text(f"{OWN.format(name='mine')}\nimport {library.stem}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(OPS):
        REGISTRY.with_file(library)
        refused(
            user, r"user\.py:\d+: .* is loaded and imported: leave out --load .*own_library\.py"
        )
    with patch.dict(OPS):
        assert "mine" in REGISTRY.with_file(user)


def test_the_line_of_a_file_that_is_named_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY["an exit"][0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    refused(Path("./faulty.py"), r"faulty\.py:2: SystemExit: 0")


def test_what_is_no_python_file(tmp_path):
    refused(tmp_path / "none.py", "no such file")
    text = tmp_path / "faulty.txt"
    text.touch()
    refused(text, "not a Python file")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("@dataclass(frozen=True)\n", "", "is not a dataclass"),
        ('    summary: ClassVar[str] = "do nothing"\n', "", "it has no summary"),
        ("    preserves = EXACT\n", "", "it does not define preserves"),
        (
            "= EXACT",
            "= Preserves('exakt')",
            r"mine\.py:17: .* no promise; did you mean 'exact'",
        ),
        ("= EXACT", "= 'exact'", r"preserves 'exact', which is no promise: Preserves\("),
        ("= EXACT", "= Rule('r', P.neg(P.any()), min, preserves='real')", "promises: exact, reas"),
        ('    name: ClassVar[str] = "mine"\n', "", r"own_mine\.py, MinePass: the pass has no name"),
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
