"""The commands of the other pages: every one is parsed, and all that need no download are run.

Names of models, texts and runs stand for small ones; steps of a training are few.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file

from moecc.cli.main import build_app
from moecc.errors import MoeccError
from moecc.pipeline.text import Pipeline
from tests.train.tiny import draw_weights, make_model

from .pages import PAGES, ROOT, blocks_of
from .sessions import environment

ELSEWHERE = ("tour.md", "jobs.md")
"""Their sessions are run, and compared with what they print: test_tour.py."""

FEW = (
    " --set run.steps=2 --set data.batch=2 --set data.seq=32 --set data.evaluate_batches=1"
    " --set optimizer.warmup=1 --set optimizer.decay_steps=1"
)
SMALL = " --set 'model.pipeline=upcycle{experts=2 top-k=2}'"
"""Of a recipe that upcycles, two experts."""
NOT_HERE = re.compile(
    r"make |pip |python examples/|\. \.venv|moecc compile .*tpu:|moecc convert SOURCE .*# killed"
)
"""What installs, downloads, or needs the compiler of TPUs; and a command that is killed."""

STANDS = {"$(python examples/downloads.py)": "SmolLM2-135M", "make install && ": "true # "}


ALONE = {"sparse": "README.md", "smollm2-8x": "launch.md", "tokens": "runs.md"}
"""Stands that other pages make themselves."""


def lines(page: Path) -> Iterator[str]:
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


def words(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each command of moecc in a line; a pipe has several."""
    split = shlex.split(line.replace("$MODEL", "MODEL"), comments=True)
    command: list[str] = []
    for word in [*split, "|"]:
        if word in ("|", "&&", ">", ";"):
            if command[:1] == ["moecc"]:
                yield command[1:]
            command = []
        else:
            command.append(word)


@pytest.mark.parametrize("page", [*OTHERS, ROOT / "docs" / "jobs.md"], ids=lambda p: p.name)
def test_commands_and_pipelines_are_read(page: Path) -> None:
    """With the options that there are, of the types that they have, and passes that there are."""
    app = typer.main.get_command(build_app())
    for line in lines(page):
        for command in words(line):
            with app.make_context("moecc", list(command)) as context:
                name, found, rest = app.resolve_command(context, command)  # type: ignore[attr-defined]
                found.make_context(name, list(rest), parent=context).close()
            for option, text in pairwise(command):
                if option == "-p" and "--load" not in command:
                    Pipeline.parse(text)


def test_a_wrong_command_is_found() -> None:
    assert list(words("moecc import x | moecc opt - -p 'dce'  # why")) == [
        ["import", "x"], ["opt", "-", "-p", "dce"],
    ]  # fmt: skip
    with pytest.raises(MoeccError):
        Pipeline.parse("upcycle{expert=8}")


@pytest.fixture(scope="module")
def stands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what the pages take for granted: a model with a tokenizer, texts, graphs, a run."""
    folder = tmp_path_factory.mktemp("stands")
    model = draw_weights(make_model(folder / "SmolLM2-135M", num_hidden_layers=4))
    _tokenizer().save(str(model / "tokenizer.json"))
    for name in ("SOURCE", "MODEL"):
        (folder / name).symlink_to(model)
    (folder / "text.txt").write_text((ROOT / "docs" / "tour.md").read_text("utf-8"))
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a note of some length\n" * 20)
    texts = [{"text": f"document {n} of the corpus, with a few words"} for n in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    rte = [
        {"premise": "a", "hypothesis": f"b{n}", "label": ("yes", "no")[n % 2]} for n in range(40)
    ]
    (folder / "rte.jsonl").write_text("".join(json.dumps(t) + "\n" for t in rte))
    np.save(folder / "tokens.npy", np.arange(8, dtype=np.int32).reshape(2, 4))
    _from_pages(folder)
    for command in (
        "import SmolLM2-135M -o dense.moe",
        "convert SmolLM2-135M SmolLM2-135M-Instruct.Q4_1.gguf --to gguf:llama",
        "convert SmolLM2-135M sparse -p 'upcycle{experts=2 top-k=2}' --to mixtral",
        "convert SmolLM2-135M smollm2-8x -p 'upcycle{experts=8 top-k=2}' --to mixtral",
        "tokens corpus.jsonl --tokenizer SmolLM2-135M --hold-out 0.1 --out text",
        "train recipe:upcycle --out RUN --set model.source=SmolLM2-135M"
        " --set data.train.0.tokens=text/train --set data.evaluate.0.tokens=text/heldout"
        f"{FEW}{SMALL}",
    ):
        run(folder, f"moecc {command}")
    (folder / "tokens").symlink_to(folder / "text")
    return folder


def _tokenizer() -> tokenizers.Tokenizer:  # type: ignore[name-defined]  # noqa: F821
    """Return a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _from_pages(folder: Path) -> None:
    """Write the graph of adding-a-family.md with weights, and the pass of writing-a-pass.md."""
    (graph,) = (b for b in blocks_of(ROOT / "docs" / "adding-a-family.md") if b.info == "moe")
    (folder / "tiny.moe").write_text(graph.text)
    (folder / "tiny").mkdir()
    rng = np.random.default_rng(0)
    named = re.findall(r'source\("([\w.]+)" : f32\[([^]]+)\]', graph.text)
    sizes = {name: [int(n) for n in re.findall(r"=(\d+)", axes)] for name, axes in named}
    arrays = {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    save_file(arrays, folder / "tiny" / "model.safetensors")
    block = next(b for b in blocks_of(ROOT / "docs" / "writing-a-pass.md") if b.info == "python")
    code, _, rest = block.text.partition("\ngraph = parse(")
    (folder / "fold_scale.py").write_text(code)
    (folder / "model.moe").write_text(rest.split('"""')[1].lstrip())


def run(folder: Path, line: str) -> None:
    """Run a line of a page, and fail with what it said unless it ends with 0."""
    done = subprocess.run(
        ["/bin/sh", "-c", line], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"$ {line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", OTHERS, ids=lambda p: p.name)
def test_commands_run(page: Path, stands: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for each in [*stands.iterdir(), ROOT / "tests", ROOT / "examples"]:
        if ALONE.get(each.name, page.name) == page.name:
            (tmp_path / each.name).symlink_to(each)
    variables = ""
    for line in lines(page):
        for text, stand in STANDS.items():
            line = line.replace(text, stand)
        if NOT_HERE.match(line):
            continue
        if re.match(r"[A-Z]+=", line):
            variables = line.partition("#")[0].strip() + "\n"
            continue
        is_error = "--warnings error" in line
        more = FEW if line.startswith("moecc train ") else ""
        more += SMALL if "recipe:upcycle" in line else ""
        command = f"{variables}{line.partition('  #')[0].rstrip()}{more}"
        if is_error:
            command = f"! {command}"
        run(tmp_path, command)
