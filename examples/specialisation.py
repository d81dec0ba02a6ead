"""Which tokens go to which expert: the table of ST-MoE's section 7, on real text.

    python examples/specialisation.py [--model FOLDER] [--text FILE] [--seed N] [--out FOLDER]

The pass ``trace-routing`` makes the choices of every router an output of the graph.  They are
counted over a text, by default what ``help()`` knows about Python, and for each expert the tokens
are shown that tell it most from the others.  The default model is MiniLM, an encoder, with 8
experts in every second layer.

Its routers are drawn and not trained, and its experts are copies.  So the table does not show what
experts know.  It shows what comes before any training: a random plane cuts the space of hidden
states, and tokens with similar states fall on the same side.  Another ``--seed`` draws other planes
and gives another table.  Give a trained sparse model with ``--model`` to see what it has learnt,
and compare the shares with those of a router that learnt nothing: ``moecc specialise`` does both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from downloads import MINILM
from rich.markup import escape
from rich.table import Table
from script import OUT, console, exit_code, step
from texts import Text, help_topics

from moecc.backend import get_backend
from moecc.decoding import ReadOnce
from moecc.errors import InputError
from moecc.ir.ops.slots import AssignSlotsOp
from moecc.jobs.generate import load_tokenizer
from moecc.model.inputs import longest
from moecc.model.open import OpenedModel, open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.scoring import RoutedTokens

if TYPE_CHECKING:
    from moecc.tokenizer import Tokenizer

UPCYCLE = "st-moe{experts=8 layers=every:2 losses=false}"
TRACE = "trace-routing"
BATCH, SEQ = 8, 128
Array = np.ndarray[Any, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; with experts, they are traced")
    parser.add_argument("--text", type=Path, help="a text, in place of Python's help()")
    parser.add_argument("--tokens", type=int, default=20_000, help="how much of it is read")
    parser.add_argument("--seed", type=int, default=0, help="of the routers that are drawn")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write into")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args.model, args.text, args.tokens, args.seed, args.out))


def run(source: Path | None, path: Path | None, tokens: int, seed: int, out: Path) -> None:
    """Trace a model on a text, and print and write the tables.

    Raises:
      InputError: the text is too short, or the model is not for texts.
      MachineError: there is no model or no text to be had.
    """
    text = help_topics() if path is None else Text(str(path), (path.read_text("utf-8"),))
    with step("The model"):
        source = source or MINILM.fetch(console.print)
        console.print(f"  {source}")
    with open_model(str(source), padding=True) as model, load_tokenizer(model) as tokenizer:
        with step("Trace the routers"):
            drawn = add_trace(model, seed)
            seq = min(SEQ, longest(model.graph) or SEQ)
            layers = trace(model, windows(tokenizer, text, tokens, seq))
            console.print(f"  {len(layers[0].tokens):,} tokens of {text.name}")
        for layer in layers:
            show(layer, tokenizer)
        if drawn:
            console.print(
                "\nThe routers were drawn, not trained: this is how random planes sort hidden "
                "states."
            )
        write(out / "specialisation.json", layers, tokenizer, text, drawn)


def add_trace(model: OpenedModel, seed: int) -> bool:
    """Trace the routers of `model`; return whether they had to be made first."""
    drawn = not any(node.op.name == "assign_slots" for node in model.graph)
    pipeline = f"{UPCYCLE},{TRACE}" if drawn else TRACE
    run_pipeline(model.graph, Pipeline.parse(pipeline), context=Context(seed=seed))
    console.print(f"  {pipeline}")
    return drawn


def windows(tokenizer: Tokenizer, text: Text, count: int, seq: int) -> Array:
    """Return at most `count` tokens, ``[window, seq]``: windows taken evenly from all of a text.

    Raises:
      InputError: there is not enough text.
    """
    ids = np.concatenate([np.array(piece, np.int32) for piece in tokenizer.encode_all(text.pieces)])
    rows = max(count // (BATCH * seq), 1) * BATCH
    if len(ids) < rows * seq:
        raise InputError(
            "the text is too short", where=text.name, expected=f"{rows * seq:,} tokens",
            found=f"{len(ids):,}", hint="read fewer with --tokens",
        )  # fmt: skip
    starts = np.linspace(0, len(ids) - seq, rows).astype(int)
    return np.stack([ids[start : start + seq] for start in starts])


def trace(model: OpenedModel, ids: Array) -> list[RoutedTokens]:
    """Run `model` on windows ``[window, seq]``, and return where the tokens went, by layer.

    Raises:
      InputError: the model takes more than tokens, or no token of it chooses an expert.
    """
    sizes = {
        node.loc: AssignSlotsOp.of_node(node).experts
        for node in model.graph
        if node.op.name == "assign_slots"
    }
    if not sizes or not {"tokens", "mask"}.issuperset(model.graph.inputs):
        raise InputError(
            "only tokens that choose experts, in an encoder or a decoder alone, are traced here",
            where=model.name, found=f"inputs {', '.join(model.graph.inputs)}",
            hint="the pass trace-routing and moecc run take any model",
        )  # fmt: skip
    program, params = get_backend("xla").compile(model.graph), ReadOnce(model.params())
    found: dict[str, list[Array]] = {layer: [] for layer in sizes}
    for start in range(0, len(ids), BATCH):
        tokens = ids[start : start + BATCH]
        given = {"tokens": tokens, "mask": np.ones(tokens.shape, bool)}
        outputs = program.run(params, {name: given[name] for name in model.graph.inputs})
        for layer in sizes:
            found[layer].append(outputs[f"trace.{layer}.experts"][..., 0].reshape(-1))
    return [
        RoutedTokens(layer, size, ids.reshape(-1), np.concatenate(found[layer]))
        for layer, size in sizes.items()
    ]


def show(layer: RoutedTokens, tokenizer: Tokenizer) -> None:
    """Print a layer: each expert with its share and its tokens."""
    table = Table(
        title=f"{layer.layer}: the token alone explains {layer.explained:.0%} of the choice "
        f"(by chance {layer.by_chance:.0%})",
        title_justify="left", padding=(0, 1),
    )  # fmt: skip
    table.add_column("expert", justify="right")
    table.add_column("share", justify="right")
    table.add_column("tokens that tell it from others, and how many of them went there")
    for expert, share in enumerate(layer.shares):
        tokens = (f"{spell(tokenizer, i)} {part:.0%}" for i, part in layer.typical(expert))
        table.add_row(str(expert), f"{share:.0%}", escape("   ".join(tokens)))
    console.print()
    console.print(table)


def spell(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as the vocabulary writes it."""
    return str(tokenizer.token(token)).replace("\n", "↵")


def write(
    path: Path, layers: Sequence[RoutedTokens], tokenizer: Tokenizer, text: Text, drawn: bool
) -> None:
    """Write the tables as JSON."""
    found = [
        {
            "layer": layer.layer,
            "explained": layer.explained,
            "by_chance": layer.by_chance,
            "experts": [
                {"share": float(share), "tokens": [[spell(tokenizer, i), part] for i, part in best]}
                for share, best in zip(
                    layer.shares, map(layer.typical, range(layer.experts)), strict=True
                )
            ],
        }
        for layer in layers
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"schema": 1, "text": text.name, "routers_drawn": drawn, "layers": found}
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    console.print(f"\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(main())
