"""Router z-loss on and off: a small sparse model is trained on real text, at several rates.

    python examples/router_stability.py [--steps 200] [--seeds 3] [--rates 0.01,0.05,0.2] [--quick]

A dense decoder of 4 layers is built, its second and fourth become ST-MoE layers of 8 experts, and
the whole is trained from scratch on bytes, in bfloat16 with float32 routers.  The text is what
``help()`` knows about the language, in ``pydoc_data`` of the standard library.  Nothing is
downloaded; needs ``pip install '.[examples]'``.  A table, a figure and the numbers of every
step are written.

What to expect, and what not: at a learning rate that is far too large, two of three routers without
the z-loss of ST-MoE (section 3.3) saturate, and with it none.  At better rates it damps their
logits a little.  The loss is the same within what seeds differ by.  The paper saw training diverge
at a scale that no laptop reaches; no run diverges here, and nothing here says that the z-loss would
have prevented it.  ``docs/training.md`` has the measured numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.table import Table
from script import OUT, console, exit_code
from texts import help_topics

from moecc.errors import MachineError, UsageError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir.graph import Graph
from moecc.model.initialise import initialise
from moecc.model.open import OpenedModel
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.types import DTYPES

try:
    import jax
    import jax.numpy as jnp
    import optax
    from moecc_backends.xla.backend import function
    from router_figure import Measure, draw
except ImportError as error:
    print(f"error: needs {error.name}: pip install '.[examples]'", file=sys.stderr)
    sys.exit(MachineError.exit_code)

# Norms of queries and keys keep attention logits small, so that it is the router that is tried.
CONFIG = {
    "model_type": "qwen3", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS, BATCH, WARMUP_STEPS, HELD_OUT_WINDOWS = 8, 8, 20, 64
# Slots are given token by token: in the paper's order later tokens decide whether a second choice
# finds one, and a decoder that predicts them must not know.
PIPELINE = (
    "st-moe{{experts={experts} layers=every:2}},specialize{{mode={mode} order=token}},trace-routing"
)
BALANCE_COEF, Z_COEF = 0.01, 0.001
"""The coefficients of ST-MoE."""

VARIANTS = {"without z-loss": 0.0, "with z-loss": Z_COEF}

MEASURES = (
    Measure("loss", "training loss\n(nats per byte)"),
    Measure("logit_max", "largest\n|router logit|", log=True),
    Measure("logit_spread", "spread of router logits\n(rms about token mean)", log=True),
    Measure("entropy", "router entropy\n(nats)", np.log(EXPERTS), f"uniform: ln {EXPERTS}"),
)
"""What the figure shows, a row each."""

Params = dict[str, Any]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepConfig:
    """What is tried.

    Attributes:
      rates: peak learning rates, which are kept after the warm-up.
      seeds: how many runs of each kind.
      steps: of each run.
      layers: of the model; every second one is sparse.
      seq: bytes of a window.
      dtype: of everything but the routers.
    """

    rates: tuple[float, ...] = (0.01, 0.05, 0.2)
    seeds: int = 3
    steps: int = 200
    layers: int = 4
    seq: int = 128
    dtype: str = "bf16"


QUICK = StepConfig(rates=(0.01, 0.2), seeds=1, steps=12, layers=2, seq=32)
"""To see that it runs; too short to show anything."""


@dataclass
class Run:
    """One training run.

    Attributes:
      rate: its learning rate.
      variant: with or without z-loss.
      seed: of weights, batches and routing.
      held_out: the loss on text that was not trained on, nats a byte, under the evaluation's
        capacity.
      history: what was measured at each step.
    """

    rate: float
    variant: str
    seed: int
    held_out: float = float("nan")
    history: dict[str, list[float]] = field(default_factory=dict)

    def last(self, name: str) -> float:
        """Return the mean of a measure over the last tenth of the steps."""
        values = self.history[name]
        return float(np.mean(values[-max(len(values) // 10, 1) :]))

    def peak(self, name: str) -> float:
        """Return the largest value of a measure."""
        return float(np.max(self.history[name]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="steps of a run")
    parser.add_argument("--seeds", type=int, help="runs of each kind")
    parser.add_argument("--rates", help="learning rates of Adam, separated by commas")
    parser.add_argument("--dtype", choices=("bf16", "f32"), help="of all but the routers")
    parser.add_argument("--quick", action="store_true", help="a smaller model, a few steps")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write into")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(setting_of(args), args.out))


def setting_of(args: argparse.Namespace) -> StepConfig:
    """Return what the command line asks for.

    Raises:
      UsageError: a rate is not a positive number, or there is nothing to do.
    """
    try:
        rates = None if args.rates is None else tuple(map(float, args.rates.split(",")))
    except ValueError:
        raise UsageError(
            "the rates are not numbers", where="--rates", expected="0.01,0.2", found=args.rates
        ) from None
    given = {"steps": args.steps, "seeds": args.seeds, "dtype": args.dtype, "rates": rates}
    chosen = {name: value for name, value in given.items() if value is not None}
    setting = replace(QUICK if args.quick else StepConfig(), **chosen)
    if not min(setting.steps, setting.seeds, *setting.rates) > 0:
        raise UsageError("steps, seeds and rates are positive")
    return setting


def run(setting: StepConfig, out: Path) -> None:
    """Train everything, print a table, write a figure and the numbers.

    Raises:
      MachineError: this Python was installed without the text.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = help_topics()
    trainer = Trainer(setting, as_bytes(text.pieces, held_out=False), as_bytes(text.pieces, True))
    console.print(f"{text.name}: {trainer.facts['bytes']:,} bytes")
    runs = train_all(trainer, setting)
    console.print(results_table(runs))
    facts = {"schema": 1, "text": text.name, "setting": asdict(setting), **trainer.facts}
    numbers, picture = out / "router_stability.json", out / "router_stability.png"
    numbers.write_text(json.dumps({**facts, "runs": [asdict(r) for r in runs]}) + "\n", "utf-8")
    draw(picture, MEASURES, [(f"learning rate {r.rate:g}", r.variant, r.history) for r in runs])
    console.print(f"written: {numbers}, {picture}")


