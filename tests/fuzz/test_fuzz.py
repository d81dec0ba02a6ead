"""The rig finds what it is for, and inputs that once broke something break nothing any more."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moecc.errors import InputError, MoeccError

from . import prove, rig
from .grammars import GRAMMARS, Grammar
from .rig import Fuzzer, minimised, same_failure

ROOT = Path(__file__).parents[2]
CORPUS = json.loads((Path(__file__).parent / "corpus" / "found.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CORPUS, ids=lambda c: f"{c['grammar']}-{c['was'][:30]}")
def test_what_once_was_found_is_an_error_of_moecc_or_none(case):
    grammar = GRAMMARS[case["grammar"]]
    data = bytes.fromhex(case["hex"]) if "hex" in case else case["text"].encode("utf-8")
    try:
        grammar.run(data * int(case.get("times", 1)))
    except MoeccError:
        return


@pytest.mark.parametrize("name", GRAMMARS)
def test_seeds_are_valid_and_mutants_break_nothing(name):
    grammar = GRAMMARS[name]
    rejected = 0
    for seed in grammar.seeds():
        try:
            grammar.run(seed)
        except MoeccError:
            rejected += 1
    assert rejected < len(grammar.seeds())
    fuzzer = Fuzzer(grammar, seed=0)
    fuzzer.run(40)
    assert fuzzer.tally.executions == 40
    assert fuzzer.failures == {}


def planted(data):
    if b"!!" in data:
        raise KeyError("planted")
    if data.startswith(b"loop"):
        while True:
            pass
    raise InputError("no")


def fuzzer_of(inputs):
    left = list(inputs)

    def mutate(rng, data, others):
        return left.pop()

    return Fuzzer(Grammar("planted", lambda: [b"x"], mutate, planted), seed=0)


def test_crashes_and_hangs_are_found_and_made_small(monkeypatch):
    monkeypatch.setattr(rig, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(rig, "BOMB_SHARE", 0.0)
    fuzzer = fuzzer_of([b"plain", b"loop", b"some text !! and more of it"])
    fuzzer.run(3)
    assert fuzzer.tally.rejected["InputError"] == 1
    crash, hang = sorted(fuzzer.failures.values(), key=lambda f: "Hang" in f.signature)
    assert "KeyError" in crash.signature
    assert "Hang" in hang.signature
    small = minimised(crash.data, lambda d: same_failure(fuzzer.grammar, crash.signature, d))
    assert small == b"!!"


def test_a_proof_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Parts that are there are not run again, and their counts are added."""
    planned = prove.parts(executions=5 * 20, commands=0)
    assert [p.grammar for p in planned[: len(GRAMMARS)]] == list(GRAMMARS)
    part = replace(planned[0], size=7)
    monkeypatch.chdir(ROOT)
    first = prove.run_part(part, tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    assert prove.run_part(part, tmp_path) == first
    found = prove.summary([(part, first), (replace(part, seed=1), first)])
    assert found["executions"] == found["grammars"][part.grammar]["executions"] == 14
    assert found["grammars"][part.grammar]["seeds"] == [0, 1]
    assert found["failures"] == []


VALID = """
from pathlib import Path
from tests.fuzz import command_line
from tests.fuzz.grammars import GRAMMARS
from tests.fuzz.mutate import Rng

command_line.mutant = lambda rng, name: GRAMMARS[name].seeds()[0]
for kind in ("inspect .moe", "opt .moe", "run --inputs", "plan --rules", "inspect gguf"):
    folder = Path(kind.replace(" ", "-")).absolute()
    folder.mkdir()
    ended = command_line.run_command(command_line.KINDS[kind](Rng(0), folder), folder)
    assert ended.code in (0, 1), (kind, ended.text)
"""


def in_a_process(folder, *words):
    """Run Python apart: commands are forks, and this process may have the threads of jax."""
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, "PYTHONPATH": places},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_read_the_files_that_are_spoilt(tmp_path):
    """With a valid file in place of a spoilt one, no command ends at its words."""
    in_a_process(tmp_path, "-c", VALID)


def test_hostile_commands_break_nothing(tmp_path):
    counts = tmp_path / "counts.json"
    in_a_process(
        tmp_path, "-m", "tests.fuzz", "--command-line", "12", "--seed", "5", "--json", str(counts)
    )
    found = json.loads(counts.read_text("utf-8"))
    assert (found["commands"], found["failures"]) == (12, 0)
