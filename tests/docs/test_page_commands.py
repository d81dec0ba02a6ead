"""The commands of the other pages: every one is parsed, and each is run in one test or another.

Names of models, texts and runs stand for small ones; steps of a training are few.
"""

import re
import shlex
from importlib.util import find_spec
from itertools import pairwise

import pytest

from moecc.cli.main import build_app
from moecc.rewrite.pipeline import Pipeline

from .pages import PAGES, ROOT, blocks_of
from .sessions import AS
from .stands import FEW, SMALL, run

ELSEWHERE = ("tour.md", "jobs.md", "proving.md")
"""Their sessions are run, and compared with what they print: test_tour.py."""

IN_A_CLONE = re.compile(r"make |pip |python examples/|\. \.venv")
"""What installs and downloads: test_in_a_clone.py."""

OF_TPUS = re.compile(r"moecc compile .*tpu:")
"""What needs the compiler of TPUs."""

KILLED = re.compile(r"moecc (convert SOURCE .*?) +# killed")
"""A command that is killed."""

STANDS = {"$(python examples/downloads.py)": "SmolLM2-135M", "make install && ": "true # "}


ALONE = {"sparse": "README.md", "smollm2-8x": "launch.md", "tokens": "runs.md"}
"""Stands that other pages make themselves."""


def lines(page):
    """Yield the commands of a page, continued lines joined."""
    for block in blocks_of(page):
        if block.info not in ("bash", "console"):
            continue
        joined = block.text.replace("\\\n", " ").splitlines()
        prompted = block.info == "console"
        if prompted and page.name == "README.md":
            continue  # compared with what it prints, as those of `ELSEWHERE`
        yield from (
            line.removeprefix("$ ")
            for line in joined
            if line.strip() and (line.startswith("$ ") or not prompted)
        )


OTHERS = [page for page in PAGES if page.name not in ELSEWHERE and any(lines(page))]


def words(line):
    """Yield the arguments of each command of moecc in a line; a pipe has several."""
    split = shlex.split(line.replace("$MODEL", "MODEL"), comments=True)
    command = []
    for word in [*split, "|"]:
        if word in ("|", "&&", ">", ";"):
            if command[:1] == ["moecc"]:
                yield command[1:]
            command = []
        else:
            command.append(word)


@pytest.mark.parametrize("page", [*OTHERS, ROOT / "docs" / "jobs.md"], ids=lambda p: p.name)
def test_commands_and_pipelines_are_read(page):
    """With the options that there are, of the types that they have, and passes that there are."""
    app = build_app()
    for line in lines(page):
        for command in words(line):
            with app.make_context("moecc", list(command)) as context:
                name, found, rest = app.resolve_command(context, command)
                found.make_context(name, list(rest), parent=context).close()
            for option, text in pairwise(command):
                if option == "-p" and "--load" not in command:
                    Pipeline.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("page", OTHERS, ids=lambda p: p.name)
def test_commands_run(page, stands, tmp_path):
    pytest.importorskip("tokenizers")
    for each in [*stands.iterdir(), ROOT / "tests", ROOT / "examples"]:
        if ALONE.get(each.name, page.name) == page.name:
            (tmp_path / each.name).symlink_to(each)
    for block in blocks_of(page):
        if AS in block.info:
            (tmp_path / block.info.partition(AS)[2]).write_text(block.text)
    variables = ""
    for line in lines(page):
        for text, stand in STANDS.items():
            line = line.replace(text, stand)
        if IN_A_CLONE.match(line) or OF_TPUS.match(line):
            continue
        line = KILLED.sub(r"python -m tests.docs.scenes killed \1", line)
        if re.match(r"[A-Z]+=", line):
            variables = line.partition("#")[0].strip() + "\n"
            continue
        is_error = "--warnings error" in line
        more = FEW if line.startswith("moecc train ") else ""
        more += SMALL if "recipe:upcycle" in line and "--plan" not in line else ""
        command = f"{variables}{line.partition('  #')[0].rstrip()}{more}"
        if is_error:
            command = f"! {command}"
        run(tmp_path, command)


PROGRAMS = [line for page in OTHERS for line in lines(page) if OF_TPUS.match(line)]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="the compiler of TPUs is not installed")
@pytest.mark.parametrize("line", PROGRAMS)
def test_programs_of_tpus_compile(line, tmp_path):
    run(tmp_path, line)
