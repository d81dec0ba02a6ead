"""Two of a thousand parts of a conversion of DeepSeek-V3, 1.3 TB behind a hub on this machine.

    PYTHONPATH=tests/support python -m tests.proof.parts [--work FOLDER] --out FILE

The checkpoint is sparse files: headers, and random numbers where the two parts read.  A server with
the hub's routes has them.  Each part is a process of its own, and its tensors must be those of the
source; processes may have 2 GB of memory.  It takes 6 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from hub_server import HubServer

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.weights.expr import sources
from tests.reports import machine

CONFIGS = Path(__file__).parents[1] / "families" / "published.json"
MODEL, PARTS, CHOSEN = "DeepSeek-V3", 1000, (1, 500)
SHARD_BYTES, MEMORY_BYTES = 8 * 10**9, 2 * 10**9
BLOCK_BYTES = 1 << 24

Places = dict[str, tuple[Path, int, int]]
"""By the name of a tensor its file, and its first byte and the byte behind its last there."""


def write_headers(folder: Path) -> Places:
    """Write a checkpoint whose tensors are holes, and return where they are."""
    folder.mkdir(parents=True)
    config = json.loads(CONFIGS.read_text())[MODEL]
    (folder / "config.json").write_text(json.dumps(config))
    params = build(parse_config(config)).params.values()
    shapes = {leaf.name: [a.size for a in leaf.type] for p in params if p.weight is not None
              for leaf in sources(p.weight)}  # fmt: skip
    shards = [{}]
    end = 0
    for name, shape in sorted(shapes.items()):
        size = 2 * int(np.prod(shape, dtype=np.int64))
        if end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        shards[-1][name] = entry
        end += size
    places = {}
    for number, header in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            places[name] = path, data + first, data + last
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, max(last for of, _, last in places.values() if of == path))
    total = sum(last - first for _, first, last in places.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: p[0].name for n, p in places.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return places


def fill(place: tuple[Path, int, int], rng: np.random.Generator):
    """Write random bf16 values between 2^-7 and 2^-6 where a tensor is."""
    path, first, last = place
    with path.open("r+b") as file:
        file.seek(first)
        # Block by block: the peak of this process counts as one of those that it starts.
        for begin in range(first, last, BLOCK_BYTES):
            count = (min(begin + BLOCK_BYTES, last) - begin) // 2
            bits = rng.integers(0, 1 << 16, count, np.uint16)
            file.write(((bits & 0x807F) | 0x3C00).tobytes())


def tensors_of(folder: Path) -> Iterator[tuple[str, Path, int, int]]:
    """Yield the tensors of the shards in a folder: name, file, first byte and the one behind."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                yield name, path, first, last


def digest(path: Path, first: int, last: int) -> str:
    """Return the hash of bytes of a file."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(first)
        for begin in range(first, last, BLOCK_BYTES):
            hashed.update(file.read(min(BLOCK_BYTES, last - begin)))
    return hashed.hexdigest()


def convert(out: Path, number: int) -> tuple[Path, float, int]:
    """Write a part; return its folder, its seconds and the most memory of its process."""
    command = [
        sys.executable, "-m", "moecc", "convert", f"hf://org/{MODEL}", str(out), "--to", "auto",
        "--dtype", "bf16", "--no-check", "--max-shard-bytes", "1300000000",
        "--part", f"{number}/{PARTS}",
    ]  # fmt: skip
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    (part,) = out.parent.glob(f".{out.name}.moecc-parts/*{number:0{len(str(PARTS))}}*")
    return part, time.monotonic() - begun, usage.ru_maxrss * 1024


def prove(work: Path) -> dict[str, Any]:
    """Write the parts, once to see what they read and once with numbers there, and compare."""
    places = write_headers(work / "hub" / "org" / MODEL / "main")
    server = HubServer(work / "hub")
    os.environ |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_of_a_proof", "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(work / "home")}  # fmt: skip
    rng, rows, out = np.random.default_rng(0), {}, work / "out"
    for number in CHOSEN:
        part, _, _ = convert(out, number)
        for name, *_ in tensors_of(part):
            fill(places[name], rng)
        shutil.rmtree(part)
        before = server.sent_bytes
        part, seconds, memory_bytes = convert(out, number)
        sent = server.sent_bytes - before
        tensors = list(tensors_of(part))
        wrong = [name for name, *where in tensors if digest(*where) != digest(*places[name])]
        assert tensors, "a part has tensors"
        assert not wrong, wrong
        assert memory_bytes < MEMORY_BYTES, memory_bytes
        written = sum(last - first for _, _, first, last in tensors)
        rows[f"{number}/{PARTS}"] = {
            "tensors": len(tensors), "written_bytes": written, "received_bytes": sent,
            "memory_bytes": memory_bytes, "seconds": round(seconds), "wrong": len(wrong),
        }  # fmt: skip
        shutil.rmtree(part)
    server.shutdown()
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "model": MODEL,
        "tensors": len(places), "bytes": sum(last - first for _, first, last in places.values()),
        "parts": rows,
    }  # fmt: skip


def main() -> int:
    """Run, and write what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, help="a folder on a disk with 6 GB")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moecc-parts-", dir=asked.work) as folder:
        report = prove(Path(folder))
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
