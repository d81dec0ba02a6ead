"""Small checkpoints to break, and commands whose end is checked."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.support.commands import Done, Moecc

GOLDEN = Path(__file__).parent.parent / "golden"
LLAMA = GOLDEN / "llama_gqa"
UPCYCLE = "upcycle{experts=4 top-k=2}"
MOECC = (sys.executable, "-m", "moecc")


class CommandLine(Moecc):
    """``moecc ARGS``, which must end with a code, or one of several, and say words on stderr."""

    def __call__(self, *args, code=0, says=()) -> Done:
        done = super().__call__(*args)
        assert done.code in (code if isinstance(code, tuple) else (code,)), done.err
        for words in [says] if isinstance(says, str) else says:
            assert words in done.err
        return done

    def json(self, *args):
        return self(*args, "--format", "json").json()

    def convert(self, source, out, *more, pipeline=UPCYCLE, to="mixtral", **expected) -> Done:
        return self("convert", source, out, "-p", pipeline, "--to", to, *more, **expected)

    def dry_run(self, source, out, **options):
        """Return the JSON of a conversion that writes nothing."""
        return self.convert(source, out, "--dry-run", "--format", "json", **options).json()


@pytest.fixture
def cli(capsys):
    return CommandLine(capsys)


@pytest.fixture
def dense(tmp_path):
    """A copy of a tiny llama checkpoint, to be changed."""
    return shutil.copytree(LLAMA, tmp_path / "dense")


@pytest.fixture
def dense_graph(cli, tmp_path):
    """The graph of the tiny llama, which has three layers, in a file."""
    cli("import", LLAMA, "-o", tmp_path / "dense.moe")
    return tmp_path / "dense.moe"


@pytest.fixture
def out(tmp_path):
    """Where an output goes; nothing is there."""
    return tmp_path / "out"


def read_json(path):
    return json.loads(path.read_text())


def edit_json(path, **changes):
    """Change keys of the object in a JSON file."""
    path.write_text(json.dumps(read_json(path) | changes))


def run_process(*command, code=0, **variables):
    """Run a command, which must end with a code and print UTF-8, with variables of its own."""
    env = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, env=env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run_shell(line, **expected):
    """Run a line of a shell, in which ``moecc`` is the command."""
    return run_process("bash", "-c", line.replace("moecc ", f"{' '.join(MOECC)} ", 1), **expected)


@contextmanager
def edited_tensors(folder):
    """Yield the tensors of a checkpoint by name, and write them back."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


def word_tokenizer(words):
    """Return the text of a tokenizer.json whose tokens are words, the last one for any other."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[-1]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer.to_str()
