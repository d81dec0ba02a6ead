"""Dense models beside the same in plain jnp: processor time of forward and gradient, in pairs.

    python benchmarks/dense_by_hand.py [MODEL…] [--pairs 15] [--batch 8] [--seq 256] [--format json]

MODEL is ``1M``, ``5M`` or ``15M``, Llama with a vocabulary of 2,048, or ``t5``, an encoder-decoder
of 6 M.  Three programs compute one function from the same weights: written by hand
(`dense_hand_written.py`), as moecc's operations lower, and with attention as one operation, as
moecc's training steps have it.  The forward pass returns logits; the gradient is that of the mean
cross entropy, in all weights.  All are float32, on one thread unless ``--threads`` is more.  Each
is first in its turn; a figure is the median of the ratios to the program by hand of the same round,
with the first and third quartile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

Program = Callable[[Any, Any], Any]


def models() -> dict[str, Any]:
    """Return the models by name."""
    from dense_hand_written import T5, Llama

    return {
        "1M": Llama(128, 384, 3, 4), "5M": Llama(256, 768, 5, 4), "15M": Llama(384, 1152, 8, 6),
        "t5": T5(256, 768, 3, 4),
    }  # fmt: skip


def graph_of(config: dict[str, object]) -> Any:
    """Return the graph of a model."""
    from moecc.families import build
    from moecc.families.registry import parse_config

    return build(parse_config(config))


def lowered(config: dict[str, object], passes: str) -> Program:
    """Return what moecc makes of a model."""
    from moecc_backends.xla.backend import function

    from moecc.train.graphs import run_passes

    graph = graph_of(config)
    run_passes(graph, passes)
    run = function(graph)
    return lambda p, batch: run(p, batch)["logits"]


def gradient(run: Program) -> Program:
    """Return the loss of the targets, and its gradient."""
    import jax
    import jax.numpy as jnp

    def loss(p: Any, batch: Any) -> Any:
        logs = jax.nn.log_softmax(run(p, {n: a for n, a in batch.items() if n != "targets"}))
        return -jnp.mean(jnp.take_along_axis(logs, batch["targets"][..., None], axis=-1))

    return jax.value_and_grad(loss)


def drawn(config: dict[str, object]) -> Any:
    """Return weights of a model."""
    import jax.numpy as jnp

    from moecc.model.initialise import initialise
    from moecc.model.open import OpenedModel

    graph = graph_of(config)
    initialise(graph)
    return {n: jnp.asarray(a) for n, a in OpenedModel(graph, "drawn").params().items()}


def compare(name: str, kind: str, args: argparse.Namespace) -> dict[str, object]:
    """Return the times of the programs of one kind, and their ratios to that by hand.

    Raises:
      AssertionError: they do not compute the same.
    """
    import jax
    import numpy as np

    model = models()[name]
    params, rng = drawn(model.config), np.random.default_rng(0)
    inputs = ["tokens", *(["decoder_tokens"] if name == "t5" else [])]
    words = model.config["vocab_size"]
    batch = {
        n: rng.integers(0, words, (args.batch, args.seq)).astype(np.int32)
        for n in [*inputs, *(["targets"] if kind == "gradient" else [])]
    }
    made = {"by hand": model, "parts": lowered(model.config, "canonicalize"),
            "moecc": lowered(model.config, "fuse-attention")}  # fmt: skip
    calls = {n: jax.jit(p if kind == "forward" else gradient(p)) for n, p in made.items()}
    check({n: jax.tree.leaves(call(params, batch)) for n, call in calls.items()})
    seconds: dict[str, list[float]] = {n: [] for n in calls}
    order = list(calls)
    for turn in range(args.pairs):
        for one in order[turn % len(order) :] + order[: turn % len(order)]:
            begin = time.process_time()
            jax.block_until_ready(calls[one](params, batch))
            seconds[one].append(time.process_time() - begin)
    row: dict[str, object] = {"model": name, "kind": kind, "threads": args.threads,
                              "parameters": sum(a.size for a in params.values())}  # fmt: skip
    for one, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["by hand"], strict=True)]
        row[one] = {"ms": 1e3 * statistics.median(times),
                    "ratio": statistics.quantiles(ratios, n=4)}  # fmt: skip
    return row


def check(results: dict[str, list[Any]]) -> None:
    """Raise AssertionError unless all arrays are those by hand, to a thousandth of their norm.

    Scores of T5 are not scaled, so that rounding is seen in its gradients.
    """
    import numpy as np

    for found in results.values():
        for a, b in zip(found, results["by hand"], strict=True):
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), "another function"


def main() -> None:
    """Print a row for each model and kind."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", help="1M, 5M, 15M, t5; or all")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    args = parser.parse_args()
    # XLA has as many threads as the process has cores when it begins.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    known = list(models())
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; models: {', '.join(known)}")
    for name in args.names or known:
        for kind in ("forward", "gradient"):
            row = compare(name, kind, args)
            print(json.dumps(row) if args.format == "json" else text(row), flush=True)


def text(row: dict[str, Any]) -> str:
    """Return a row for people."""
    cells = [f"{row['model']:>4} {row['kind']:8} by hand {row['by hand']['ms']:7.1f} ms"]
    for name in ("parts", "moecc"):
        low, middle, high = row[name]["ratio"]
        cells.append(f"{name} {middle:.3f} ({low:.3f} to {high:.3f})")
    return "   ".join(cells)


if __name__ == "__main__":
    main()
