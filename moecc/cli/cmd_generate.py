"""``moecc generate``: continue a text."""

from __future__ import annotations

from typing import Annotated

import typer

from moecc.cli.options import ModelArgument, WeightsOption


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(
        "generate",
        epilog='Example: moecc generate smollm2-8x --prompt "The capital of France is"',
    )
    def generate(
        model: ModelArgument,
        prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
        tokens: Annotated[int, typer.Option("--tokens", min=1, help="The most tokens.")] = 24,
        temperature: Annotated[
            float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")
        ] = 0.0,
        seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
        dtype: Annotated[str, typer.Option("--dtype", help="The type to compute in.")] = "f32",
        weights: WeightsOption = None,
    ) -> None:
        """Continue a text with MODEL; prints prompt and continuation."""
        from moecc.generation import generate as continuation
        from moecc.models import open_model
        from moecc.settings import float_type

        type = float_type(dtype)
        with open_model(model, weights=weights) as opened:
            added = continuation(
                opened, prompt, tokens, dtype=type, temperature=temperature, seed=seed
            )
        print(prompt + added)
