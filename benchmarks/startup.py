"""How long ``moecc`` takes to start, and whether it imports jax.

    python benchmarks/startup.py [--runs 15] [--format json]

Each command runs in a process of its own, the commands in turn; the figure is the median of the
wall time.  A bare ``python -c pass`` stands beside them, since it is part of every one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BOUND_SECONDS = 0.3
GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "llama_gqa"


def commands(folder: Path) -> dict[str, list[str]]:
    graph = folder / "model.moe"
    start = [sys.executable, "-m", "moecc"]
    subprocess.run([*start, "import", str(GOLDEN), "-o", str(graph), "--force"], check=True)
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "moecc --help": [*start, "--help"],
        "moecc inspect": [*start, "inspect", str(GOLDEN)],
        "moecc opt": [*start, "opt", str(graph), "-p", "canonicalize"],
    }


def loads_jax(command: list[str]) -> bool:
    """Return whether a command has jax among its modules when it ends."""
    code = (
        "import sys\nfrom moecc.cli.main import main\n"
        f"main({command[3:]!r})\nprint('JAX' if 'jax' in sys.modules else 'NO JAX')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.rstrip().endswith("\nJAX")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    args = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = commands(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(args.runs + 1):
            for name, command in found.items():
                spent = seconds(command)
                # The first turn fills the caches of the disk.
                if turn:
                    times[name].append(spent)
        jax = {name: loads_jax(c) for name, c in found.items() if "moecc" in c}
    rows = {
        name: {
            "median_seconds": statistics.median(spent),
            "min_seconds": min(spent),
            "max_seconds": max(spent),
            "imports_jax": jax.get(name, False),
        }
        for name, spent in times.items()
    }
    if args.format == "json":
        print(json.dumps({"schema": "moecc.benchmark.startup/1", "commands": rows}, indent=2))
        return 0
    for name, row in rows.items():
        print(
            f"{name:16} median {row['median_seconds']:.3f} s  "
            f"({row['min_seconds']:.3f}-{row['max_seconds']:.3f})"
            f"{'  imports jax!' if row['imports_jax'] else ''}"
        )
    print(f"bound: {BOUND_SECONDS} s, without jax")
    return 0


if __name__ == "__main__":
    sys.exit(main())
