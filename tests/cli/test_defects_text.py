"""What reaches a terminal, and what a crash leaves."""

import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

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


def test_a_graph_brings_no_escape_sequence_to_the_terminal(cli, tmp_path):
    file = tmp_path / "g.moe"
    file.write_text(GRAPH.replace("LOC", ESC).replace("MARK", "plain"))
    cli("opt", file, code=1, says="5:49: a control or invisible character")
    for text in ("\\u001b[31m", "\x9b31m", "\u202e", "\\u202e"):
        file.write_text(GRAPH.replace("MARK", text).replace("LOC", ""), "utf-8")
        done = cli("opt", file, "--print-after", "all", "-p", "canonicalize", "--remarks")
        assert all(c.isprintable() or c == "\n" for c in done.out + done.err)
        assert print_graph(parse(done.out)) == done.out


@pytest.mark.parametrize("command", ["opt", "run"])
def test_a_file_name_brings_no_escape_sequence_to_the_terminal(cli, tmp_path, command):
    extra = ["--outputs", tmp_path / "o.npy"] if command == "run" else []
    for name in (f"{ESC}.moe", "\u202eeom.moe", "\x9b31m"):
        (tmp_path / name).write_text("no graph")
        for file in (name, f"absent{name}"):
            done = cli(command, tmp_path / file, *extra, code=(1, 2))
            assert done.err.replace("\n", "").isprintable()


@pytest.fixture
def boom(tmp_path):
    file = tmp_path / "boom.py"
    file.write_text(OWN)
    return file


def test_a_crash_of_an_own_pass_names_its_line_and_can_be_replayed(
    cli, dense, boom, tmp_path, out, monkeypatch
):
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    crash = "crashed: KeyError: 'no such key'"
    done = cli.convert(
        dense, out, "--load", boom, "--seed", "7", pipeline="canonicalize,boom{at=7}", to="llama",
        code=1, says=f"{boom}:16: the pass 2, boom, {crash}",
    )  # fmt: skip
    assert "bug in moecc" not in done.err
    assert os.listdir() == []
    command = r"moecc replay (\S+\.moe) --load (\S+\.py) repeats it"
    graph, own = re.search(command, done.err).groups()
    boom.unlink()
    cli("replay", graph, "--load", own, code=1, says=crash)
    Path(graph).write_text(Path(graph).read_text().replace('"seed": 7', '"seed": 8'))
    report = cli.json("replay", graph, "--load", own)
    assert (report["schema"], report["fails"]) == ("moecc.replay/1", False)
    assert {"pipeline", "failed_in"} < set(report)


def test_a_crash_of_a_pass_of_moecc_is_a_bug_with_a_reproducer(
    cli, dense, tmp_path, out, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("moecc_passes.cleanup.DcePass.apply", Mock(side_effect=KeyError("gone")))
    done = cli.convert(dense, out, pipeline="dce", to="llama", code=70)
    graph = re.search(r"moecc replay (\S+\.moe)", done.err)[1]
    cli("replay", graph, code=70)
    monkeypatch.undo()
    cli("replay", graph)


WRONG = {
    "sys.exit": ("import sys; sys.exit(0)", "crashed: PassExit: SystemExit: 0"),
    "own": ("raise type('Odd', (BaseException,), {})('x')", "crashed: PassExit: Odd: x"),
    "nothing": ("return None", "crashed: TypeError: apply returned NoneType, expected PassResult"),
}


@pytest.mark.parametrize(("body", "words"), WRONG.values(), ids=WRONG)
def test_what_an_own_pass_raises_or_returns_is_its_own(cli, dense, tmp_path, out, body, words):
    file = tmp_path / "odd.py"
    file.write_text(f"{OWN}\n    def apply(self, graph, ctx):\n        {body}\n")
    done = cli.convert(dense, out, "--load", file, pipeline="boom", to="llama", code=1)
    assert re.search(rf"{file}:(18|19): the pass 1, boom, {re.escape(words)}", done.err), done.err
    assert not out.exists()


def reproducer(folder, stated):
    """Write the graph as what makes a failure that is stated, and return its file."""
    file = folder / "stranger.moe"
    file.write_text(f"# moecc reproducer: x\n# replay: {stated}\n{GRAPH}")
    return file


@pytest.mark.parametrize(
    ("command", "is_absolute"), [("replay", True), ("reduce", False), ("bisect", False)]
)
def test_code_that_only_a_reproducer_names_is_not_run(cli, boom, tmp_path, command, is_absolute):
    ran = tmp_path / "ran"
    boom.write_text(f"open({str(ran)!r}, 'w').close()\n{OWN}")
    name = str(boom) if is_absolute else boom.name
    stated = json.dumps({"pipeline": "boom", "load": [name]})
    file = reproducer(tmp_path, stated)
    says = ("the reproducer needs passes or operations of your own", f"--load {boom}")
    cli(command, file, code=1, says=says)
    assert not ran.exists()
    assert "needs passes" not in cli(command, file, "--load", boom, code=(0, 1)).err
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
def test_hostile_reproducers_are_messages(cli, tmp_path, stated):
    done = cli("replay", reproducer(tmp_path, stated), code=(1, 2))
    assert re.search("not a reproducer|unknown comparison", done.err)
