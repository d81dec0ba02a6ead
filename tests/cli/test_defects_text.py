"""What reaches a terminal, and what a crash leaves."""

import json
import os
import re
from pathlib import Path

import pytest

from moecc.ir.text import parse, print_graph

ESC = "\x1b[31m"

GRAPH = """moecc 1
graph g {
  attr note = "MARK"
  input %x : f32[batch=B, embed=4]
  %y = silu %x : f32[batch=B, embed=4] @layers.0LOC
  output y = %y
}
"""

OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from moecc.rewrite.passes import EXACT, Pass, PassResult

@dataclass(frozen=True)
class BoomPass(Pass):
    """Crash."""
    name: ClassVar[str] = "boom"
    summary: ClassVar[str] = "crash"
    preserves = EXACT
    at: int = 0
    def apply(self, graph, ctx):
        if self.at != ctx.seed:
            return PassResult(changed=False)
        return {}["no such key"]
'''


def test_a_graph_brings_no_escape_sequence_to_the_terminal(moecc, tmp_path):
    file = tmp_path / "g.moe"
    file.write_text(GRAPH.replace("LOC", ESC).replace("MARK", "plain"))
    done = moecc("opt", file)
    assert done.code == 1
    assert "5:49: a control or invisible character" in done.err
    for text in ("\\u001b[31m", "\x9b31m", "\u202e", "\\u202e"):
        file.write_text(GRAPH.replace("MARK", text).replace("LOC", ""), "utf-8")
        done = moecc("opt", file, "--print-after", "all", "-p", "canonicalize", "--remarks")
        assert done.code == 0, done.err
        assert all(c.isprintable() or c == "\n" for c in done.out + done.err)
        assert print_graph(parse(done.out)) == done.out


@pytest.mark.parametrize("command", ["opt", "run"])
def test_a_file_name_brings_no_escape_sequence_to_the_terminal(moecc, tmp_path, command):
    extra = ["--outputs", tmp_path / "o.npy"] if command == "run" else []
    for name in (f"{ESC}.moe", "\u202eeom.moe", "\x9b31m"):
        there = tmp_path / name
        there.write_text("no graph")
        for file in (there, tmp_path / f"absent{name}"):
            done = moecc(command, file, *extra)
            assert done.code in (1, 2)
            assert done.err.replace("\n", "").isprintable()


@pytest.fixture
def boom(tmp_path):
    file = tmp_path / "boom.py"
    file.write_text(OWN)
    return file


def test_a_crash_of_an_own_pass_names_its_line_and_can_be_replayed(
    moecc, dense, boom, tmp_path,
    monkeypatch,
):  # fmt: skip
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    passes = ("-p", "canonicalize,boom{at=7}", "--load", boom, "--seed", "7")
    done = moecc("convert", dense, tmp_path / "out", *passes, "--to", "llama")
    assert done.code == 1, done.err
    assert f"{boom}:16: the pass 2, boom, crashed: KeyError: 'no such key'" in done.err
    assert "bug in moecc" not in done.err
    assert os.listdir() == []
    found = re.search(r"moecc replay (\S+\.moe) --load (\S+\.py) repeats it", done.err)
    boom.unlink()
    again = moecc("replay", found[1], "--load", found[2])
    assert again.code == 1
    assert "crashed: KeyError: 'no such key'" in again.err
    text = Path(found[1]).read_text()
    Path(found[1]).write_text(text.replace('"seed": 7', '"seed": 8'))
    done = moecc("replay", found[1], "--load", found[2], "--format", "json").json()
    assert (done["schema"], done["fails"]) == ("moecc.replay/1", False)
    assert {"pipeline", "failed_in"} < set(done)


def test_a_crash_of_a_pass_of_moecc_is_a_bug_with_a_reproducer(moecc, dense, tmp_path, monkeypatch):
    from moecc_passes.cleanup import DcePass

    def crash(self, graph, ctx):
        raise KeyError("gone")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(DcePass, "apply", crash)
    done = moecc("convert", dense, tmp_path / "out", "-p", "dce", "--to", "llama")
    assert done.code == 70
    found = re.search(r"moecc replay (\S+\.moe)", done.err)
    assert moecc("replay", found[1]).code == 70
    monkeypatch.undo()
    assert moecc("replay", found[1]).code == 0


WRONG = {
    "sys.exit": ("import sys; sys.exit(0)", "crashed: PassExit: SystemExit: 0"),
    "own": ("raise type('Odd', (BaseException,), {})('x')", "crashed: PassExit: Odd: x"),
    "nothing": ("return None", "crashed: TypeError: apply returned NoneType, expected PassResult"),
}


@pytest.mark.parametrize(("body", "words"), WRONG.values(), ids=WRONG)
def test_what_an_own_pass_raises_or_returns_is_its_own(moecc, dense, tmp_path, body, words):
    file, out = tmp_path / "odd.py", tmp_path / "out"
    file.write_text(f"{OWN}\n    def apply(self, graph, ctx):\n        {body}\n")
    done = moecc("convert", dense, out, "-p", "boom", "--load", file, "--to", "llama")
    assert done.code == 1, done.err
    assert re.search(rf"{file}:(18|19): the pass 1, boom, {re.escape(words)}", done.err), done.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "is_absolute"), [("replay", True), ("reduce", False), ("bisect", False)]
)
def test_code_that_only_a_reproducer_names_is_not_run(moecc, boom, tmp_path, command, is_absolute):
    ran = tmp_path / "ran"
    boom.write_text(f"open({str(ran)!r}, 'w').close()\n{OWN}")
    name = str(boom) if is_absolute else boom.name
    stated = json.dumps({"pipeline": "boom", "load": [name]})
    file = tmp_path / "stranger.moe"
    file.write_text(f"# moecc reproducer: x\n# replay: {stated}\n{GRAPH}")
    done = moecc(command, file)
    assert done.code == 1, done.err
    assert "the reproducer needs passes of your own" in done.err
    assert f"--load {boom}" in done.err
    assert not ran.exists()
    loaded = moecc(command, file, "--load", boom)
    assert "needs passes" not in loaded.err
    assert ran.exists()


@pytest.mark.parametrize(
    "stated",
    [
        '{"pipeline": 5, "load": []}',
        '{"pipeline": "dce", "load": [], "seed": 1e400}',
        "[" * 100_000,
    ],
    ids=["pipeline", "infinite", "deep"],
)
def test_hostile_reproducers_are_messages(moecc, tmp_path, stated):
    file = tmp_path / "g.moe"
    file.write_text(f"# moecc reproducer: x\n# replay: {stated}\n{GRAPH}")
    done = moecc("replay", file)
    assert done.code in (1, 2), done.err
    assert re.search("not a reproducer|unknown comparison", done.err)
