"""Jobs, the processes that run them, and the records of their results."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "MOECC_PROGRESS": "off",
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # LLVM's optimiser takes most of a compilation, and changes nothing that is recorded here.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1",
}
PRELOAD_STEP = ["run", "$GOLDEN/llama_gqa", "--outputs", "logits.npy"]


@dataclass(frozen=True)
class Step:
    """A command line, or a Python text that uses the public API alone, and what is recorded.

    `record` is `exit` (the exit code), `json` or `text` (stdout as well).
    """

    argv: tuple[str, ...] = ()
    record: str = "exit"
    code: str = ""


@dataclass(frozen=True)
class Job:
    """Steps in an empty folder, which end at the first that fails, and the files they write.

    `inputs` are files written before the first step: `{"golden": PATH}` or `{"data": BASE64}`.
    """

    section: str
    name: str
    steps: tuple[Step, ...]
    outputs: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 300.0
    keep_going: bool = False


class Texts:
    """A zip file of texts by their digests, so that a comparison can show lines."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
        self._digests: set[str] = set()
        self._lock = threading.Lock()

    def add(self, text: str) -> str:
        """Store `text` and return its digest."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        with self._lock:
            if digest not in self._digests:
                self._digests.add(digest)
                self._zip.writestr(digest, text.encode("utf-8", "surrogateescape"))
        return digest

    def close(self) -> None:
        """Finish the file."""
        self._zip.close()


class Worker:
    """One process of `worker.py` on the interpreter of a checkout."""

    def __init__(self, python: Path, work: Path, number: int, texts: Texts) -> None:
        self._work, self._texts = work, texts
        self._folder = work / f"job-{number}"
        home = work / f"home-{number}"
        home.mkdir(parents=True, exist_ok=True)
        self._home = home
        environment = {**ENVIRONMENT, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        environment["PATH"] = f"{python.parent}:{environment['PATH']}"
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).parent / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=home,
        )
        self._clear()
        self._call(Step(tuple(PRELOAD_STEP)), 300.0)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, job: Job) -> dict[str, Any]:
        """Run `job` and return its record."""
        self._clear()
        for name, content in job.inputs.items():
            self._write(name, content)
        steps = []
        for step in job.steps:
            code = self._call(step, job.seconds)
            steps.append(self._step_record(step, code))
            if code != 0 and not job.keep_going:
                break
        record: dict[str, Any] = {"steps": steps}
        if job.outputs:
            record["files"] = {
                name: self._file_record(path) for name, path in self._outputs(job.outputs)
            }
        return record

    def _clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def _write(self, name: str, content: dict[str, str] | None) -> None:
        path = self._folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if content and "golden" in content:
            shutil.copyfile(self._work / "inputs" / "golden" / content["golden"], path)
        elif content:
            path.write_bytes(base64.b64decode(content["data"]))

    def _call(self, step: Step, seconds: float) -> int | None:
        message: dict[str, Any] = {
            "cwd": str(self._folder),
            "env": {},
            "stdout": str(self._home / "stdout"),
            "stderr": str(self._home / "stderr"),
            "seconds": seconds,
        }
        if step.code:
            message["code"] = self._filled(step.code)
        else:
            message["argv"] = [self._filled(word) for word in step.argv]
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker ended in {step.argv or step.code}")
        code: int | None = json.loads(answer)
        return code

    def _filled(self, text: str) -> str:
        text = text.replace("$GOLDEN", str(self._work / "inputs" / "golden"))
        text = text.replace("$INPUTS", str(self._work / "inputs"))
        return text.replace("$JOB", str(self._folder))

    def _plain(self, text: str) -> str:
        """Return `text` without what depends on the folder of work."""
        text = text.replace(str(self._folder), "$JOB").replace(str(self._work), "$WORK")
        return text.replace(self._folder.name, "$JOB")

    def _step_record(self, step: Step, code: int | None) -> dict[str, Any]:
        record: dict[str, Any] = {"exit": "time" if code is None else code}
        if step.record == "exit" or code is None:
            return record
        text = self._plain((self._home / "stdout").read_text("utf-8", "surrogateescape"))
        if step.record == "json":
            try:
                record["json"] = normalised(json.loads(text))
            except ValueError:
                record["not json"] = self._texts.add(text)
        else:
            record["text"] = self._texts.add(text)
        return record

    def _outputs(self, patterns: Sequence[str]) -> Iterator[tuple[str, Path]]:
        for pattern in patterns:
            for path in sorted(self._folder.glob(pattern)):
                if path.is_file():
                    yield path.relative_to(self._folder).as_posix(), path
                elif path.is_dir():
                    for inner in sorted(path.rglob("*")):
                        if inner.is_file():
                            yield inner.relative_to(self._folder).as_posix(), inner

    def _file_record(self, path: Path) -> Any:
        if path.suffix == ".safetensors":
            return tensors_record(path)
        if path.name == "moecc_manifest.json":
            return manifest_record(json.loads(path.read_text("utf-8")))
        if path.suffix == ".json":
            return normalised(json.loads(self._plain(path.read_text("utf-8"))))
        if path.suffix == ".jsonl":
            lines = self._plain(path.read_text("utf-8")).splitlines()
            return [normalised(json.loads(line)) for line in lines]
        if path.suffix in {".md", ".moe", ".txt", ".toml"}:
            return {"text": self._texts.add(unversioned(self._plain(path.read_text("utf-8"))))}
        if path.suffix == ".npy":
            return array_record(path)
        return {"sha256": digest(path.read_bytes()), "bytes": path.stat().st_size}


# --- records of files


def digest(data: bytes) -> str:
    """Return the first half of the SHA-256 digest, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:32]


