"""``moecc generate``: continue a text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format, report
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadFamiliesOption, ModelArgument, WeightsOption
from moecc.errors import escaped

if TYPE_CHECKING:
    from moecc.tasks.continue_tokens import Continuing


@dataclass(frozen=True)
class GenerateRequest:
    """The arguments and options of ``moecc generate``."""

    model: ModelArgument
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="The text to continue; may be repeated.")
    ]
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="The most tokens.")] = 24
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")
    ] = 0.0
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Draw among so many likeliest tokens; 0: all.")
    ] = 0
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw among the likeliest with this probability.")
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TOKEN", help="A token that ends a text; may be repeated."),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="The type to compute in.", autocompletion=complete.float_types
        ),
    ] = "f32"
    weights: WeightsOption = None
    load: LoadFamiliesOption = None
    format: FormatOption = Format.human


def generate(request: GenerateRequest) -> None:
    """Continue texts with MODEL; prints prompts and continuations."""
    from moecc.cli.files import say_weights
    from moecc.families.outside import load_families
    from moecc.model.open import open_model
    from moecc.support.extras import require
    from moecc.tasks.generate import generate_texts

    require("generating", ("xla", "tokenizers"))
    load_families(request.load)
    how = _continuing(request)
    with open_model(request.model, weights=request.weights) as opened:
        say_weights(opened, request.model)
        made = generate_texts(opened, request.prompt, how, stop=request.stop or ())
    rows = [
        {"prompt": m.prompt, "text": m.text, "tokens": list(m.tokens), "stopped": m.is_ended}
        for m in made
    ]
    if request.format is Format.json:
        report("generate", {"model": request.model, "texts": rows}, str, request.format)
        return
    # A file gets the text as it is; a terminal would obey the escape sequences of a tokenizer.
    whole = "\n\n".join(m.whole for m in made)
    print(escaped(whole) if sys.stdout.isatty() else whole)


def _continuing(request: GenerateRequest) -> Continuing:
    from moecc.decoding import Sampling
    from moecc.tasks.continue_tokens import Continuing
    from moecc.types import float_type

    sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
    return Continuing(request.tokens, sampling, dtype=float_type(request.dtype))


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "generate",
        GenerateRequest,
        generate,
        'Example: moecc generate smollm2-8x --prompt "The capital of France is"',
    )
