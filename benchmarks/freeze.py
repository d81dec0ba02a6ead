"""Record what two checkouts do by their command lines, and compare.

    python benchmarks/freeze.py record --moecc OLD/.venv/bin --work build/frozen --out old.json
    python benchmarks/freeze.py record --moecc NEW/.venv/bin --work build/frozen --out new.json
    python benchmarks/freeze.py compare old.json new.json

Every job runs the console script `moecc` of the checkout in a folder of its own, in a process that
is forked from one that has imported jax; two such processes run at a time.  Sections: `golden` (the
bytes of converted golden checkpoints), `graphs` (texts of graphs), `json` (JSON of every command),
`plans`, `census` (collectives of compiled steps), `exits` (exit codes of command lines that are
wrong) and `losses` (the shipped recipes' first ten steps).  By default large sections are sampled
with a seed; `--full` runs everything.

Both records read the golden checkpoints of `--inputs`, by default of this repository.  Texts are in
`OUT.texts.zip` beside a record, and a comparison shows the first lines that differ.  A comparison
ends with exit code 1 where records differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from frozen.inputs import prepare
from frozen.sections import SECTIONS, Choice, section_jobs
from frozen.work import Job, Texts, revision, run_jobs

SCHEMA = "moecc.freeze/1"
# A sum in another order changes losses, logits and differences of losses by rounding.
RELATIVE = {"losses": 1e-5, "json": 1e-5}
ABSOLUTE = {"losses": 1e-7, "json": 1e-6}
ERROR_BOUND = 1e-5
"""Measured errors up to this are rounding."""


def record(args: argparse.Namespace) -> int:
    """Run the jobs and write their results."""
    started = time.monotonic()
    if not (args.moecc / "moecc").exists():
        print(f"{args.moecc}: no program moecc", file=sys.stderr)
        return 2
    # Resolved, the link python would leave the virtual environment.
    python = args.moecc.absolute() / "python"
    work = args.work.absolute()
    inputs = work / "inputs"
    prepare(args.inputs, inputs)
    choice = Choice(inputs, args.sample, args.full, args.seed, args.tpu)
    jobs: list[Job] = []
    for name in args.only or SECTIONS:
        jobs += section_jobs(name, choice)
    _check_names(jobs)
    jobs = [j for j in jobs if args.match in j.name]
    shard, shards = args.shards
    jobs = jobs[shard - 1 :: shards]
    texts = Texts(_texts_path(args.out))
    records = run_jobs(jobs, python, work, texts, args.workers)
    texts.close()
    shutil.rmtree(inputs)
    result = {
        "schema": SCHEMA,
        "commit": revision(python),
        "seed": args.seed,
        "full": args.full,
        "shard": f"{shard}/{shards}",
        "seconds": round(time.monotonic() - started, 1),
        "sections": records,
    }
    args.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
    for name, section in records.items():
        ends = [s["exit"] for r in section.values() for s in r["steps"][-1:]]
        counts = ", ".join(f"{ends.count(e)} with exit {e}" for e in sorted(set(ends), key=str))
        print(f"{name}: {len(section)} jobs, {counts}")
    print(f"written to {args.out} after {result['seconds']} s")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Print the differences of two records by section, and return 1 if there are any."""
    old, new = (json.loads(p.read_text("utf-8")) for p in (args.old, args.new))
    total = 0
    for section in sorted(old["sections"].keys() | new["sections"].keys()):
        if args.only and section not in args.only:
            continue
        differences = list(
            section_differences(
                old["sections"].get(section, {}),
                new["sections"].get(section, {}),
                (RELATIVE.get(section, 1e-9), ABSOLUTE.get(section, 0.0)),
                args.common,
            )
        )
        differences = [d for d in differences if not _is_ignored(d[1], args.ignore)]
        jobs = len({name for name, _, _ in differences})
        print(f"{section}: {len(differences)} differences in {jobs} jobs")
        for name, path, words in differences[: args.most]:
            print(f"  {name}\n    {path}: {words}")
            for line in _lines(args.old, args.new, words):
                print(f"      {line}")
        if len(differences) > args.most:
            print(f"  … and {len(differences) - args.most} more; --most prints them")
        total += len(differences)
    return 1 if total else 0


