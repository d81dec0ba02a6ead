"""Ends a conversion at each call that changes the disk, continues it, and compares bytes.

A conversion runs in a child that is forked from this process, in which everything is imported.  Its
disk is injected (`moecc.formats.files`): it counts the calls, and something happens at one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moecc.errors import MoeccError
from moecc.formats.files import injected
from moecc.formats.output import clean
from moecc.formats.writer import WriteOptions
from moecc.jobs.convert import Plan, plan, write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.support.process import Terminated, signals_raised

from .disks import CountingDisk, FullDisk, KillingDisk, SignalDisk
from .power import ForgettingDisk

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_gqa"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "LICENSE")
KILLS = ("kill", "power all", "power data", "power some")
"""What a process does not live to tell."""
ENDS = ("SIGTERM", "SIGTERM late", "SIGINT", "SIGHUP late", "disk full")
"""What a process cleans up after."""
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "disk full": 4}

Content = dict[str, bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of output: its name, what makes it, its old files, and how many files of weights."""

    out: str
    target: str
    old: tuple[str, ...]
    weights: int
    passes: str = "upcycle{experts=2 top-k=2}"
    max_shard_bytes: int = 20_000


FOLDER = Kind("out", "mixtral", ("out/old.txt",), 3)
GGUF = Kind("m.gguf", "gguf:llama", ("m.gguf", "m.gguf.moecc.json"), 1)


