"""Whole commands on hostile files: each runs in a process forked from one that is warm.

A command may end with any exit code but 70, without a traceback, within `HANG_SECONDS`, and with
a memory that is bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecc.cli.main import COMMANDS, main
from tests.reports import machine

from . import seeds
from .grammars import GRAMMARS
from .mutate import Rng, mutate_bytes, mutate_json, mutate_text
from .rig import HANG_SECONDS, MEMORY_BYTES

MODEL = seeds.GOLDEN / "llama_gqa"
UPCYCLE = "upcycle{experts=4 top-k=2}"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: a signal), what it printed, its cost.

    The seconds are those of the processor, for the machine may be busy.
    """

    code: int
    text: str
    seconds: float
    peak_bytes: int

    @property
    def fault(self) -> str:
        """What no command may do; empty if it did not."""
        if "Traceback (most recent call last)" in self.text:
            return "traceback"
        if self.code == -signal.SIGALRM:
            return "hang"
        return "exit 70" if self.code == 70 else f"signal {-self.code}" if self.code < 0 else ""


def mutant(rng: Rng, name: str) -> bytes:
    """Return a hostile input of a grammar."""
    grammar = GRAMMARS[name]
    inputs = grammar.seeds()
    return grammar.mutate(rng, rng.choice(inputs), inputs)


def _file(rng: Rng, folder: Path, grammar: str, name: str) -> str:
    (folder / name).write_bytes(mutant(rng, grammar))
    return str(folder / name)


def _text(rng: Rng, grammar: str) -> str:
    """Return an input as an argument, which has no zero byte and an end."""
    return os.fsdecode(mutant(rng, grammar)[:10_000].replace(b"\0", b"")) or ","


def _model(rng: Rng, folder: Path) -> str:
    """Return a model of which one file is spoilt."""
    made = Path(shutil.copytree(MODEL, folder / "model"))
    files = sorted(p for p in made.iterdir() if p.suffix in (".json", ".safetensors"))
    spoilt = rng.choice(files)
    if spoilt.name == "config.json" and rng.random() < 0.7:
        spoilt.write_bytes(mutant(rng, "configs"))
    elif rng.random() < 0.2:
        (made / "tokenizer.json").write_bytes(mutant(rng, "tokenizers"))
    else:
        spoilt.write_bytes(mutate_bytes(rng, spoilt.read_bytes(), [b"{}"]))
    return str(made)


def _written(rng: Rng, folder: Path) -> str:
    (folder / "moecc_receipt.json").write_bytes(mutant(rng, "receipts"))
    (folder / "moecc_manifest.json").write_bytes(mutant(rng, "manifests"))
    return str(folder)


def _reproducer(rng: Rng, folder: Path) -> str:
    """Return a reproducer whose comment, or whose graph, is spoilt."""
    stated, graph = b'{"pipeline": "canonicalize,dce", "seed": 0, "load": []}', mutant(rng, "moe")
    if rng.random() < 0.7:
        graph = rng.choice(GRAMMARS["moe"].seeds())
        stated = mutate_json(rng, stated, [b'"check": true', b'"compare": "weights"'])
    comment = stated.replace(b"\n", b" ")
    (folder / "x.moe").write_bytes(b"# moecc reproducer: x\n# replay: %b\n%b" % (comment, graph))
    return str(folder / "x.moe")


def _words(rng: Rng, folder: Path) -> list[str]:
    """Return the words of a command, spoilt."""
    command = rng.choice(sorted(COMMANDS))
    words = [command, str(MODEL), "-p", UPCYCLE, "--to", "mixtral", "--seed", "3"]
    spoilt = mutate_text(rng, "\n".join(words[: rng.randrange(1, 9)]).encode(), [b"--json -o"])
    return os.fsdecode(spoilt[:5000].replace(b"\0", b"")).split("\n")


