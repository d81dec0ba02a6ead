"""``moecc run``: run a model on given tokens."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import (
    FormatOption,
    InputsOption,
    LoadFamiliesOption,
    ModelArgument,
    WeightsOption,
)
from moecc.types import Array

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.types import Arrays


@dataclass(frozen=True)
class RunRequest:
    """The arguments and options of ``moecc run``."""

    model: ModelArgument
    outputs: Annotated[
        str, typer.Option("--outputs", metavar="FILE.npy", help="Where the output goes.")
    ]
    inputs: InputsOption = None
    backend: Annotated[str, typer.Option("--backend", help="xla or reference.")] = "xla"
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="The type to compute in.", autocompletion=complete.float_types
        ),
    ] = "f32"
    router_dtype: Annotated[
        str, typer.Option("--router-dtype", help="Of routers: f32, or that of --dtype.")
    ] = "f32"
    output: Annotated[str, typer.Option("--output", help="Which output of the graph.")] = ""
    print_values: Annotated[
        str | None,
        typer.Option(
            "--print-values", metavar="GLOB", help="Describe values by name or location, to stderr."
        ),
    ] = None
    weights: WeightsOption = None
    load: LoadFamiliesOption = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False
    format: FormatOption = Format.human


def run(request: RunRequest) -> None:
    """Run MODEL and write its logits, [batch, seq, vocab], or hidden states.

    The inputs are token ids, the pixels of images or the features of speech, as the model has them.
    Without --inputs they are drawn at random, the same in every run.
    """
    from moecc.backend import get_backend
    from moecc.cli.console import say
    from moecc.cli.files import check_writable, say_weights
    from moecc.families.outside import load_families
    from moecc.launch.processes import check_alone
    from moecc.model.initialise import set_router_dtype
    from moecc.model.open import open_model
    from moecc.tasks.print_values import chosen_values, describe_values, with_values
    from moecc.types import float_type

    check_writable(request.outputs, force=request.force)
    load_families(request.load)
    if request.backend != "xla":
        check_alone(request.backend)
    chosen, type = get_backend(request.backend), float_type(request.dtype)
    with open_model(request.model, weights=request.weights) as opened:
        say_weights(opened, request.model)
        graph = opened.graph
        set_router_dtype(graph, request.router_dtype, type)
        name, given = _output(graph, request.output), _inputs(request.inputs, graph)
        shown = [] if request.print_values is None else chosen_values(graph, request.print_values)
        program = chosen.compile(with_values(graph, shown) if shown else graph, dtype=type)
        outputs = program.run(opened.params(dtype=type), given)
    if program.writes:
        for line in describe_values(shown, outputs):
            say(line)
        _write(outputs[name], name, request)


def _inputs(file: str | None, graph: Graph) -> Arrays:
    from moecc.cli.input_files import read_inputs
    from moecc.model.inputs import default_inputs

    return default_inputs(graph) if file is None else read_inputs(file, graph)


def _write(result: Array, name: str, request: RunRequest) -> None:
    import numpy as np

    from moecc.cli.console import tell
    from moecc.cli.files import write_whole

    buffer = io.BytesIO()
    np.save(buffer, result)
    write_whole(request.outputs, buffer.getvalue(), force=request.force)
    shape = list(result.shape)
    data = {"output": name, "shape": shape, "dtype": result.dtype.name, "file": request.outputs}
    tell("run", data, f"{name} {shape} written to {request.outputs}", request.format)


def _output(graph: Graph, name: str) -> str:
    """Return the output called `name`, or the first one."""
    from moecc.errors import UsageError, nearest

    if not name:
        return graph.output_names[0]
    if name not in graph.output_names:
        hint = nearest(name, graph.output_names) or f"outputs: {', '.join(graph.output_names)}"
        raise UsageError(f"the graph has no output {name!r}", hint=hint)
    return name


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "run",
        RunRequest,
        run,
        "Example: moecc run smollm2-8x --inputs tokens.npy --outputs logits.npy",
    )
