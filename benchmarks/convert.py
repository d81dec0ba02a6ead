"""How fast a conversion writes, and in how much memory, against the disk itself.

    python benchmarks/convert.py [--case smollm2 synthetic large] [--pairs 5] [--format json]
        [--source FOLDER] [--work FOLDER] [--library | --command 'COMMAND {source} {out}']

A dense Llama folder in bf16 becomes a mixture of 8 experts.  Each run is a process of its own,
whose wall time and peak resident memory are measured from outside.  Beside it, a process writes the
same number of bytes into fresh files of the same sizes on the same disk and synchronises them; only
its writing counts, not its start.  The two take turns, now one first, now the other; the figure is
the median of the ratios of pairs, since a disk drifts more than the programs differ.

``smollm2`` has the shapes of SmolLM2-135M, 1.38 GB to write, or is the folder given as --source.
``synthetic`` writes 10 GB, and ``large``, which is run where it is named, 20 GB in shards of 200 MB
(24 GB of disk at a time).  Sources are made in the work folder where they are not given;
everything is removed in the end.

Exit code 1 if a bound does not hold: smollm2 at most twice the raw write and a second; synthetic at
most 1.5 times the larger of the raw write and hashing its distinct tensors once; 400 MB resident.
large at most 1.1 times the raw write, and 300 MB resident.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
EXPERTS = 8
LIMIT_BYTES = 400 * 10**6
LIMITS_BYTES = {"large": 300 * 10**6}
RAW_BLOCK_BYTES = 8 << 20
CLI = (
    f"{shlex.quote(sys.executable)} -m moecc convert {{source}} {{out}} "
    f"-p 'upcycle{{{{experts={EXPERTS} top-k=2}}}}' --to mixtral --dtype bf16"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    layers: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a checkpoint with their sizes."""
        head = self.embed // self.heads
        made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.embed)}
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            made |= {
                f"{layer}.self_attn.q_proj.weight": (self.embed, self.embed),
                f"{layer}.self_attn.k_proj.weight": (self.kv_heads * head, self.embed),
                f"{layer}.self_attn.v_proj.weight": (self.kv_heads * head, self.embed),
                f"{layer}.self_attn.o_proj.weight": (self.embed, self.embed),
                f"{layer}.mlp.gate_proj.weight": (self.mlp, self.embed),
                f"{layer}.mlp.up_proj.weight": (self.mlp, self.embed),
                f"{layer}.mlp.down_proj.weight": (self.embed, self.mlp),
                f"{layer}.input_layernorm.weight": (self.embed,),
                f"{layer}.post_attention_layernorm.weight": (self.embed,),
            }
        made["model.norm.weight"] = (self.embed,)
        return made if self.tied else made | {"lm_head.weight": (self.vocab, self.embed)}

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.embed,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "smollm2": Shape(30, 576, 1536, 9, 3, 49152, tied=True),
    "synthetic": Shape(17, 2048, 5632, 32, 4, 32000, tied=False),
    "large": Shape(35, 2048, 5632, 32, 4, 32000, tied=False),
}
SHARDS = {"large": ["--max-shard-bytes", "200000000"]}
"""What a case adds to the command."""


@dataclass
class Case:
    """What was measured of one case; each list has one entry a pair."""

    name: str
    written_bytes: int = 0
    hash_seconds: float = 0.0
    raw_seconds: list[float] = field(default_factory=list)
    convert_seconds: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)

    @property
    def bounds(self) -> list[float]:
        """The seconds that each conversion might have taken."""
        if self.name == "smollm2":
            return [2 * raw + 1 for raw in self.raw_seconds]
        if self.name == "large":
            return [1.1 * raw for raw in self.raw_seconds]
        return [1.5 * max(raw, self.hash_seconds) for raw in self.raw_seconds]

    def median(self, of: str) -> float:
        """Return the median ratio to the raw write, or share of the bound."""
        pairs = zip(self.convert_seconds, self.raw_seconds, self.bounds, strict=True)
        if of == "ratio":
            return statistics.median(c / raw for c, raw, _ in pairs)
        return statistics.median(c / bound for c, _, bound in pairs)

    @property
    def holds(self) -> bool:
        """Whether time and memory are within their bounds."""
        limit = LIMITS_BYTES.get(self.name, LIMIT_BYTES)
        return self.median("share") <= 1 and max(self.resident_bytes) <= limit


# --- the parts that run in processes of their own


