"""Each method of conversion for 10 GB: its memory, and the time of copies and BTX.

    python benchmarks/convert_methods.py [--method copy btx …] [--pairs 3] [--work FOLDER]
        [--layers 17] [--format json]

Sources are Llama folders in bf16 of about 2 GB, or of 10 GB where a method writes as much as it
reads, made in the work folder and removed in the end.  Each run is a process of its own, whose wall
time, processor time and peak resident memory are measured from outside.  A method that is timed
takes turns with a raw copy, now one first, now the other: a process that reads every byte of the
sources, writes as many bytes as the method into files of the same sizes, and synchronises them.
Before each of them as many bytes are written and removed, so that both find memory that was just
released: a virtual machine fills memory that its host has taken back several times more slowly.
A second raw copy lets the system forget what is on the disk while it writes, as conversions do; it
is faster where memory is slow to fill, and its ratio is shown beside.

Exit code 1 if a bound does not hold: 400 MB and the largest tensor resident; 1.3 times a raw copy,
median of pairs, for `copy` and `btx`.  On a machine that does other things, the ratio of processor
times says more; it is shown beside that of wall times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert import SHAPES, Shape, make_source

LIMIT_BYTES = 400 * 10**6
RATIO = 1.3
BLOCK_BYTES = 8 << 20
RELEASED_BYTES = 32 << 20
SCHEMA = 2


@dataclass(frozen=True)
class Method:
    """A conversion.

    Attributes:
      passes: the pipeline.
      to: the target.
      sources: how many times the layers of the small source the source has.
      branches: what ``--experts`` names besides: ``models`` or ``adapters``.
      is_timed: whether it takes turns with a raw copy.
      after: the method whose output is the source.
      is_captured: whether statistics of the last five layers are taken first, of a few tokens.
    """

    passes: str
    to: str = "mixtral"
    sources: int = 1
    branches: str = ""
    is_timed: bool = False
    after: str = ""
    is_captured: bool = False


_BRANCHES = "sources=base,a,b,c,base,a,b,c rest=mean"
METHODS = {
    "copy": Method("upcycle{experts=8 top-k=2}", is_timed=True),
    "btx": Method(f"upcycle{{experts=8 top-k=2 {_BRANCHES}}}", branches="models", is_timed=True),
    "lora": Method("upcycle{experts=8 top-k=2 sources=base,a,b,c,base,a,b,c}", branches="adapters"),
    "virtual groups": Method("upcycle{experts=16 top-k=2 granularity=2}"),
    "noise": Method("upcycle{experts=8 top-k=2 init=noise}"),
    "drop": Method("upcycle{experts=8 top-k=2 init=drop}"),
    "index split": Method("upcycle{experts=8 top-k=2 split=index}", sources=5),
    "random split": Method("upcycle{experts=8 top-k=2 split=random}", sources=5),
    "activation split": Method(
        "upcycle{experts=8 top-k=2 split=activation router-init=ridge layers=last:5}",
        to="ernie4_5_moe",
        sources=5,
        is_captured=True,
    ),
    "shared": Method("upcycle{experts=8 top-k=2 shared=0.5}", to="qwen2_moe", sources=2),
    "grow": Method("upcycle{experts=4 top-k=1},grow"),
    "gguf bf16": Method("upcycle{experts=8 top-k=2}", to="gguf:llama"),
    "merge": Method("merge", after="btx"),
    "prune": Method("prune{keep=7}", after="btx"),
    "to-dense": Method("to-dense{how=concat}", to="llama", after="btx"),
}


@dataclass
class Measured:
    """What was measured of a method; each list has one entry a run."""

    name: str
    read_bytes: int = 0
    written_bytes: int = 0
    largest_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    raw_seconds: list[float] = field(default_factory=list)
    raw_cpu_seconds: list[float] = field(default_factory=list)
    released_seconds: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)

    def ratio(self, of: str = "", to: str = "raw_") -> float | None:
        """Return the median ratio to a raw copy, of ``cpu_`` seconds or of wall time."""
        raw = getattr(self, f"{to}{of}seconds")
        if not raw:
            return None
        pairs = zip(getattr(self, f"{of}seconds"), raw, strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def holds(self) -> bool:
        """Whether memory and time are within their bounds."""
        ratio = self.ratio()
        fits = max(self.resident_bytes) <= LIMIT_BYTES + self.largest_bytes
        return fits and (ratio is None or ratio <= RATIO)

    def line(self) -> str:
        """Return a line about it."""
        wall, cpu = self.ratio(), self.ratio("cpu_")
        ratios = "" if wall is None or cpu is None else (
            f", {wall:.2f} x a raw copy ({statistics.median(self.raw_seconds):.1f} s), "
            f"{cpu:.2f} of its processor time, {self.ratio(to='released_') or 0:.2f} x one that "
            f"forgets ({statistics.median(self.released_seconds):.1f} s)"
        )  # fmt: skip
        return (
            f"{self.name}: read {self.read_bytes / 1e9:.1f} GB, wrote "
            f"{self.written_bytes / 1e9:.1f} GB in {statistics.median(self.seconds):.1f} s "
            f"({statistics.median(self.cpu_seconds):.1f} s of processor time){ratios}; "
            f"{max(self.resident_bytes) / 1e6:.0f} MB resident, the largest tensor has "
            f"{self.largest_bytes / 1e6:.0f} MB: {'holds' if self.holds else 'DOES NOT HOLD'}"
        )


# --- the parts that run in processes of their own


def copy_raw(folder: Path, sources: list[str], sizes: list[int], *, forgets: bool) -> None:
    """Read every byte of `sources`, and write files of these sizes, synchronised."""
    block = bytearray(os.urandom(BLOCK_BYTES))
    view = memoryview(block)
    for source in sources:
        with open(source, "rb", buffering=0) as file:
            while file.readinto(view):
                pass
    for number, size in enumerate(sizes):
        descriptor = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for left in range(size, 0, -RELEASED_BYTES):
            part = min(left, RELEASED_BYTES)
            while part:
                part -= os.write(descriptor, view[:part])
            if forgets:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(descriptor)
        os.close(descriptor)


def make_adapter(folder: Path, shape: Shape) -> None:
    """Write an adapter of rank 16 on every feed-forward matrix."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    rng, pairs = np.random.default_rng(0), {}
    for name, sizes in shape.tensors().items():
        if ".mlp." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for letter, size in (("A", (16, sizes[1])), ("B", (sizes[0], 16))):
                drawn = rng.normal(0, 0.01, size).astype(np.float32)
                pairs[f"{module}.lora_{letter}.weight"] = drawn
    save_file(pairs, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def worker(job: str, folder: str, *rest: str) -> None:
    """Do one of the jobs in this process."""
    if job in ("raw", "released"):
        files, sizes = json.loads(rest[0]), json.loads(rest[1])
        copy_raw(Path(folder), files, sizes, forgets=job == "released")
        return
    shape = replace(SHAPES["synthetic"], layers=int(rest[0]))
    (make_source if job == "source" else make_adapter)(Path(folder), shape)


# --- the parent, which stays small: a child's peak memory is at least that of its parent


def measured(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return its seconds, those of processors, and its peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    seconds = time.perf_counter() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def child(*arguments: object) -> list[str]:
    return [sys.executable, __file__, "--worker", *map(str, arguments)]


def weights(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])


def largest(files: list[Path]) -> int:
    """Return the bytes of the largest tensor of safetensors files."""
    found = [0]
    for path in files:
        if path.suffix != ".safetensors":
            continue
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        ends = (t["data_offsets"] for n, t in header.items() if n != "__metadata__")
        found += [stop - start for start, stop in ends]
    return max(found)


class Sources:
    """Makes the sources that methods need, once each."""

    def __init__(self, work: Path, layers: int) -> None:
        self.work, self.layers = work, layers

    def dense(self, times: int) -> Path:
        """Return a dense model with so many times the layers."""
        folder = self.work / f"dense{times}"
        return self._made(folder, "source", self.layers * times)

    def branch(self, kind: str, name: str) -> Path:
        """Return a model or an adapter besides."""
        job = "source" if kind == "models" else "adapter"
        return self._made(self.work / f"{kind}-{name}", job, self.layers)

    def captured(self, source: Path, times: int) -> Path:
        """Return statistics of a few tokens, of the last five layers; `times` is 5."""
        tens, ones = divmod(self.layers * times - 5, 10)
        where = f"layers.{tens or ''}[{ones}-{ones + 4}].*"
        tokens, out = self.work / "tokens", self.work / "captured"
        moecc = [sys.executable, "-m", "moecc"]
        text = [__file__, "--tokenizer", "bytes", "--out", str(tokens)]
        few = ["--batches", "1", "--batch", "1", "--sequence", "64"]
        taken = [str(source), "--text", str(tokens), "--at", where, "--out", str(out), *few]
        for command in ([*moecc, "tokens", *text], [*moecc, "capture", *taken]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return out

    def _made(self, folder: Path, job: str, layers: int) -> Path:
        if not folder.exists():
            subprocess.run(child(job, folder, layers), check=True)
        return folder


def run(name: str, sources: Sources, pairs: int, *, keep: Path | None = None) -> Measured:
    """Measure a method, against no raw copy without pairs; with `keep`, its output stays there."""
    method, out = METHODS[name], sources.work / "out"
    is_timed = method.is_timed and pairs > 0
    source = sources.work / method.after if method.after else sources.dense(method.sources)
    command = [
        sys.executable, "-m", "moecc", "convert", str(source), str(out), "-p", method.passes,
        "--to", method.to, "--dtype", "bf16",
    ]  # fmt: skip
    read = weights(source)
    for letter in "abc" if method.branches else "":
        branch = sources.branch(method.branches, letter)
        command += ["--experts", f"{letter}={branch}"]
        read += weights(branch)
    if method.is_captured:
        captured = sources.captured(source, method.sources)
        command += ["--capture", str(captured)]
        read += weights(captured)
    found = Measured(name, sum(p.stat().st_size for p in read))
    raw = sources.work / "raw"
    for pair in range(pairs if is_timed else 1):
        sizes = [found.written_bytes or found.read_bytes]
        turns = ("raw", "method", "released") if pair % 2 else ("method", "raw", "released")
        for turn in turns if is_timed else ("method",):
            if is_timed:
                _raw("raw", raw, [], sizes)  # memory that was just released
            if turn != "method":
                seconds, cpu = _raw(turn, raw, read, sizes)
                getattr(found, f"{turn}_seconds").append(seconds)
                if turn == "raw":
                    found.raw_cpu_seconds.append(cpu)
                continue
            seconds, cpu, resident = measured(command)
            found.seconds.append(seconds)
            found.cpu_seconds.append(cpu)
            found.resident_bytes.append(resident)
            sizes = [p.stat().st_size for p in weights(out)]
            found.written_bytes = sum(sizes)
            found.largest_bytes = max(largest(weights(out)), largest(read))
            if keep is not None and not keep.exists():
                out.rename(keep)
            else:
                shutil.rmtree(out)
    return found


def _raw(job: str, folder: Path, read: list[Path], sizes: list[int]) -> tuple[float, float]:
    """Return the seconds of a raw copy, and those of processors."""
    os.sync()
    folder.mkdir()
    texts = json.dumps([str(p) for p in read]), json.dumps(sizes)
    seconds, cpu, _ = measured(child(job, folder, *texts))
    shutil.rmtree(folder)
    return seconds, cpu


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPES["synthetic"].layers)
    parser.add_argument("--work", type=Path, help="on the disk to measure; the current folder")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    done: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="moecc-bench-", dir=options.work or Path.cwd()) as path:
        sources = Sources(Path(path), options.layers)
        later = {METHODS[name].after for name in options.method} - {""}
        for name in dict.fromkeys([*options.method, *later]):
            if METHODS[name].after:
                continue
            keep = sources.work / name if name in later else None
            pairs = options.pairs if name in options.method else 0
            done.append(run(name, sources, pairs, keep=keep))
            _say(options.format, done[-1])
            for spent in sources.work.glob("dense[!1]*"):
                shutil.rmtree(spent)
        for spent in [*sources.work.glob("dense*"), *sources.work.glob("models*")]:
            shutil.rmtree(spent)
        for name in (n for n in options.method if METHODS[n].after):
            done.append(run(name, sources, options.pairs))
            _say(options.format, done[-1])
    if options.format == "json":
        cases: list[dict[str, Any]] = [
            {**asdict(m), "ratio": m.ratio(), "cpu_ratio": m.ratio("cpu_"), "holds": m.holds}
            for m in done
        ]
        print(json.dumps({"schema": SCHEMA, "methods": cases}, indent=2))
    return 0 if all(m.holds for m in done) else 1


def _say(how: str, found: Measured) -> None:
    if how == "human":
        print(found.line(), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
