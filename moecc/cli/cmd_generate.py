"""``moecc generate``: continue a text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from moecc.cli.face import add_command
from moecc.cli.options import LoadFamiliesOption, ModelArgument, WeightsOption
from moecc.errors import escaped


@dataclass(frozen=True)
class GenerateRequest:
    """The arguments and options of ``moecc generate``."""

    model: ModelArgument
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")]
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="The most tokens.")] = 24
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")
    ] = 0.0
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0
    dtype: Annotated[str, typer.Option("--dtype", help="The type to compute in.")] = "f32"
    weights: WeightsOption = None
    load: LoadFamiliesOption = None


def generate(request: GenerateRequest) -> None:
    """Continue a text with MODEL; prints prompt and continuation."""
    from moecc.cli.files import say_weights
    from moecc.families.outside import load_families
    from moecc.model.open import open_model
    from moecc.support.parse_units import float_type
    from moecc.tasks.generate import generate as continuation

    load_families(request.load)
    type = float_type(request.dtype)
    with open_model(request.model, weights=request.weights) as opened:
        say_weights(opened, request.model)
        added = continuation(
            opened, request.prompt, request.tokens, dtype=type, temperature=request.temperature,
            seed=request.seed,
        )  # fmt: skip
    # A file gets the text as it is; a terminal would obey the escape sequences of a tokenizer.
    whole = request.prompt + added
    print(escaped(whole) if sys.stdout.isatty() else whole)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "generate",
        GenerateRequest,
        generate,
        'Example: moecc generate smollm2-8x --prompt "The capital of France is"',
    )
