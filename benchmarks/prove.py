"""What a proof costs: seconds and memory, and its share of a conversion's time.

    python benchmarks/prove.py [--out FILE] [--rounds 6] [--smollm2 FILE.gguf]

Proofs of upcycled models at their real sizes, each in a process of its own: SmolLM2-135M and
Llama-3.1-8B with 8 experts, as `convert` proves them, source against result through the names of
the target; and 10,000 layers that are rolled into one, before and after. Memory is what the process
has at its peak over what it had before.

With ``--smollm2``, the checkpoint of ``make demo``, it is also converted with the proof, with the
sampling that the proof replaces, and with ``--no-check``, in turns; the figures are the medians of
the ratios of wall times in a round.

Exit code 1 if a bound does not hold: 3 s and 100 MB, 8 s, 2 s; 1.1 of a conversion with sampling.
"""

from __future__ import annotations

import argparse
import gc
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

BOUND_RATIO = 1.1
"""Of a conversion with the proof to one that samples instead."""

SAMPLING = (
    "from moecc.cli.main import entry\n"
    "from moecc.prove.prover import Prover, Verdict\n"
    "Prover.prove = lambda *graphs, **options: Verdict('unknown')\n"
    "entry()"
)
"""The command without the prover, so that each promise rests on samples."""


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
    gc.collect()  # what unrolled layers left, millions of objects
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


def conversion_ratios(source: Path, rounds: int) -> dict[str, list[float]]:
    """Return the wall time of conversions with the proof over those of other arms, by round."""
    arms = {
        "proof": ["-m", "moecc"],
        "sampling": ["-c", SAMPLING],
        "no check": ["-m", "moecc"],
    }

    def seconds(work: str, arm: str) -> float:
        shutil.rmtree(Path(work) / "out", ignore_errors=True)
        words = ["--no-check"] if arm == "no check" else []
        start = perf_counter()
        subprocess.run(
            [sys.executable, *arms[arm], "convert", source, Path(work) / "out", "-p", UPCYCLE,
             "--to", "mixtral", "--dtype", "bf16", "--quiet", *words],
            check=True, capture_output=True,
        )  # fmt: skip
        return perf_counter() - start

    ratios: dict[str, list[float]] = {"sampling": [], "no check": []}
    with tempfile.TemporaryDirectory() as work:
        for number in range(rounds):
            order = [*arms][number % 3 :] + [*arms][: number % 3]
            times = {arm: seconds(work, arm) for arm in order}
            for other, values in ratios.items():
                values.append(times["proof"] / times[other])
    return ratios


def main() -> int:
    """Measure, print and write the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file to write the figures to")
    parser.add_argument("--rounds", type=int, default=6, help="how many rounds of conversions")
    parser.add_argument("--smollm2", type=Path, help="the checkpoint to convert")
    parser.add_argument("--case", choices=BOUNDS_SECONDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        figures = (prove_rolled(LAYERS) if arguments.case == "rolled"
                   else prove_conversion(arguments.case))  # fmt: skip
        print(json.dumps(figures))
        return 0
    cases = {name: measured(name) for name in BOUNDS_SECONDS}
    is_cheap = True
    document = {"date": date.today().isoformat(), "machine": platform.machine(),
                "python": platform.python_version(), "proofs": cases}  # fmt: skip
    if arguments.smollm2 is not None:
        ratios = conversion_ratios(arguments.smollm2, arguments.rounds)
        document["conversion"] = {
            other: {"ratio": statistics.median(values), "rounds": sorted(values)}
            for other, values in ratios.items()
        }
        is_cheap = statistics.median(ratios["sampling"]) <= BOUND_RATIO
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, "utf-8")
    is_proved = all(case["verdict"] == "proved" for case in cases.values())
    is_fast = all(float(cases[name]["seconds"]) <= bound for name, bound in BOUNDS_SECONDS.items())
    is_small = float(cases["smollm2-135m"]["bytes"]) <= BOUND_BYTES
    return 0 if is_proved and is_fast and is_small and is_cheap else 1


if __name__ == "__main__":
    sys.exit(main())
