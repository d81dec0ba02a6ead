"""Which files a reader meets who follows one object through the program.

    python benchmarks/walks.py [tokens | mesh | graph …] [--format json]

Three objects are followed, in the files of the three packages:

* ``tokens``: the array of tokens through an expert layer, as the XLA backend traces it.  A function
  touches it that is handed it, or the rows and hidden values made of it: by itself or within
  records and sequences, two levels deep.
* ``mesh``: the mesh through ``moecc plan`` with a mesh.  A function touches it that reads an
  attribute of it.
* ``graph``: the graph through ``moecc convert``, from a dense model to a mixture of experts.  A
  function touches it that reads an attribute of it, of its nodes or values.

What their own classes do does not count, those of named arrays and rows included: who uses a mesh
need not read how it is made.  A walk has the files in the order in which their functions touch the
object for the first time; each function counts once, and functions of one file in a row are one
stay.  A return is a stay in a file that was left before; a climb a step from a file to one that
imports it, directly or not.

The script reads the packages that the interpreter finds, so that it measures other checkouts, too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import resolve_name
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import networkx as nx

PACKAGES = ("moecc", "moecc_passes", "moecc_backends")

EMBED, MLP = 88, 116
"""Sizes that no other axis of the layer has: an array with one of them has tokens or weights."""

LAYER = f"""moecc 1

