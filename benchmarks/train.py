"""Processor time of a training step beside transformers and torch, in pairs, one thread each.

    python benchmarks/train.py [MODEL…] --torch PYTHON [--pairs 7] [--steps 3] [--format json]

MODEL is ``dense``, a decoder of 5 M parameters over bytes; ``sparse``, the same with 8 experts in
every layer, top-2, written as mixtral; or a checkpoint that both read.  PYTHON is an interpreter
with torch and transformers.  Both train the same weights on the same batches in float32 with AdamW
and clipped gradients, each in a process of its own on one core, in turn; each is first in every
other pair.  With ``--apart`` the processes are begun anew for each pair, for what fits into memory
once.  The figure is the median of the ratios of pairs; the first request is a step that is not
counted.  Peak memory is that of the process, and of the compiled step alone, beside weights,
moments and gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

Reply = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
MOECC, TORCH = "moecc", "transformers"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 384,
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-05, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
RECIPE = """
[model]
source = "model"
[data]
train = [{{ tokens = "none" }}]
batch = {batch}
seq = {seq}
packing = false
[routing]
balance = 0.01
z_loss = 0.001
[optimizer]
rate = 1e-3
decay = 0.0
[run]
steps = 1
"""


# --- moecc's side


def serve(folder: str, batch: int, seq: int) -> None:
    """Answer requests of the kind that `train_torch.py` answers."""
    import jax
    from moecc_backends.xla.program import keep_freed_memory
    from moecc_backends.xla.train.checkpoints import load
    from moecc_backends.xla.train.step import make_train_step

    from moecc.model.open import open_model
    from moecc.train.graphs import step_spec, train_graph
    from moecc.train.recipe_text import parse_recipe
    from moecc.train.state import canonical

    # As `moecc train` does before jax finds its devices.
    keep_freed_memory()
    recipe = parse_recipe(RECIPE.format(batch=batch, seq=seq), "recipe", folder=Path())
    with open_model(folder) as model:
        made = canonical(model.graph)
        step = make_train_step(
            train_graph(made.graph, recipe), step_spec(made.graph, recipe), jax.devices()[:1]
        )
        kinds = {**step.abstract_state["params"], **step.abstract_state["bias"]}
        state = step.init(load(step.graph, made.weights, model.checkpoint.read, kinds))
    compiled = step.function.lower(*step.arguments).compile()
    facts = compiled.memory_analysis()
    program = facts.argument_size_in_bytes + facts.temp_size_in_bytes
    program += facts.output_size_in_bytes - facts.alias_size_in_bytes
    trained = sum(int(np.prod(a.shape)) for a in step.abstract_state["params"].values())
    ready = {"jax": jax.__version__, "program_bytes": program, "parameters": trained}
    print(json.dumps(ready), flush=True)
    key, rate = jax.random.key(0), jax.numpy.float32(1e-3)
    rows = {
        "segments": np.ones((batch, seq), np.int32), "mask": np.ones((batch, seq), bool),
        "positions": np.tile(np.arange(seq, dtype=np.int32), (batch, 1)),
    }  # fmt: skip
    for line in sys.stdin:
        batches = np.asarray(json.loads(line)["tokens"], np.int32)
        begin, losses = time.process_time(), []
        for tokens in batches:
            following = np.roll(tokens, -1, 1)
            following[:, -1] = -1
            known = {**rows, "tokens": tokens, "targets": following}
            given = {name: known[name] for name in step.abstract_batch}
            state, metrics = compiled(state, given, key, rate)
            losses.append(float(metrics["loss.cross_entropy"]))
        seconds = time.process_time() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"losses": losses, "seconds": seconds, "peak_bytes": peak}), flush=True)


# --- both sides


class Side:
    """A process that trains."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._ask, self._answers = self._process.stdin, self._process.stdout
        self.ready = self._answer()

    def train(self, batches: list[Any]) -> Reply:
        """Return what became of a step on each batch ``[batch, seq]``."""
        print(json.dumps({"tokens": batches}), file=self._ask, flush=True)
        return self._answer()

    def end(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> Reply:
        line = self._answers.readline()
        if not line:
            sys.exit(f"{self._process.args!r} ended with exit code {self._process.wait()}")
        found: Reply = json.loads(line)
        return found


def commands(folder: str, args: argparse.Namespace) -> dict[str, list[str]]:
    ours = [sys.executable, __file__, "--serve", folder, "--batch", str(args.batch)]
    theirs = str(Path(__file__).with_name("train_torch.py"))
    return {
        MOECC: [*ours, "--seq", str(args.seq)],
        TORCH: [args.torch, "-W", "ignore", theirs, folder, args.experts],
    }


def compare(folder: str, args: argparse.Namespace) -> Reply:
    """Train in pairs and return what was measured."""
    rng = np.random.default_rng(0)
    words = min(384, json.loads(Path(folder, "config.json").read_text())["vocab_size"])

    def drawn(steps: int) -> list[Any]:
        return rng.integers(0, words, (steps, args.batch, args.seq)).tolist()

    asked = commands(folder, args)
    sides: dict[str, Side] = {}
    first, ready = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    peaks: dict[str, int] = {}
    warm = drawn(1)
    losses: dict[str, list[float]] = {}
    for pair in range(args.pairs):
        batches = drawn(args.steps)
        for name in asked if pair % 2 else reversed(asked):
            if name not in sides:
                sides[name] = Side(asked[name])
                ready[name] = sides[name].ready
                first[name] = sides[name].train(warm)["losses"][0]
            made = sides[name].train(batches)
            seconds[name].append(made["seconds"] / args.steps)
            peaks[name], losses[name] = made["peak_bytes"], made["losses"]
            if args.apart:
                sides.pop(name).end()
    for side in sides.values():
        side.end()
    ratios = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
    tokens, parameters = args.batch * args.seq, ready[MOECC]["parameters"]
    return {
        "parameters": parameters, "tokens_per_step": tokens, "pairs": args.pairs,
        "tokens_per_second": {n: tokens / statistics.median(s) for n, s in seconds.items()},
        "ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios),
        "first_losses": first, "last_losses": {n: each[-1] for n, each in losses.items()},
        "state_bytes": 16 * parameters, "program_bytes": ready[MOECC]["program_bytes"],
        "peak_bytes": peaks, "versions": {n: ready[n] for n in ready},
    }  # fmt: skip


def made(name: str, work: Path) -> str:
    """Return the folder of a model, which is made unless it is one."""
    if name not in ("dense", "sparse"):
        return name
    dense = work / "dense"
    if not dense.exists():
        from safetensors.numpy import save_file

        from moecc.families import build
        from moecc.families.registry import parse_config
        from moecc.model.initialise import initialise
        from moecc.model.open import OpenedModel
        from moecc.weights.expr import sources

        dense.mkdir()
        (dense / "config.json").write_text(json.dumps(CONFIG))
        graph = build(parse_config(CONFIG))
        names = {n: sources(p.weight)[0].name for n, p in graph.params.items() if p.weight}
        initialise(graph)
        arrays = {names[n]: np.ascontiguousarray(a)
                  for n, a in OpenedModel(graph, "drawn").params().items()}  # fmt: skip
        save_file(arrays, dense / "model.safetensors", metadata={"format": "pt"})
    if name == "dense":
        return str(dense)
    sparse = work / "sparse"
    words = ["convert", str(dense), str(sparse), "-p", "upcycle{experts=8 top-k=2}"]
    subprocess.run(
        [sys.executable, "-m", "moecc", *words, "--to", "mixtral"], check=True, stdout=sys.stderr
    )
    return str(sparse)


def shown(name: str, found: Reply) -> None:
    size, tokens, pairs = (found[n] for n in ("parameters", "tokens_per_step", "pairs"))
    print(f"{name}: {size / 1e6:.1f} M parameters, {tokens} tokens a step, {pairs} pairs, "
          "processor time of one thread")  # fmt: skip
    for side, speed in found["tokens_per_second"].items():
        first, last = (found[n][side] for n in ("first_losses", "last_losses"))
        peak = found["peak_bytes"][side] / 1e9
        print(f"  {side:13s} {speed:8.0f} tokens/s, peak {peak:.2f} GB, "
              f"first loss {first:.6f}, last {last:.4f}")  # fmt: skip
    print(f"  ratio of time {found['ratio']:8.2f} ({found['least']:.2f} to {found['largest']:.2f})")
    state, program = (found[n] / 1e9 for n in ("state_bytes", "program_bytes"))
    print(f"  weights, moments and gradients {state:.2f} GB; the compiled step {program:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["dense", "sparse"])
    parser.add_argument("--torch", metavar="PYTHON")
    parser.add_argument("--experts", default="grouped_mm", help="how transformers runs experts")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--format", choices=["text", "json"], default="text")
    args = parser.parse_args()
    # One core for both, before either counts the cores that it may use.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.serve:
        serve(args.serve, args.batch, args.seq)
        return
    if not args.torch:
        parser.error("--torch PYTHON names an interpreter with torch and transformers")
    with tempfile.TemporaryDirectory() as work:
        found = {name: compare(made(name, Path(work)), args) for name in args.models}
    if args.format == "json":
        print(json.dumps(found))
        return
    for name, each in found.items():
        shown(name, each)


if __name__ == "__main__":
    main()
