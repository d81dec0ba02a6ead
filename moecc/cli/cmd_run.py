"""``moecc run``: what a model makes of given tokens."""

from __future__ import annotations

import io
from typing import Annotated

import typer

from moecc.cli.options import InputsOption, ModelArgument, WeightsOption


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(
        "run",
        epilog="Example: moecc run smollm2-8x --inputs tokens.npy --outputs logits.npy",
    )
    def run(
        model: ModelArgument,
        outputs: Annotated[
            str, typer.Option("--outputs", metavar="FILE.npy", help="Where the output goes.")
        ],
        inputs: InputsOption = None,
        backend: Annotated[str, typer.Option("--backend", help="xla or reference.")] = "xla",
        dtype: Annotated[str, typer.Option("--dtype", help="The type to compute in.")] = "f32",
        output: Annotated[str, typer.Option("--output", help="Which output of the graph.")] = "",
        weights: WeightsOption = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    ) -> None:
        """Run MODEL on token ids and write its logits, [batch, seq, vocab], or hidden states."""
        import numpy as np

        from moecc.backend import get_backend
        from moecc.cli.console import say
        from moecc.cli.files import check_writable, read_inputs, write_whole
        from moecc.inputs import default_inputs
        from moecc.launch.place import check_alone
        from moecc.models import open_model
        from moecc.settings import float_type

        check_writable(outputs, force=force)
        if backend != "xla":
            check_alone(backend)
        chosen, type = get_backend(backend), float_type(dtype)
        with open_model(model, weights=weights) as opened:
            name = _output(opened.graph, output)
            graph = opened.graph
            given = default_inputs(graph) if inputs is None else read_inputs(inputs, graph)
            program = chosen.compile(graph, dtype=type)
            result = program.run(opened.params(dtype=type), given)[name]
        if not program.writes:
            return
        buffer = io.BytesIO()
        np.save(buffer, result)
        write_whole(outputs, buffer.getvalue(), force=force)
        say(f"{name} {list(result.shape)} written to {outputs}")


def _output(graph, name: str) -> str:  # type: ignore[no-untyped-def]
    """Return the output called `name`, or the first one."""
    from moecc.errors import UsageError, nearest

    if not name:
        return str(graph.output_names[0])
    if name not in graph.output_names:
        hint = nearest(name, graph.output_names) or f"outputs: {', '.join(graph.output_names)}"
        raise UsageError(f"the graph has no output {name!r}", hint=hint)
    return name