graph layer {{
  input %x : f32[batch=B, seq=S, embed={EMBED}]
  param %gate : f32[mlp={MLP}, embed={EMBED}] = source("gate" : f32[mlp={MLP}, embed={EMBED}]) @ffn
  param %up : f32[mlp={MLP}, embed={EMBED}] = source("up" : f32[mlp={MLP}, embed={EMBED}]) @ffn
  param %down : f32[embed={EMBED}, mlp={MLP}] = source("down" : f32[embed={EMBED}, mlp={MLP}]) @ffn
  %gated = contract %x, %gate {{over=embed}} : f32[batch=B, seq=S, mlp={MLP}] @ffn
  %active = silu %gated : f32[batch=B, seq=S, mlp={MLP}] @ffn
  %raised = contract %x, %up {{over=embed}} : f32[batch=B, seq=S, mlp={MLP}] @ffn
  %hidden = mul %active, %raised : f32[batch=B, seq=S, mlp={MLP}] @ffn
  %y = contract %hidden, %down {{over=mlp}} : f32[batch=B, seq=S, embed={EMBED}] @ffn
  output y = %y
}}
"""

ARRAYS = ("Named.", "Rows.")
"""The methods of what has the array of tokens and the names of its axes."""

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "llama_square_tied"

Visit = tuple[str, str]
"""A file, and a function of it."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """The files that an object goes through.

    Attributes:
      stays: the files, in order.
      climbs: how many steps lead to a file that imports the one before.
    """

    stays: tuple[str, ...]
    climbs: int

    @property
    def files(self) -> list[str]:
        """The files in the order in which they are met."""
        return list(dict.fromkeys(self.stays))

    @property
    def returns(self) -> int:
        """How many stays are in a file that was left before."""
        return len(self.stays) - len(self.files)


def folders() -> dict[str, Path]:
    """Return the folder of each package that the interpreter finds."""
    return {name: Path(str(import_module(name).__file__)).parent for name in PACKAGES}


def file_of(frame: FrameType) -> str | None:
    """Return the file of a frame as ``package/folder/file.py``, None outside of the packages."""
    path = frame.f_code.co_filename
    found = (
        f"{name}{path[len(str(folder)) :]}"
        for name, folder in FOLDERS.items()
        if path.startswith(f"{folder}/")
    )
    return next(found, None)


FOLDERS = folders()


# --- what touches an object -----------------------------------------------------------------


def tokens() -> list[Visit]:
    """Trace an expert layer, and return the functions that are handed its tokens."""
    import jax
    import numpy as np
    from moecc_backends.xla.backend import function

    from moecc.ir.text import parse
    from moecc.rewrite.pipeline import Pipeline
    from moecc.rewrite.runner import run_pipeline

    graph = parse(LAYER)
    run_pipeline(graph, Pipeline.parse("upcycle{experts=8}"))
    shapes = {value.type.shape for value in graph.params.values()}

    def is_tokens(x: object) -> bool:
        if not isinstance(x, jax.Array) or tuple(x.shape) in shapes:
            return False
        return (EMBED in x.shape) != (MLP in x.shape)

    params = {n: jax.ShapeDtypeStruct(v.type.shape, np.float32) for n, v in graph.params.items()}
    inputs = {"x": jax.ShapeDtypeStruct((2, 37, EMBED), np.float32)}
    program = jax.jit(function(graph))
    with handed(is_tokens) as visits:
        program.trace(params, inputs)
    return visits


@contextlib.contextmanager
def handed(is_object: Callable[[object], bool]) -> Iterator[list[Visit]]:
    """Record the functions that are handed an object."""
    visits: list[Visit] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        file = file_of(frame) if event == "call" else None
        if file is None:
            return
        sys.setprofile(None)
        found = inspect.getargvalues(frame)
        names = (*found.args, found.varargs, found.keywords)
        own = frame.f_code.co_qualname.startswith(ARRAYS)
        if not own and any(carries(found.locals.get(n), is_object, 2) for n in names if n):
            visits.append((file, frame.f_code.co_qualname))
        sys.setprofile(profile)

    sys.setprofile(profile)
    try:
        yield visits
    finally:
        sys.setprofile(None)


def carries(x: object, is_object: Callable[[object], bool], levels: int) -> bool:
    """Whether `x` is an object, or a record or collection that has it, so many levels deep."""
    if is_object(x):
        return True
    return levels > 0 and any(carries(part, is_object, levels - 1) for part in parts_of(x))


def parts_of(x: object) -> Iterable[object]:
    """Return the parts of a record, a sequence or a mapping."""
    if isinstance(x, tuple | list):
        return x
    if isinstance(x, dict):
        return list(x.values())
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [getattr(x, f.name, None) for f in dataclasses.fields(x)]
    return ()


def mesh() -> list[Visit]:
    """Plan on a mesh, and return the functions that read it."""
    from moecc.ir.mesh import Mesh

    with read((Mesh,)) as visits:
        command("plan", "preset:mixtral-8x7b", "--machine", "tpu:v5p:4x4x4", "--mesh",
                "expert=8,model=8", "--batch-tokens", "1048576")  # fmt: skip
    return visits


def graph() -> list[Visit]:
    """Convert a model, and return the functions that read its graph, nodes and values."""
    from moecc.ir.graph import Graph, Node, Value
    from moecc.jobs import convert as cmd_convert

    # What checks passes on the model at small sizes follows another graph.
    unchecked = ["--no-check"] if "--no-check" in inspect.getsource(cmd_convert) else []
    with tempfile.TemporaryDirectory() as folder, read((Graph, Node, Value)) as visits:
        command("convert", str(GOLDEN), f"{folder}/out", "--to", "mixtral",
                "-p", "upcycle{experts=4 top-k=2}", *unchecked)  # fmt: skip
    return visits


@contextlib.contextmanager
def read(classes: tuple[type, ...]) -> Iterator[list[Visit]]:
    """Record the functions that read an attribute of an object of one of `classes`."""
    visits: list[Visit] = []
    owners = {str(inspect.getsourcefile(c)) for c in classes}
    kept = [(c, c.__getattribute__) for c in classes]

    def reading(self: object, name: str) -> Any:
        frame = sys._getframe(1)
        if not name.startswith("__") and frame.f_code.co_filename not in owners:
            file = file_of(frame)
            if file is not None:
                visits.append((file, frame.f_code.co_qualname))
        return object.__getattribute__(self, name)

    for found in classes:
        found.__getattribute__ = reading  # type: ignore[assignment]
    try:
        yield visits
    finally:
        for found, before in kept:
            found.__getattribute__ = before  # type: ignore[method-assign]


def command(*words: str) -> None:
    """Run a command of moecc in this process, silently.

    Raises:
      SystemExit: it fails.
    """
    from moecc.cli.main import main

    kept, said = sys.argv, io.StringIO()
    sys.argv = ["moecc", *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        if end.code:
            print(said.getvalue(), file=sys.stderr)
            raise
    finally:
        sys.argv = kept


WALKS = {"tokens": tokens, "mesh": mesh, "graph": graph}


# --- the walk --------------------------------------------------------------------------------


def walk(visits: Iterable[Visit], imports: nx.DiGraph) -> Walk:
    """Return the walk of what touched an object, in order."""
    stays: list[str] = []
    for file, _ in dict.fromkeys(visits):
        if not stays or stays[-1] != file:
            stays.append(file)
    steps = pairwise(stays)
    climbs = sum(nx.has_path(imports, b, a) and not nx.has_path(imports, a, b) for a, b in steps)
    return Walk(tuple(stays), climbs)


def import_graph() -> nx.DiGraph:
    """Return the files of the packages, with an arrow to each that they import anywhere."""
    files = {
        f"{name}/{path.relative_to(folder)}": path
        for name, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    by_module = {module_of(file): file for file in files}
    found: nx.DiGraph = nx.DiGraph()
    found.add_nodes_from(files)
    for file, path in files.items():
        module = module_of(file)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name in imported(path, package):
            target = by_module.get(name) or by_module.get(name.rpartition(".")[0])
            if target not in (None, file):
                found.add_edge(file, target)
    return found


def module_of(file: str) -> str:
    """Return the module of a file."""
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported(path: Path, package: str) -> Iterator[str]:
    """Yield the modules, and names in them, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="WALK", help=f"of {', '.join(WALKS)}")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in WALKS]
    if unknown:
        parser.error(f"unknown walk {unknown[0]!r}; walks: {', '.join(WALKS)}")
    imports = import_graph()
    found = {name: walk(WALKS[name](), imports) for name in given.names or WALKS}
    if given.format == "json":
        rows = {n: {"files": w.files, "returns": w.returns, "climbs": w.climbs}
                for n, w in found.items()}  # fmt: skip
        print(json.dumps(rows, indent=1))
        return
    for name, one in found.items():
        print(f"{name}: {len(one.files)} files, {one.returns} returns, {one.climbs} climbs")
        print("".join(f"  {file}\n" for file in one.files), end="")


if __name__ == "__main__":
    main()
