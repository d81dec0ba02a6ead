"""``python -m tests.proof.stores``: spoil requests to an S3 server, and judge what commands do.

    python -m tests.proof.stores [--sample N] [--out FILE]

Every command runs once undisturbed through a proxy, which counts its requests. Then one of them, or
all from it on, has a fault, the command is killed there, or another writer goes before it. After
each the store must hold nothing that is readable and incomplete, a failure must be one message, and
the command that the message names must lead to what the undisturbed one wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fault_proxy import KINDS, TIMEOUT_SECONDS, Fault, FaultProxy

from moecc.cli.main import main as moecc
from moecc.formats import store as store_module
from moecc.formats.run import saved_steps
from moecc.formats.store import CLAIM_NAME, UPLOADING
from moecc.version import __version__
from tests.reports import machine
from tests.train.tiny import GOLDEN, make_recipe, same_runs

SECRETS = {"AWS_ACCESS_KEY_ID": "AKIA-of-a-proof", "AWS_SECRET_ACCESS_KEY": "secret-of-a-proof"}
BUCKET, TRIAL = "bucket", "bucket/trial"
ADDRESS = f"s3://{TRIAL}"
RUN = "steps = 4\nsave_steps = 2\nkeep = 9"
KILL, WRITER = "killed", "second writer"


def client(seconds: float) -> dict[str, Any]:
    """Return the settings of s3fs with a longest wait for an answer."""
    return {"config_kwargs": {"read_timeout": seconds, "connect_timeout": seconds}}


def run_moecc(*words: object, seconds: float = TIMEOUT_SECONDS) -> tuple[int, str]:
    """Return exit code and all output of a command that runs in this process."""
    import fsspec

    # As in a process of its own, nothing is known of the store.
    store_module._blocks.cache_clear()
    fsspec.config.conf["s3"] = client(seconds)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = moecc([str(word) for word in words])
    return code, text.getvalue()


@dataclass
class World:
    """A store with a proxy before it, and what commands read and write.

    Attributes:
      store: fsspec's access to the store without the proxy.
      proxy: the proxy.
      folder: of this machine, with a recipe, ``whole``, its run, and ``moe``, a converted model.
      cache: where outputs of a store are staged.
    """

    store: Any
    proxy: FaultProxy
    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def contents(self, path: str = TRIAL) -> dict[str, bytes]:
        """Return the files of a folder of the store."""
        self.store.invalidate_cache()
        names = self.store.find(path)
        return {name.removeprefix(f"{path}/"): self.store.cat_file(name) for name in names}

    def reset(self):
        """Remove what the last trial wrote."""
        self.store.invalidate_cache()
        if self.store.exists(TRIAL):
            self.store.rm(TRIAL, recursive=True)
        shutil.rmtree(self.cache, ignore_errors=True)


@dataclass
class Command:
    """A command whose requests are spoiled.

    Attributes:
      name: for the record.
      words: of the command.
      prepare: fills the store before it.
      is_whole: whether the store holds what the undisturbed command leaves.
      half_visible: what of the store is readable and incomplete, empty if nothing.
      resume: words that continue it, besides those that its message names.
      writes: whether it writes to the store, so that it is killed and raced, too.
      is_quick: whether it compiles nothing, so that more of its requests are spoiled.
    """

    name: str
    words: tuple[object, ...]
    prepare: Callable[[], None]
    is_whole: Callable[[], bool]
    half_visible: Callable[[], str]
    resume: tuple[object, ...] = ()
    writes: bool = True
    is_quick: bool = True


@dataclass
class Record:
    """The faults of a command.

    Attributes:
      faults: how many had each kind.
      exit_codes: how often a command had each, by the kind of the fault.
      messages: of failures, and how often.
      failures: what was wrong.
    """

    faults: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def commands(world: World) -> Iterator[Command]:
    """Yield the commands; the undisturbed results are made here."""
    put = world.store.put
    convert = ("convert", "s3://bucket/tiny", ADDRESS, "-p", "upcycle{experts=4 top-k=2}", "--to",
               "mixtral", "--max-shard-bytes", "20000")  # fmt: skip
    moe, recipe = world.folder / "moe", world.folder / "recipe.toml"
    expected = {path.name: path.read_bytes() for path in moe.iterdir()}

    def model_visible():
        files = world.contents()
        claim = files.pop(CLAIM_NAME, b"").decode()
        if claim.startswith(UPLOADING) or files in ({}, expected, old):
            return ""
        return f"{len(files)} files, claim {claim!r}"

    old = {}
    model = (lambda: world.contents() == expected, model_visible)
    yield Command("convert", convert, lambda: None, *model, ("--resume",))
    yield Command("push", ("push", moe, ADDRESS), lambda: None, *model, ("--resume",))
    put(str(GOLDEN / "gemma2_caps"), "bucket/old", recursive=True)
    old |= world.contents("bucket/old")
    yield Command("push --force", ("push", moe, ADDRESS, "--force"),
                  lambda: put(str(GOLDEN / "gemma2_caps"), TRIAL, recursive=True),
                  *model)  # fmt: skip
    put(str(moe), "bucket/moe", recursive=True)
    unchanged = (lambda: not world.contents(), lambda: "")
    yield Command("verify", ("verify", "s3://bucket/moe"), lambda: None, *unchanged, writes=False)

    def copied():
        shutil.rmtree(world.folder / "copy", ignore_errors=True)
        world.store.invalidate_cache()
        world.store.get(TRIAL, str(world.folder / "copy"), recursive=True)
        return world.folder / "copy"

    def run_visible():
        files = world.contents()
        if "lineage.json" not in files:
            return ""
        for name in files:
            if match := re.fullmatch(r"steps/(\d+)/step\.json", name):
                code, text = run_moecc("verify", f"{ADDRESS}@{match[1]}")
                if code:
                    return f"step {match[1]}: {text}"
        return ""

    def run_whole():
        if not {"lineage.json", "steps/4/step.json"} <= world.contents().keys():
            return False
        run = copied()
        numbers = [step.number for step in saved_steps(run)]
        present = sorted(int(p.name) for p in (run / "steps").iterdir())
        return numbers == present == [2, 4] and same_runs(run, world.folder / "whole")

    run = (run_whole, run_visible)
    train = ("train", recipe, "--out", ADDRESS)
    yield Command("train", train, lambda: None, *run, is_quick=False)
    half = world.folder / "half"
    shutil.copytree(world.folder / "whole", half)
    shutil.rmtree(half / "steps" / "4")
    yield Command("resume", train, lambda: put(str(half), TRIAL, recursive=True), *run,
                  is_quick=False)  # fmt: skip
    put(str(world.folder / "whole"), "bucket/run", recursive=True)
    evaluate = ("evaluate", "s3://bucket/run", "--data", "s3://bucket/tokens/heldout", "--batches",
                "1", "--format", "json")  # fmt: skip
    yield Command("evaluate", evaluate, lambda: None, *unchanged, writes=False, is_quick=False)


def places(count: int, wanted: int, share: float) -> list[int]:
    """Return numbers of requests from 1 to `count`, evenly apart; `share` moves all of them."""
    return [1 + int((n + share) * count / wanted) for n in range(min(wanted, count))]


def judge(world: World, command: Command, sample: int, record: Record, chosen: list[str]):
    """Run a command with each fault, or each that is chosen, at some of its requests."""
    world.reset()
    command.prepare()
    world.proxy.expect(Fault())
    code, text = run_moecc(*command.words)
    requests, output = world.proxy.count, text
    if code or not command.is_whole():
        record.failures.append(f"{command.name} undisturbed: exit {code}: {text}")
        return
    print(f"{command.name}: {requests} requests", file=sys.stderr)
    kinds = [*KINDS, *([KILL, WRITER] if command.writes else [])]
    for number, kind in enumerate(kinds):
        if chosen and kind not in chosen:
            continue
        modes = (True,) if kind in ("lag", KILL, WRITER) else (False, True)
        for lasts in modes:
            share = (number + 0.5 * lasts) / len(kinds)
            count = sample if command.writes else 2 * sample
            count = count if command.is_quick or chosen else 1
            for at in places(requests, count, share):
                where = f"{command.name}, {'lasting ' * lasts}{kind} at {at} of {requests}"
                started = time.monotonic()
                world.reset()
                command.prepare()
                _trial(world, command, kind, Fault(kind, at, lasts), where, output, record)
                print(f"  {where}: {time.monotonic() - started:.1f} s", file=sys.stderr)


def _trial(
    world: World, command: Command, kind: str, fault: Fault, where: str, output: str,
    record: Record
):  # fmt: skip
    wait_seconds = TIMEOUT_SECONDS
    seconds = []
    words = [sys.executable, "-m", "moecc", *map(str, command.words)]
    if kind == KILL:
        process = []
        kill = Fault("reset", fault.at, False, lambda: process[0].send_signal(signal.SIGKILL))
        world.proxy.expect(kill)
        process.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
        text, code = process[0].communicate()[1], process[0].returncode
    else:
        if kind == WRITER:

            def write():
                done = subprocess.run(words, capture_output=True, text=True)
                seconds.append((done.returncode, done.stdout + done.stderr))

            fault, wait_seconds = Fault("", fault.at, False, write), 120.0
        world.proxy.expect(fault)
        code, text = run_moecc(*command.words, seconds=wait_seconds)
    if not world.proxy.is_hit:  # the number of requests varies by a few
        return
    record.faults[kind] += 1
    world.proxy.expect(Fault())
    for number, said in [(code, text), *seconds]:
        record.exit_codes[f"{kind}: {number}"] += 1
        record.failures += [f"{where}: {f}: {said}" for f in _faults(number, said, kind)]
        if number > 0:
            record.messages[_first_line(said)] += 1
    if half := command.half_visible():
        record.failures.append(f"{where}: half-visible: {half}")
    if code == 0 and not seconds and not command.is_whole():
        record.failures.append(f"{where}: exit 0, but not whole")
    if code == 0 and not command.writes and _untimed(text) != _untimed(output):
        record.failures.append(f"{where}: another output: {text}")
    if command.writes and not command.is_whole():
        if command.name in ("train", "resume") and fault.at % 2:
            shutil.rmtree(world.cache, ignore_errors=True)  # the machine is lost
        _continue(world, command, text, where, record)


def _continue(world: World, command: Command, text: str, where: str, record: Record):
    """Do what the message of a failure, or of the next attempt, names."""
    code, text = run_moecc(*command.words, *command.resume)
    if code and "The same command may succeed later" in text:  # a machine that is busy for a second
        code, text = run_moecc(*command.words, *command.resume)
    if code and (named := re.search(r"moecc (push \S+ \S+ --resume)", text)):
        code, text = run_moecc(*named[1].split())
    if code or not command.is_whole():
        record.failures.append(f"{where}: not continued: exit {code}: {text}")


def _faults(code: int, text: str, kind: str) -> Iterator[str]:
    """Yield what is wrong with the exit of a command."""
    if kind == KILL and code == -signal.SIGKILL:
        return
    if code not in (0, 1, 4):
        yield f"exit {code}"
    if "Traceback" in text or text.count("error:") != (code != 0):
        yield "not one message"
    if any(secret in text for secret in SECRETS.values()):
        yield "a secret"


def _first_line(text: str) -> str:
    line = next((line for line in text.splitlines() if line.startswith("error:")), text)
    return re.sub(r"(?<=error: )(s3:/)?/\S+?(?=: )", "PLACE", line)


def _untimed(text: str) -> str:
    """Return an output without times, and without progress that is shown after some."""
    return re.sub(r"\S+: .* so far\n|[\d.]+(?= s\b)|\"seconds\": [\d.]+", "", text)


def prove(sample: int, names: list[str], kinds: list[str], out: Path | None) -> dict[str, Any]:
    """Run commands, and return what was found with the date and the machine, and earlier records.

    Args:
      sample: requests of a quick command that have each fault; twice as many of one that reads.
      names: of the commands; all where there are none.
      kinds: of the faults, for a record of their own; all where there are none.
      out: the file of the records, which is written after each command.
    """
    import fsspec
    from moto.server import ThreadedMotoServer

    has_record = out is not None and out.is_file()
    report = json.loads(out.read_text()) if out and has_record else {}
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    port = server.get_host_and_port()[1]
    with tempfile.TemporaryDirectory(prefix="moecc-stores-") as text:
        folder = Path(text)
        proxy = FaultProxy(port)
        os.environ.update(SECRETS)
        os.environ.update({
            "AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(folder / "cache"),
            "AWS_MAX_ATTEMPTS": "1", "FSSPEC_S3": json.dumps(client(TIMEOUT_SECONDS)),
        })  # fmt: skip
        direct = {"endpoint_url": f"http://127.0.0.1:{port}"}
        store = fsspec.filesystem("s3", skip_instance_cache=True, client_kwargs=direct)
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        world = World(store, proxy, folder)
        _fill(world)
        for command in commands(world):
            if names and command.name not in names:
                continue
            start, record = time.monotonic(), Record()
            judge(world, command, sample, record, kinds)
            report[", ".join([command.name, *kinds])] = {
                "date": datetime.now(UTC).date().isoformat(),
                "moecc": __version__,
                "machine": machine(),
                "server": f"moto {version('moto')}",
                "seconds": round(time.monotonic() - start),
                **vars(record),
            }
            if out is not None:
                out.write_text(json.dumps(report, indent=1) + "\n")
    server.stop()
    return report


def _fill(world: World):
    """Write the models, tokens and the run that commands read."""
    store, folder = world.store, world.folder
    store.mkdir(BUCKET)
    store.put(str(GOLDEN / "llama_gqa"), "bucket/tiny", recursive=True)
    recipe = make_recipe(folder, RUN)
    store.put(str(folder / "tokens"), "bucket/tokens", recursive=True)
    recipe.write_text(recipe.read_text().replace("tokens/", "s3://bucket/tokens/"))
    for words in (
        ("train", recipe, "--out", folder / "whole"),
        ("convert", "s3://bucket/tiny", folder / "moe", "-p", "upcycle{experts=4 top-k=2}", "--to",
         "mixtral", "--max-shard-bytes", "20000"),
    ):  # fmt: skip
        code, text = run_moecc(*words)
        assert code == 0, text


def main() -> int:
    """Run, print, and return 1 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=2, help="requests a fault and quick command")
    parser.add_argument("--command", nargs="*", default=[], help="names, all by default")
    parser.add_argument("--kind", nargs="*", default=[], help="of the faults, all by default")
    parser.add_argument("--out", type=Path, help="the file for the JSON object")
    asked = parser.parse_args()
    report = prove(asked.sample, asked.command, asked.kind, asked.out)
    print(json.dumps(report, indent=1))
    count = sum(sum(record["faults"].values()) for record in report.values())
    print(f"{count} faults", file=sys.stderr)
    return 1 if any(record["failures"] for record in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