def make_source(folder: Path, shape: Shape) -> None:
    """Write a Llama folder of random bf16 values between 2^-7 and 2^-6, every tensor another."""
    import numpy as np

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config()))
    header: dict[str, Any] = {}
    at = 0
    for name, sizes in shape.tensors().items():
        nbytes = 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for sizes in shape.tensors().values():
            bits = rng.integers(0, 1 << 16, int(np.prod(sizes)), np.uint16)
            file.write(((bits & 0x807F) | 0x3C00).tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_raw(folder: Path, sizes: list[int]) -> float:
    """Return the seconds that writing and synchronising files of these sizes takes."""
    block = memoryview(os.urandom(RAW_BLOCK_BYTES))
    started = time.perf_counter()
    for number, size in enumerate(sizes):
        descriptor = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        while size:
            size -= os.write(descriptor, block[:size])
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def hash_source(folder: Path) -> float:
    """Return the seconds that hashing each tensor of a folder once takes, read from the cache."""
    import hashlib

    from moecc.formats.open import open_checkpoint

    spent = 0.0
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            data = checkpoint.read(name).reshape(-1).view("u1").data
            started = time.perf_counter()
            hashlib.sha256(data).digest()
            spent += time.perf_counter() - started
    return spent


def convert_by_library(source: Path, out: Path) -> None:
    """Copy every feed-forward tensor to 8 experts with `write_checkpoint` alone."""
    from moecc.formats.open import open_checkpoint
    from moecc.formats.writer import OutputTensor, write_checkpoint
    from moecc.types import Axis, TensorType
    from moecc.weights.expr import Source
    from moecc.weights.movement import Index, Tile

    out.mkdir()
    with open_checkpoint(source) as checkpoint:
        tensors = []
        for name, info in checkpoint.tensors.items():
            axes = tuple(Axis(f"axis{i}", size) for i, size in enumerate(info.shape))
            weight = Source(name, TensorType(info.dtype, axes))
            if ".mlp." not in name:
                tensors.append(OutputTensor(name, weight, info.dtype))
                continue
            for e in range(EXPERTS):
                expert = Index(Tile(weight, "expert", EXPERTS), "expert", e)
                new = name.replace(".mlp.", f".block_sparse_moe.experts.{e}.")
                tensors.append(OutputTensor(new, expert, info.dtype))
        write_checkpoint(out, tensors, checkpoint.read)


def worker(arguments: list[str]) -> None:
    """Do one of the jobs above in this process; print its seconds."""
    job, folder, *rest = arguments
    if job == "source":
        make_source(Path(folder), SHAPES[rest[0]])
    elif job == "raw":
        print(write_raw(Path(folder), [int(size) for size in rest]))
    elif job == "hash":
        print(hash_source(Path(folder)))
    else:
        convert_by_library(Path(folder), Path(rest[0]))


# --- the parent, which stays small: a child's peak memory is at least that of its parent


def child(job: str, *arguments: object) -> str:
    command = [sys.executable, __file__, "--worker", job, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measured(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{said}")
    return seconds, usage.ru_maxrss * 1024


def run_case(name: str, source: Path, work: Path, command: str, pairs: int) -> Case:
    out, raw = work / "out", work / "raw"
    words = [w.format(source=source, out=out) for w in shlex.split(command)]
    case = Case(name)
    measured(words)  # fills the cache, and shows the sizes of the files
    sizes = sorted(p.stat().st_size for p in out.glob("*.safetensors"))
    shutil.rmtree(out)
    case.written_bytes = sum(sizes)
    case.hash_seconds = float(child("hash", source))
    for pair in range(pairs):
        for turn in ("raw", "convert") if pair % 2 else ("convert", "raw"):
            os.sync()
            if turn == "raw":
                raw.mkdir()
                case.raw_seconds.append(float(child("raw", raw, *sizes)))
                shutil.rmtree(raw)
                continue
            seconds, resident = measured(words)
            case.convert_seconds.append(seconds)
            case.resident_bytes.append(resident)
            shutil.rmtree(out)
    return case


def report(case: Case) -> str:
    verdict = "holds" if case.holds else "DOES NOT HOLD"
    rules = {"smollm2": "2 x raw + 1 s", "large": "1.1 x raw"}
    rule = rules.get(case.name, "1.5 x max(raw, hash)")
    return "\n".join(
        [
            f"{case.name}: {case.written_bytes / 1e9:.2f} GB, {len(case.raw_seconds)} pairs",
            f"  convert  {statistics.median(case.convert_seconds):7.2f} s",
            f"  raw      {statistics.median(case.raw_seconds):7.2f} s",
            f"  hash     {case.hash_seconds:7.2f} s, every tensor of the source once",
            f"  ratio    {case.median('ratio'):7.2f} convert / raw, median of pairs",
            f"  bound    {case.median('share'):7.2f} of {rule}, median of pairs",
            f"  resident {max(case.resident_bytes) / 1e6:7.0f} MB at most",
            f"  {verdict}",
        ]
    )


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    usual = [name for name in SHAPES if name not in SHARDS]
    parser.add_argument("--case", nargs="+", choices=SHAPES, default=usual)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--source", type=Path, help="the folder for smollm2")
    parser.add_argument("--work", type=Path, help="on the disk to measure; the current folder")
    parser.add_argument("--library", action="store_true", help="write_checkpoint alone")
    parser.add_argument("--command", default=CLI, help="another command, with {source} and {out}")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    command = options.command
    if options.library:
        quoted = f"{shlex.quote(sys.executable)} {shlex.quote(__file__)}"
        command = f"{quoted} --worker library {{source}} {{out}}"
    cases = []
    with tempfile.TemporaryDirectory(prefix="moecc-bench-", dir=options.work or Path.cwd()) as path:
        for name in options.case:
            work = Path(path) / name
            work.mkdir()
            source = options.source if name == "smollm2" else None
            if source is None:
                source = work / "source"
                child("source", source, name)
            line = " ".join([command, *SHARDS.get(name, ())])
            cases.append(run_case(name, source, work, line, options.pairs))
            shutil.rmtree(work)
            if options.format == "human":
                print(report(cases[-1]), flush=True)
    if options.format == "json":
        found = [
            {**asdict(c), "ratio": c.median("ratio"), "share": c.median("share"), "holds": c.holds}
            for c in cases
        ]
        print(json.dumps({"schema": SCHEMA, "command": command, "cases": found}, indent=2))
    return 0 if all(case.holds for case in cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