def as_bytes(pieces: Sequence[str], held_out: bool) -> Array:
    """Return the bytes of every tenth piece, or of all the others."""
    chosen = [piece for number, piece in enumerate(pieces) if (number % 10 == 0) == held_out]
    return np.frombuffer("\n\n".join(chosen).encode(), np.uint8)


def sparse_graph(setting: StepConfig, mode: str, seed: int = 0) -> Graph:
    """Return the graph of the sparse model for ``train`` or ``eval``, its weights drawn."""
    config = {"num_hidden_layers": setting.layers, "max_position_embeddings": setting.seq}
    graph = build(parse_config(CONFIG | config))
    pipeline = Pipeline.parse(PIPELINE.format(experts=EXPERTS, mode=mode))
    run_pipeline(graph, pipeline, context=Context(seed=seed))
    initialise(graph, seed=seed)
    return graph


class Trainer:
    """Runs that share one compiled step: what differs between them are its arguments."""

    def __init__(self, setting: StepConfig, text: Array, held_out: Array) -> None:
        self._setting, self._text = setting, text
        self._windows = windows(held_out, HELD_OUT_WINDOWS, setting.seq, np.random.default_rng(0))
        forward, judged = (
            function(sparse_graph(setting, mode), dtype=DTYPES[setting.dtype])
            for mode in ("train", "eval")
        )
        self._optimiser = optax.scale_by_adam(b2=0.95)
        self._step = jax.jit(partial(adam_step, forward, self._optimiser))
        self._judge = jax.jit(lambda params, tokens: cross_entropy(judged, params, tokens)[0])

    @property
    def facts(self) -> dict[str, Any]:
        """What is trained, and how."""
        params = sparse_graph(self._setting, "train").params.values()
        return {
            "bytes": len(self._text),
            "config": CONFIG,
            "pipeline": PIPELINE.format(experts=EXPERTS, mode="train"),
            "parameters": sum(int(np.prod(param.type.shape)) for param in params),
            "batch": BATCH,
            "warmup_steps": WARMUP_STEPS,
            "optimiser": "Adam, b1 0.9, b2 0.95, no weight decay, no clipping",
            "balance_coef": BALANCE_COEF,
            "z_coefs": VARIANTS,
        }

    def train(self, run: Run) -> Run:
        """Train, and fill in what was measured."""
        model = OpenedModel(sparse_graph(self._setting, "train", run.seed), "sparse")
        params = {name: jnp.asarray(array) for name, array in model.params().items()}
        state, rng = self._optimiser.init(params), np.random.default_rng(run.seed)
        history: list[Mapping[str, Any]] = []
        for number in range(self._setting.steps):
            rate = run.rate * min(1.0, (number + 1) / WARMUP_STEPS)
            key = jax.random.fold_in(jax.random.key(run.seed), number)
            batch = windows(self._text, BATCH, self._setting.seq, rng)
            given = (batch, key, rate, VARIANTS[run.variant])
            params, state, measured = self._step(params, state, *given)
            history.append(jax.device_get(measured))
        run.history = {name: [float(found[name]) for found in history] for name in history[0]}
        run.held_out = float(self._judge(params, self._windows))
        return run


