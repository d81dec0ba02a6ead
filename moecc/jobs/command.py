"""Tools shared by the functions of commands: spellings of parameters, reports, files, pipelines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from moecc.errors import InputError, MoeccError
from moecc.support.console import Spelling as Spelling
from moecc.support.console import say, warn
from moecc.support.untyped import Json, JsonDict

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.model.open import OpenedModel
    from moecc.rewrite.pipeline import Pipeline


Load = Annotated[
    Sequence[str],
    Spelling(
        "FILE.py",
        help="Python file with passes, operations and families of your own; may be repeated.",
    ),
]
SourceName = Annotated[str, Spelling("SOURCE", complete="models")]
ModelName = Annotated[
    str,
    Spelling(
        "MODEL", complete="models",
        help="Hugging Face folder, .gguf file, run, or .moe graph that names its checkpoint.",
    ),
]  # fmt: skip
AnyModelName = Annotated[
    str,
    Spelling(
        "MODEL", complete="models",
        help="Hugging Face folder, .gguf file, .moe graph, or preset:NAME.",
    ),
]  # fmt: skip
GraphFile = Annotated[str, Spelling("FILE|-", help="File of a .moe graph, or - for stdin.")]
PipelineText = Annotated[
    str,
    Spelling(
        "PIPELINE", "p", complete="pipelines",
        help="Passes to run, separated by commas; moecc passes lists them.",
    ),
]  # fmt: skip
Output = Annotated[
    str | None, Spelling("FILE", "o", help="File to write (default: standard output).")
]
Weights = Annotated[
    str | None,
    Spelling("FOLDER", help="Checkpoint of a .moe graph, in place of the one that it names."),
]
Inputs = Annotated[
    str | None,
    Spelling("FILE", help="Inputs: a .npy file of token ids [batch, seq], or a .npz file by name."),
]
ShardBytes = Annotated[
    str, Spelling("SIZE", help="Maximal size of a shard: 5000000000, 5GB, 500 MB.")
]
PaddingMask = Annotated[bool, Spelling(help="Give encoder graphs an input for the padding mask.")]
ComputeType = Annotated[
    str,
    Spelling("TYPE", complete="float_types", help="Element type of the computation."),
]
SavedPlanFile = Annotated[str | None, Spelling("FILE", help="Plan that moecc plan --save wrote.")]
_MACHINE = Spelling(
    "M",
    complete="machines",
    help="Machine: tpu:v5p:4x4x4, v5e-16, gpu:h100:8, h100x8, cpu, or a FILE.toml of your own.",
)
MachineName = Annotated[str, _MACHINE]
OptionalMachine = Annotated[str | None, _MACHINE]
Compare = Annotated[
    Literal["run", "weights"] | None,
    Spelling(
        help="Compare values after the passes: run compares XLA with the reference in float64, "
        "weights compares written parameters with their expressions.",
    ),
]
Seed = Annotated[int, Spelling("N", low=0, help="Seed for all random numbers.")]
AllowUnmatched = Annotated[
    bool, Spelling(help="Accept passes that match nothing, though they must match.")
]
OutputFile = Annotated[str | None, Spelling("FILE")]
"""A file to write, which the docstring of the command describes."""
Amount = Annotated[int, Spelling("N", low=1)]
"""A number of things, which the docstring of the command describes."""
Force = Annotated[bool, Spelling(help="Replace an existing output.")]
SequenceLength = Annotated[int, Spelling("N", low=2, help="Number of tokens in a sequence.")]
BatchSize = Annotated[int, Spelling("N", low=1, help="Number of sequences in a batch.")]


@dataclass(frozen=True, repr=False)
class Report:
    """The report of a command.

    Attributes:
      kind: the name of the schema, ``inspect`` for ``moecc.inspect/1``.
      data: JSON values, with the keys that ``docs/cli.md`` documents; None if there are none.
      text: returns the text for people.
      is_aside: whether that text is a note on standard error, since the artefact is elsewhere.
      is_silent: whether nothing is printed, as another process prints it.
      is_raw: whether the text is an artefact, written as it is.
      exit_code: of the command line.
      error: raised by the command line after the report is printed.
    """

    kind: str
    data: Json | None
    text: Callable[[], str]
    is_aside: bool = False
    is_raw: bool = False
    is_silent: bool = False
    exit_code: int = 0
    error: MoeccError | None = None

    def to_json(self) -> JsonDict:
        """Return the report as JSON values, with its schema."""
        return {"schema": f"moecc.{self.kind}/1", **(self.data or {})}

    def __repr__(self) -> str:
        return self.text()


def artefact(kind: str, text: str, file: str | None, *, force: bool, **facts: object) -> Report:
    """Write a text to `file`, and return its report, which has the text where there is no file.

    Args:
      kind: as of `Report`.
      text: a graph or a program.
      file: the path; None or ``-`` for standard output.
      force: whether an existing file is replaced.
      **facts: further JSON values.

    Raises:
      InputError: as `write_whole`.
    """
    if file is None or file == "-":
        return Report(kind, {"output": None, "text": text, **facts}, lambda: text, is_raw=True)
    write_whole(file, text.encode(), force=force)
    return Report(kind, {"output": file, "text": None, **facts}, str, is_raw=True)


# Files that commands read and write.


def graph_text(graph: Graph, path: str | None) -> str:
    """Return the text of `graph`, which then names its checkpoint from the folder of its file."""
    from moecc.ir.text import names_for_file, print_graph

    names_for_file(graph, path)
    return print_graph(graph)


def say_weights(model: OpenedModel, source: str) -> None:
    """Say which checkpoint a ``.moe`` file made a command open."""
    if source.endswith(".moe") and model.checkpoint is not None:
        say(f"note: {source} reads the weights of {model.checkpoint.path}")


def check_writable(file: str | None, *, force: bool) -> None:
    """Check that a file can be written; None and ``-`` can.

    Raises:
      InputError: the file exists (without `force`) or has no parent folder.
    """
    if file is None or file == "-":
        return
    path = Path(file)
    if path.is_dir():
        raise InputError("is a folder", where=file, hint="name a file in it")
    if path.exists() and not force and not _is_stream(path):
        raise InputError("the file exists", where=file, hint="--force replaces it")
    if not path.resolve().parent.is_dir():
        raise InputError("the folder to write into does not exist", where=path.parent)


def _is_stream(path: Path) -> bool:
    """Return whether a path is a device or a pipe, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_whole(file: str, content: bytes, *, force: bool) -> None:
    """Write `content` to `file` through a temporary file in the same folder.

    Devices and pipes, such as ``/dev/null``, are written to as they are.

    Raises:
      InputError: as `check_writable`.
      MachineError: there is no right to write there, or the disk is full.
    """
    check_writable(file, force=force)
    if _is_stream(Path(file)):  # a pipe that /dev/stdout stands for has no path of its own
        Path(file).write_bytes(content)
        return
    from moecc.formats.files import os_errors

    path = Path(os.path.realpath(file))
    with os_errors(Path(file), "write"):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