def in_child(work: Callable[[], int]) -> int:
    """Run `work` in a forked child without output; return its exit code, or minus its signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = work()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def make_source(folder: Path) -> Path:
    """Make a source with five companions: three files, a generation config, and a template."""
    shutil.copytree(GOLDEN, folder)
    for name in COMPANIONS:
        (folder / name).write_text("{}" if name.endswith("json") else name)
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("tool")
    return folder


@dataclass
class Result:
    """What was found: how many points of each scenario, and every failure."""

    points: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@contextlib.contextmanager
def planned(source: Path, kind: Kind) -> Iterator[Plan]:
    """Yield the plan of a conversion; children carry it out."""
    with open_model(str(source)) as model:
        passes = Pipeline.parse(kind.passes, installed())
        yield plan(model, passes, kind.target, check=False)


def exit_code(work: Callable[[], object]) -> int:
    """Do some work as a command does, and return its exit code."""
    try:
        with signals_raised():
            work()
    except KeyboardInterrupt:
        return 130
    except (Terminated, MoeccError) as error:
        return error.exit_code
    return 0


class Rig:
    """A source, the expected output, and a folder for trials.

    Args:
      base: a folder for all of it.
      kind: the kind of output.
      how: one of `KILLS` or `ENDS`.
      result: receives what is found.
    """

    def __init__(self, base: Path, kind: Kind, how: str, result: Result):
        self.kind, self.how, self.result = kind, how, result
        self.source = base / "source"
        if not self.source.exists():
            make_source(self.source)
        self.root, self.trash, self.saved = base / "root", base / "trash", base / "saved"
        self.fresh()
        self.stack = contextlib.ExitStack()
        self.plan = self.stack.enter_context(planned(self.source, kind))
        # In this process, so that children find everything imported.
        assert exit_code(self.convert) == 0
        gc.freeze()  # forked children copy less
        self.expected = self.visible()
        made = [n for n in self.expected if n.endswith((".safetensors", ".gguf"))]
        assert len(made) == kind.weights, sorted(self.expected)

    def convert(self, *extra: str):
        """Carry out the conversion."""
        out = self.root / self.kind.out
        options = WriteOptions(self.kind.max_shard_bytes)
        force, resume = "--force" in extra, "--resume" in extra
        write(self.plan, out, options, force=force, resume=resume)

    def visible(self, root: Path | None = None) -> Content:
        """Return the files outside of partial and old outputs, by path."""
        root = root or self.root
        files = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
        return {p.as_posix(): (root / p).read_bytes() for p in files if p.parts[0][0] != "."}

    def hidden(self, root: Path | None = None) -> set[str]:
        """Return the names of what is left beside the output."""
        return {p.name for p in (root or self.root).iterdir() if p.name.startswith(".")}

    def old(self) -> Content:
        """Return the old output."""
        return {name: b"old " + name.encode() for name in self.kind.old}

    def fresh(self, old: bool = False):
        """Make the folder for trials anew, with an old output if that is asked for."""
        for folder in (self.root, self.trash):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for name, content in self.old().items() if old else ():
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_bytes(content)

    def disk(self, at: int | None) -> CountingDisk:
        """Return the disk of a trial."""
        word, _, rest = self.how.partition(" ")
        if word == "kill":
            return KillingDisk(at)
        if word == "power":
            return ForgettingDisk(self.root, self.trash, rest, at)
        if word == "disk":
            return FullDisk(at)
        return SignalDisk(at, getattr(signal, word), bool(rest))

    def run(self, *extra: str, at: int | None = None) -> int:
        """Run the conversion in a child, in which something happens at a call."""

        def work():
            with injected(self.disk(at)):
                return exit_code(lambda: self.convert(*extra))

        return in_child(work)

    def calls(self, *extra: str) -> int:
        """Return how many calls the conversion makes."""
        reading, writing = os.pipe()

        def work():
            with injected(CountingDisk()) as made:
                code = exit_code(lambda: self.convert(*extra))
            assert isinstance(made, CountingDisk)
            os.write(writing, str(made.calls).encode())
            return code

        code = in_child(work)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        assert code == 0, f"exit code {code} without being killed"
        return int(text)

    def fail(self, label: str, what: str):
        """Note a failure."""
        self.result.failures.append(f"{self.how}, {self.kind.out}, {label}: {what}")

    def check(self, label: str, old: bool):
        """Note a failure unless the output is absent, old or complete, and the old one is safe."""
        found, hidden = self.visible(), self.hidden()
        partial = f".{self.kind.out}.moecc-partial"
        if strange := hidden - {partial, f".{self.kind.out}.moecc-old"}:
            self.fail(label, f"{strange} was left")
        if found not in ({}, self.expected, self.old() if old else {}) and not (
            # Between the renames of a file and its manifest.
            partial in hidden and len(found) == 1 and found.keys() == {self.kind.out}
            and found[self.kind.out] in (self.expected[self.kind.out], self.old()[self.kind.out])
        ):  # fmt: skip
            self.fail(label, "the output is neither absent, old nor complete")
        twin = self.root.with_name("twin")
        shutil.rmtree(twin, ignore_errors=True)
        shutil.copytree(self.root, twin)
        clean(twin / self.kind.out)
        allowed = [self.expected, self.old() if old else {}]
        if self.visible(twin) not in allowed or self.hidden(twin):
            self.fail(label, f"clean leaves {sorted(map(str, twin.rglob('*')))}")

    def resume(self, label: str, *extra: str):
        """Continue, and note a failure unless the output is then complete and alone."""
        if self.visible() == self.expected and not self.hidden() and "--force" not in extra:
            return  # nothing is left to do, and the command would say that the output exists
        code = self.run("--resume", *extra)
        if code != 0:
            self.fail(label, f"exit code {code} of --resume")
        elif self.visible() != self.expected:
            self.fail(label, "other bytes after --resume")
        elif self.hidden():
            self.fail(label, "leftovers after --resume")

    def kill_everywhere(self, sample: int | None, old: bool, *extra: str) -> int:
        """Kill a conversion at each call, and continue it; return how many calls it has."""
        self.fresh(old)
        count = self.calls(*extra)
        name = f"{self.kind.out} {' '.join(extra) or 'fresh'}"
        for at in self._points(name, count, sample):
            label = f"{name} {at}"
            self.fresh(old)
            if (code := self.run(*extra, at=at)) != -signal.SIGKILL:
                self.fail(label, f"exit code {code}")
            self.check(label, old)
            self.resume(label, *extra)
        return count

    def kill_resumes(self, sample: int | None, calls: int):
        """Kill a continued conversion at each call, from three states, and continue it again."""
        for part in (0.3, 0.6, 0.9):
            first = int(calls * part)
            name = f"{self.kind.out} --resume after {part:.0%}"
            self.fresh()
            self.run(at=first)
            shutil.rmtree(self.saved, ignore_errors=True)
            shutil.copytree(self.root, self.saved)
            count = self.calls("--resume")
            for at in self._points(name, count, sample):
                self.fresh()
                shutil.copytree(self.saved, self.root, dirs_exist_ok=True)
                self.run("--resume", at=at)
                self.check(f"{name} {at}", old=False)
                self.resume(f"{name} {at}")

    def end_everywhere(self, sample: int | None, old: bool, *extra: str):
        """End a conversion at each call by what it cleans up after; it must leave nothing."""
        self.fresh(old)
        name = f"{self.kind.out} {' '.join(extra) or 'fresh'}"
        wanted = CODES[self.how.removesuffix(" late")]
        for at in self._points(name, self.calls(*extra), sample):
            self.fresh(old)
            code = self.run(*extra, at=at)
            found = self.visible()
            if code not in (0, wanted) or (code == 0 and found != self.expected):
                self.fail(f"{name} {at}", f"exit code {code}")
            if found not in (self.expected, self.old() if old else {}):
                self.fail(f"{name} {at}", "the output is neither absent, old nor complete")
            # What cannot be removed stays, and the error says so.
            if self.hidden() and not (code == 4 and found == self.expected):
                self.fail(f"{name} {at}", f"left {sorted(self.hidden())}")

    def _points(self, name: str, count: int, sample: int | None) -> Sequence[int]:
        points = range(count)
        if sample is not None:
            points = sorted({(i + 1) * (count - 1) // sample for i in range(sample)})
        self.result.points[f"{self.how}: {name}"] = len(points)
        return points


def run_kills(base: Path, how: str, sample: int | None, result: Result):
    """Run the scenarios of what a process does not live to tell."""
    folder = Rig(base, FOLDER, how, result)
    calls = folder.kill_everywhere(sample, False)
    folder.kill_everywhere(sample, True, "--force")
    folder.kill_resumes(sample, calls)
    file = Rig(base, GGUF, how, result)
    file.kill_everywhere(sample, False)
    file.kill_everywhere(sample, True, "--force")


def run_ends(base: Path, how: str, sample: int | None, result: Result):
    """Run the scenarios of what a process cleans up after."""
    for kind in (FOLDER, GGUF):
        made = Rig(base, kind, how, result)
        made.end_everywhere(sample, False)
        made.end_everywhere(sample, True, "--force")