def windows(text: Array, count: int, seq: int, rng: np.random.Generator) -> Array:
    """Return random pieces of a text, ``[count, seq + 1]``."""
    starts = rng.integers(0, len(text) - seq, count)
    return np.stack([text[start : start + seq + 1] for start in starts]).astype(np.int32)


def cross_entropy(
    forward: Callable[..., Params], params: Params, tokens: Any, **inputs: Any
) -> tuple[Any, Params]:
    """Return the loss of the next byte, nats, and all outputs of the graph."""
    outputs = forward(params, {"tokens": tokens[:, :-1], **inputs})
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], tokens[:, 1:])
    return losses.mean(), outputs


def adam_step(
    forward: Callable[..., Params], optimiser: Any, params: Params, state: Any, tokens: Any,
    key: Any, rate: Any, z_coef: Any,
) -> tuple[Params, Any, Params]:  # fmt: skip
    """Return parameters and state after one step of Adam, and what was measured before it."""

    def total(params: Params) -> tuple[Any, Params]:
        loss, outputs = cross_entropy(forward, params, tokens, key=key)
        auxiliary = BALANCE_COEF * outputs["loss.balance"] + z_coef * outputs["loss.router_z"]
        return loss + auxiliary, {"loss": loss, **measures(outputs)}

    gradients, measured = jax.grad(total, has_aux=True)(params)
    directions, state = optimiser.update(gradients, state)
    params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
    return params, state, measured


def measures(outputs: Params) -> Params:
    """Return what a step tells of its routers, over all sparse layers."""
    logits = jnp.stack([v for n, v in outputs.items() if n.endswith(".logits")])
    centred = logits - logits.mean(axis=-1, keepdims=True)
    found = {
        name: jnp.stack([v for n, v in outputs.items() if n.endswith(f".{name}")]).mean()
        for name in ("entropy", "dropped", "dead_experts")
    }
    # A constant in all logits of a token changes no gate, so the spread leaves it out.
    return {
        **found,
        "logit_max": jnp.abs(logits).max(),
        "logit_rms": jnp.sqrt(jnp.square(logits).mean()),
        "logit_spread": jnp.sqrt(jnp.square(centred).mean()),
    }


def train_all(trainer: Trainer, setting: StepConfig) -> list[Run]:
    """Return a run for each learning rate, seed and variant; each is announced when it is done."""
    runs = []
    for rate in setting.rates:
        for seed in range(setting.seeds):
            for variant in VARIANTS:
                started = perf_counter()
                runs.append(done := trainer.train(Run(rate, variant, seed)))
                console.print(
                    f"rate {rate:g}, {variant}, seed {seed}: loss {done.last('loss'):.3f}, "
                    f"largest logit {done.peak('logit_max'):.3g}, {perf_counter() - started:.0f} s"
                )
    return runs


COLUMNS: tuple[tuple[str, str, Callable[[Run], float]], ...] = (
    ("loss,\nnats/byte", ".3f", lambda run: run.last("loss")),
    ("held out", ".3f", lambda run: run.held_out),
    ("largest\n|logit|", ".3g", lambda run: run.peak("logit_max")),
    ("largest\nspread", ".2f", lambda run: run.peak("logit_spread")),
    ("last\nspread", ".2f", lambda run: run.last("logit_spread")),
    ("last entropy,\nnats", ".2f", lambda run: run.last("entropy")),
    ("dropped", ".0%", lambda run: run.last("dropped")),
)


def results_table(runs: Sequence[Run]) -> Table:
    """Return the means over seeds, with the lowest and highest seed where there are several."""
    title = "Means over seeds, and the lowest and highest; losses and 'last' of the last tenth"
    table = Table(title=title, show_lines=True, padding=(0, 0), pad_edge=False)
    table.add_column("rate", justify="right")
    table.add_column("z-loss")
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right")
    for rate, variant in dict.fromkeys((run.rate, run.variant) for run in runs):
        group = [run for run in runs if (run.rate, run.variant) == (rate, variant)]
        cells = [summary([of(run) for run in group], form) for _, form, of in COLUMNS]
        table.add_row(f"{rate:g}", variant.split()[0], *cells)
    return table


def summary(values: Sequence[float], form: str) -> str:
    """Return a mean and, of several values, the range."""
    shown = format(float(np.mean(values)), form)
    if len(values) == 1:
        return shown
    return f"{shown}\n{min(values):{form}}–{max(values):{form}}"


if __name__ == "__main__":
    sys.exit(main())