def section_differences(
    old: dict[str, Any], new: dict[str, Any], tolerance: tuple[float, float], common: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield job, place and words of each difference."""
    for name in sorted(old.keys() | new.keys()):
        if name in old and name in new:
            for path, words in value_differences(old[name], new[name], tolerance):
                yield name, path, words
        elif not common:
            yield name, "job", "only in the " + ("old record" if name in old else "new record")


def value_differences(
    old: Any, new: Any, tolerance: tuple[float, float], path: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield place and words of each difference of two JSON values; numbers may be rounded."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else key
            if key not in new:
                yield inner, f"{_short(old[key])} is no longer there"
            elif key not in old:
                yield inner, f"{_short(new[key])} is new"
            else:
                yield from value_differences(old[key], new[key], tolerance, inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from value_differences(left, right, tolerance, f"{path}[{index}]")
    elif not _equal(old, new, tolerance, path):
        yield path, f"{_short(old)} -> {_short(new)}"


def _equal(old: Any, new: Any, tolerance: tuple[float, float], path: str) -> bool:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new))
    if not numbers or type(old) is int is type(new):
        return bool(old == new) and type(old) is type(new)
    if "error" in path and max(abs(old), abs(new)) <= ERROR_BOUND:
        return True
    relative, absolute = tolerance
    bound = absolute + relative * max(abs(old), abs(new))
    return bool(old == new or abs(old - new) <= bound)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:157]}…"


def _is_ignored(path: str, ignored: Sequence[str]) -> bool:
    return any(word in path for word in ignored)


def _lines(old: Path, new: Path, words: str) -> list[str]:
    """Return the first lines that differ, where both values are digests of stored texts."""
    digests = [w.strip().strip('"') for w in words.split(" -> ")]
    if len(digests) != 2 or not all(_texts_path(p).exists() for p in (old, new)):
        return []
    texts = []
    for path, digest in zip((old, new), digests, strict=True):
        with zipfile.ZipFile(_texts_path(path)) as archive:
            if digest not in archive.namelist():
                return []
            texts.append(archive.read(digest).decode("utf-8", "replace").splitlines())
    pairs = zip(*(t + [""] * (max(map(len, texts)) - len(t)) for t in texts), strict=True)
    changed = [(n, a, b) for n, (a, b) in enumerate(pairs, 1) if a != b]
    return [
        f"line {n}: {sign} {text[:200]}"
        for n, a, b in changed[:2]
        for sign, text in (("-", a), ("+", b))
    ]


def merge(args: argparse.Namespace) -> int:
    """Join the records of shards."""
    parts = [json.loads(p.read_text("utf-8")) for p in args.parts]
    sections: dict[str, Any] = {}
    for part in parts:
        for name, section in part["sections"].items():
            sections.setdefault(name, {}).update(section)
    result = {**parts[0], "shard": "1/1", "sections": sections}
    args.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")
    with zipfile.ZipFile(_texts_path(args.out), "w", zipfile.ZIP_DEFLATED) as archive:
        for path in args.parts:
            with zipfile.ZipFile(_texts_path(path)) as part_texts:
                for digest in set(part_texts.namelist()) - set(archive.namelist()):
                    archive.writestr(digest, part_texts.read(digest))
    return 0


def _texts_path(record_path: Path) -> Path:
    return record_path.with_name(record_path.name + ".texts.zip")


def _check_names(jobs: Sequence[Job]) -> None:
    names = [(j.section, j.name) for j in jobs]
    assert len(names) == len(set(names)), "two jobs have one name"


def _shard(text: str) -> tuple[int, int]:
    shard, shards = map(int, text.split("/"))
    if not 1 <= shard <= shards:
        raise ValueError(text)
    return shard, shards


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("record", help="run the jobs and write their results")
    command.add_argument(
        "--moecc",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the checkout's programs: .venv/bin",
    )
    command.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="folder for inputs and outputs"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="record to write")
    command.add_argument(
        "--inputs",
        type=Path,
        default=Path(__file__).parents[1],
        metavar="DIR",
        help="repository with the golden checkpoints (default: this one)",
    )
    command.add_argument(
        "--only", nargs="+", choices=[*SECTIONS], help="sections to run (default: all)"
    )
    command.add_argument(
        "--match", default="", metavar="TEXT", help="run only jobs whose name has this text"
    )
    command.add_argument(
        "--shards",
        type=_shard,
        default=(1, 1),
        metavar="K/N",
        help="run the K-th of N parts of the jobs",
    )
    command.add_argument("--sample", type=int, metavar="N", help="jobs of each sampled section")
    command.add_argument("--full", action="store_true", help="run all jobs, not samples")
    command.add_argument("--seed", type=int, default=0, help="seed of the samples")
    command.add_argument("--workers", type=int, default=2, help="processes that run jobs")
    command.add_argument(
        "--tpu", action="store_true", help="also compile for TPUs, which takes libtpu"
    )
    command.set_defaults(run=record)
    command = commands.add_parser("compare", help="print the differences of two records")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument(
        "--only", nargs="+", choices=[*SECTIONS], help="sections to compare (default: all)"
    )
    command.add_argument(
        "--common", action="store_true", help="compare only jobs that both records have"
    )
    command.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="ignore differences whose place has this text: README.md",
    )
    command.add_argument(
        "--most", type=int, default=20, metavar="N", help="differences to print of a section"
    )
    command.set_defaults(run=compare)
    command = commands.add_parser("merge", help="join the records of shards")
    command.add_argument("out", type=Path)
    command.add_argument("parts", type=Path, nargs="+")
    command.set_defaults(run=merge)
    args = parser.parse_args()
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