def tensors_record(path: Path) -> dict[str, Any]:
    """Return the digest of a .safetensors file and of each tensor with its type and shape."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    record: dict[str, Any] = {"sha256": digest(data), "metadata": header.pop("__metadata__", None)}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        record[name] = f"{entry['dtype']}{entry['shape']} {digest(data[start:stop])}"
    return record


def array_record(path: Path) -> dict[str, Any]:
    """Return the shape of a .npy file, and for floats figures that survive rounding."""
    data = path.read_bytes()
    size = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + size].decode("latin-1").strip()
    if "'<f4'" not in header:
        return {"header": header, "sha256": digest(data)}
    values = struct.unpack(f"<{(len(data) - 10 - size) // 4}f", data[10 + size :])
    weighted = math.fsum(v * ((i * 7919) % 101 - 50) for i, v in enumerate(values))
    return {
        "header": header,
        "sum of magnitudes": math.fsum(map(abs, values)),
        "weighted sum": weighted / max(1.0, math.fsum(map(abs, values))),
    }


def manifest_record(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without versions, and without digests of files whose words may change."""
    for name in ("README.md", "moecc_receipt.json"):
        if name in manifest.get("files", {}):
            manifest["files"][name] = "is compared as a file"
    manifest.pop("seal", None)
    tensors = manifest.get("tensors")
    record: dict[str, Any] = normalised(manifest)
    if tensors is not None:
        record["tensors"] = {
            "count": len(tensors),
            "sha256": digest(json.dumps(tensors, sort_keys=True).encode()),
        }
    return record


VOLATILE = re.compile(
    r"(^|_)(seconds|time|date|host|pid|started|ended|elapsed|per_second|versions?|usable_bytes"
    r"|host_peak_bytes|hostname|platform)($|_)"
)


def normalised(value: Any, keep: bool = False) -> Any:
    """Return JSON without times, hosts and versions; `keep` is for plans, whose times are exact."""
    if isinstance(value, dict):
        return {
            k: "…" if VOLATILE.search(k) and not _is_structure(v) and not keep
            else normalised(v, keep or k == "predicted")
            for k, v in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [normalised(v, keep) for v in value]
    if isinstance(value, str):
        return unversioned(value)
    return value


def _is_structure(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, dict | list) for v in value)


def unversioned(text: str) -> str:
    """Return `text` without the version of moecc."""
    return re.sub(r"\bmoecc \d+\.\d+\.\d+\S*", "moecc VERSION", text)


# --- running


def run_jobs(
    jobs: Sequence[Job], python: Path, work: Path, texts: Texts, count: int
) -> dict[str, Any]:
    """Run `jobs` in `count` workers and return their records by section and name."""
    left = list(reversed(jobs))
    records: dict[str, Any] = {}
    lock = threading.Lock()
    errors: list[BaseException] = []

    def serve(number: int) -> None:
        try:
            worker = Worker(python, work, number, texts)
            while True:
                with lock:
                    if not left or errors:
                        break
                    job = left.pop()
                    done = len(jobs) - len(left)
                    if done % 50 == 0:
                        print(f"{done} of {len(jobs)} jobs", file=sys.stderr, flush=True)
                record = worker.run(job)
                with lock:
                    records.setdefault(job.section, {})[job.name] = record
            worker.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {s: dict(sorted(records[s].items())) for s in sorted(records)}


def revision(python: Path) -> str:
    """Return the commit of the checkout that `python` belongs to."""
    command = ["git", "-C", str(python.parent), "rev-parse", "--short=12", "HEAD"]
    environment = {"PATH": os.environ.get("PATH", "")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return result.stdout.strip() or "unknown"