# Pipelines, with passes of the user's own files.


def read_pipeline(text: str, files: Sequence[str] = ()) -> Pipeline:
    """Return the pipeline of `text`, after printing its warnings to stderr.

    Raises:
      UsageError: all problems of the text.
    """
    from moecc.rewrite.pipeline import Pipeline, installed

    registry = installed()
    if files:
        # Only files can add families, whose modules a pipeline alone does not need.
        from moecc.model.open import registry_with

        registry = registry_with(files)
    pipeline = Pipeline.parse(text, registry)
    for warning in pipeline.warnings():
        warn(str(warning))
    return pipeline


def read_failing(
    file: str, pipeline: str, load: Sequence[str], seed: int
) -> tuple[Graph, Pipeline, int]:
    """Return graph, pipeline and seed of an input that fails; a reproducer has its own.

    Raises:
      InputError: the file is no graph, or a reproducer that needs passes and `load` is empty.
      UsageError: all problems of the pipeline.
    """
    from moecc.ir.text import read_graph
    from moecc.rewrite.runner import check_loaded, is_reproducer, read_reproducer

    if not pipeline and is_reproducer(file):
        stated = read_reproducer(Path(file))
        check_loaded(Path(file), stated, load)
        pipeline, seed = stated.pipeline, stated.seed
    passes = read_pipeline(pipeline, load)  # First: a file may define operations of the graph.
    return read_graph(file), passes, seed


CONVERSION_SUFFIXES = (".toml", ".yaml", ".yml")


def is_conversion_file(source: str) -> bool:
    """Return whether a source is a file that describes a conversion."""
    return Path(source).suffix.lower() in CONVERSION_SUFFIXES and Path(source).is_file()