KINDS: dict[str, Callable[[Rng, Path], Sequence[str]]] = {
    "inspect .moe": lambda r, f: ("inspect", _file(r, f, "moe", "x.moe")),
    "opt .moe": lambda r, f: ("opt", _file(r, f, "moe", "x.moe"), "-p", "canonicalize"),
    "opt -p": lambda r, f: ("opt", str(MODEL), "-p", _text(r, "pipelines")),
    "convert -p": lambda r, f: (
        "convert", str(MODEL), str(f / "out"), "--no-check", "--to", "st_moe",
        "-p", _text(r, "pipelines"),
    ),
    "inspect model": lambda r, f: ("inspect", _model(r, f)),
    "convert model": lambda r, f: (
        "convert", _model(r, f), str(f / "out"), "-p", UPCYCLE, "--to", "mixtral", "--no-check",
    ),
    "inspect gguf": lambda r, f: ("inspect", _file(r, f, "gguf", "x.gguf")),
    "run --inputs": lambda r, f: (
        "run", str(MODEL), "--backend", "reference", "--outputs", str(f / "y.npy"),
        "--inputs", _file(r, f, "arrays", "x.npy"),
    ),
    "plan --machine": lambda r, f: ("plan", str(MODEL), "--machine", _text(r, "machines")),
    "plan --rules": lambda r, f: (
        "plan", str(MODEL), "--machine", "gpu:h100:4", "--mesh", "data=2,model=2",
        "--rules", _file(r, f, "rules", "my.rules"),
    ),
    "replay": lambda r, f: ("replay", _reproducer(r, f)),
    "tokens": lambda r, f: (
        "tokens", _file(r, f, "recipes", "x.txt"), "--out", str(f / "out"),
        "--tokenizer", "bytes",
    ),
    "verify": lambda r, f: ("verify", _written(r, f)),
    "words": _words,
}  # fmt: skip
"""What is run, by name."""


def run_command(words: Sequence[str], folder: Path) -> Ended:
    """Run a command in a fork of this process, which is warm, and return how it ended."""
    printed = folder.parent / "printed"
    child = os.fork()
    if child == 0:
        _be_command(words, folder, printed)
    _, status, used = os.wait4(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    text = printed.read_text("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, text, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def _be_command(words: Sequence[str], folder: Path, printed: Path):
    """Become a command: own group, output in a file, bounded memory, an alarm; never return."""
    code = 71
    try:
        os.setpgid(0, 0)
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number in (1, 2):
            os.dup2(out, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 4 * HANG_SECONDS)  # the machine may be busy
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGALRM))
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        code = main(list(words))
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


def fuzz_commands(number: int, seed: int, found: Path) -> Iterator[dict[str, Any]]:
    """Run so many hostile commands, and yield the counts so far after each of them.

    The words and the files of failures are kept in the folder `found`.
    """
    rng = random.Random(f"commands {seed}")
    kinds = list(KINDS)
    codes = {kind: Counter() for kind in kinds}
    faults = Counter()
    slowest, largest, began = 0.0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moecc-commands-") as root:
        for count in range(number):
            kind = kinds[count % len(kinds)]
            folder = Path(root) / "here"
            folder.mkdir()
            words = KINDS[kind](rng, folder)
            ended = run_command(words, folder)
            codes[kind][ended.code] += 1
            slowest, largest = max(slowest, ended.seconds), max(largest, ended.peak_bytes)
            if ended.fault:
                faults[f"{kind}: {ended.fault}"] += 1
                _keep(folder, found, words, ended)
            shutil.rmtree(folder, ignore_errors=True)
            yield {
                "schema": "moecc.fuzz-commands/1",
                "seed": seed,
                "python": platform.python_version(),
                "machine": machine(),
                "commands": count + 1,
                "seconds": round(time.monotonic() - began, 1),
                "slowest_seconds": round(slowest, 2),
                "peak_memory_bytes": largest,
                "exit_codes": {
                    k: {str(c): n for c, n in sorted(v.items())} for k, v in codes.items()
                },
                "failures": sum(faults.values()),
                "faults": dict(sorted(faults.items())),
            }


def _keep(folder: Path, found: Path, words: Sequence[str], ended: Ended):
    """Keep the files and the words of a command that failed, once for each end of its text."""
    digest = hashlib.sha256(ended.text[-200:].encode()).hexdigest()[:8]
    kept = found / f"command-{ended.fault.replace(' ', '-')}-{digest}"
    if not kept.exists():
        shutil.copytree(folder, kept)
        record = {"words": [ascii(w) for w in words], "code": ended.code, "text": ended.text}
        (kept / "COMMAND.json").write_text(json.dumps(record, indent=1), "utf-8")
