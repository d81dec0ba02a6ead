"""What a proof costs: seconds and memory, and its share of a conversion's time.

    python benchmarks/prove.py [--out FILE] [--pairs 5] [--smollm2 FILE.gguf]

Proofs of upcycled models at their real sizes, each in a process of its own: SmolLM2-135M and
Llama-3.1-8B with 8 experts, as `convert` proves them, source against result through the names of
the target; and 10,000 layers that are rolled into one, before and after. Memory is what the process
has at its peak over what it had before.

With ``--smollm2``, the checkpoint of ``make demo``, it is also converted with and without
``--no-check``, in turns; the figure is the median of the ratios of pairs.

Exit code 1 if a bound does not hold: 3 s and 100 MB, 8 s, 2 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from time import perf_counter, process_time

UPCYCLE = "upcycle{experts=8 top-k=2}"
LAYERS = 10_000

BOUNDS_SECONDS = {"smollm2-135m": 3.0, "llama-3.1-8b": 8.0, "rolled": 2.0}
BOUND_BYTES = 100 * 10**6
"""Of SmolLM2-135M."""


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prove_conversion(name: str) -> dict[str, float | str]:
    """Convert a preset in memory, and prove the result; return verdict, seconds and bytes."""
    from moecc.ir.structure import clone
    from moecc.model.open import open_model
    from moecc.prove import Prover
    from moecc.prove.conversion import prove_conversion as prove
    from moecc.rewrite.pipeline import Pipeline
    from moecc.rewrite.runner import run_pipeline
    from moecc.translate.export import export_graph

    with open_model(f"preset:{name}") as model:
        after = clone(model.graph)
        run_pipeline(after, Pipeline.parse(UPCYCLE))
        export = export_graph(after, "mixtral")
        before, start = peak_bytes(), process_time()
        proof = prove(model.graph, export, Prover())
    return {"verdict": proof.verdict.status, "seconds": process_time() - start,
            "bytes": peak_bytes() - before}  # fmt: skip


def prove_rolled(layers: int) -> dict[str, float | str]:
    """Prove an upcycled model of many layers that are rolled; return verdict, seconds and bytes."""
    from moecc.families import build
    from moecc.families.registry import parse_config
    from moecc.ir.structure import clone
    from moecc.presets import preset_config
    from moecc.prove import prove
    from moecc.rewrite.pipeline import Pipeline
    from moecc.rewrite.runner import run_pipeline

    config = {**preset_config("smollm2-135m"), "num_hidden_layers": layers}
    dense = build(parse_config(config))
    sparse = clone(dense)
    run_pipeline(dense, Pipeline.parse("roll-layers"))
    run_pipeline(sparse, Pipeline.parse(f"{UPCYCLE},roll-layers"))
    before, start = peak_bytes(), process_time()
    verdict = prove(dense, sparse)
    return {"verdict": verdict.status, "seconds": process_time() - start,
            "bytes": peak_bytes() - before}  # fmt: skip


def measured(name: str) -> dict[str, float | str]:
    """Return the figures of a case, from a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--case", name], check=True,
                          capture_output=True, text=True)  # fmt: skip
    figures: dict[str, float | str] = json.loads(done.stdout)
    return figures


def conversion_ratios(source: Path, pairs: int) -> list[float]:
    """Return the wall time of conversions with the proof over those without, by pair."""

    def seconds(work: str, *words: str) -> float:
        shutil.rmtree(Path(work) / "out", ignore_errors=True)
        start = perf_counter()
        subprocess.run(
            [sys.executable, "-m", "moecc", "convert", source, Path(work) / "out", "-p", UPCYCLE,
             "--to", "mixtral", "--dtype", "bf16", "--quiet", *words],
            check=True, capture_output=True,
        )  # fmt: skip
        return perf_counter() - start

    ratios = []
    with tempfile.TemporaryDirectory() as work:
        for pair in range(pairs):
            arms = [(), ("--no-check",)]
            times = {arm: seconds(work, *arm) for arm in (arms if pair % 2 else arms[::-1])}
            ratios.append(times[()] / times["--no-check",])
    return ratios


def main() -> int:
    """Measure, print and write the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file to write the figures to")
    parser.add_argument("--pairs", type=int, default=5, help="how many pairs of conversions to run")
    parser.add_argument("--smollm2", type=Path, help="the checkpoint to convert")
    parser.add_argument("--case", choices=BOUNDS_SECONDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        figures = (prove_rolled(LAYERS) if arguments.case == "rolled"
                   else prove_conversion(arguments.case))  # fmt: skip
        print(json.dumps(figures))
        return 0
    cases = {name: measured(name) for name in BOUNDS_SECONDS}
    document = {"date": date.today().isoformat(), "machine": platform.machine(),
                "python": platform.python_version(), "proofs": cases}  # fmt: skip
    if arguments.smollm2 is not None:
        ratios = conversion_ratios(arguments.smollm2, arguments.pairs)
        document["conversion"] = {"ratio": statistics.median(ratios), "pairs": sorted(ratios)}
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, "utf-8")
    is_proved = all(case["verdict"] == "proved" for case in cases.values())
    is_fast = all(float(cases[name]["seconds"]) <= bound for name, bound in BOUNDS_SECONDS.items())
    return (
        0 if is_proved and is_fast and float(cases["smollm2-135m"]["bytes"]) <= BOUND_BYTES else 1
    )


if __name__ == "__main__":
    sys.exit(main())
