"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face folder, a .gguf file, or preset:NAME.",
        show_default=False,
        autocompletion=complete.models,
    ),
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a .gguf file, or a .moe graph that names its checkpoint.",
        show_default=False,
        autocompletion=complete.models,
    ),
]

FormatOption = Annotated[
    Format, typer.Option("--format", help="For people, or one JSON object on stdout.")
]

WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="FOLDER", help="For a .moe file: the checkpoint, instead of its own."
    ),
]

PaddingMaskOption = Annotated[
    bool, typer.Option("--padding-mask", help="Of an encoder: with an input mask.")
]

InputsOption = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        metavar="FILE",
        help="A .npy of the only input (token ids, [batch, seq]); or a .npz with all by name.",
    ),
]

MachineOption = Annotated[
    str,
    typer.Option(
        "--machine",
        metavar="M",
        help="tpu:v5p:4x4x4, v5e-16, gpu:h100:8, h100x8, cpu; or FILE.toml, of your own.",
        autocompletion=complete.machines,
    ),
]

AnyModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a .gguf, a .moe, or preset:NAME.",
        autocompletion=complete.models,
    ),
]

PlanOption = Annotated[
    str | None,
    typer.Option("--plan", metavar="FILE", help="What moecc plan --save wrote."),
]

BatchTokensOption = Annotated[
    int | None,
    typer.Option("--batch-tokens", metavar="N", help="Of a step; by default 4096 a device."),
]

SequenceOption = Annotated[
    str | None,
    typer.Option("--sequence", metavar="N[,N]", help="Tokens of a sequence: 4096, or 512,114."),
]

ComputeTypeOption = Annotated[
    str,
    typer.Option("--dtype", help="The type to compute in.", autocompletion=complete.float_types),
]

WeightTypeOption = Annotated[
    str | None,
    typer.Option(
        "--weight-dtype",
        help="The type of the parameters; by default f32 in training.",
        autocompletion=complete.float_types,
    ),
]

MicroBatchesOption = Annotated[
    int,
    typer.Option(
        "--micro-batches", metavar="N", min=1, help="Parts of a batch whose gradients are added."
    ),
]

ReduceTypeOption = Annotated[
    str | None,
    typer.Option(
        "--reduce-dtype",
        help="The type in which gradients are added and reduced; by default that of --dtype.",
        autocompletion=complete.float_types,
    ),
]

RulesOption = Annotated[
    str | None,
    typer.Option("--rules", metavar="LAYOUT,…", help="Layouts by name, or files of rules."),
]

GraphArgument = Annotated[str, typer.Argument(metavar="FILE|-", help="A .moe graph, or stdin.")]

PipelineOption = Annotated[
    str,
    typer.Option(
        "-p", "--pipeline", help="The passes; see moecc passes.", autocompletion=complete.pipelines
    ),
]

CompareOption = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="run|weights",
        help="After the passes: XLA with the reference, or written weights with the oracle.",
    ),
]

SeedOption = Annotated[int, typer.Option("--seed", help="Of all random choices.")]

AllowUnmatchedOption = Annotated[
    bool, typer.Option("--allow-unmatched", help="A pass may find nothing to do.")
]

LoadOption = Annotated[
    list[str] | None,
    typer.Option("--load", metavar="FILE.py", help="Passes and families of your own."),
]

LoadFamiliesOption = Annotated[
    list[str] | None,
    typer.Option("--load", metavar="FILE.py", help="A file with families of your own."),
]
