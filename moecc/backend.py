"""The backend protocols, and the registry through which the core finds backends unimported.

Backends register under the entry point ``moecc.backends``: a mapping from a name to a factory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, TypeVar, cast, runtime_checkable

from moecc.errors import UsageError, nearest, unknown_name
from moecc.ir.graph import Graph
from moecc.support.untyped import JsonDict
from moecc.types import F32, Array, DType
from moecc.types import Arrays as Arrays

B = TypeVar("B")


class Program(Protocol):
    """A compiled graph, ready to run.

    Attributes:
      writes: whether this process writes the result of `run`; among several, one does.
    """

    writes: bool

    def run(self, params: Arrays, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name.

        Args:
          params: the parameters by name, axes in the order of their types.
          inputs: the inputs by name, likewise; symbolic sizes follow from their shapes.

        Raises:
          InputError: an array is missing or does not fit its type.
        """
        ...


class Backend(Protocol):
    """Compiles graphs to programs."""

    name: str

    def compile(self, graph: Graph, *, dtype: DType = F32) -> Program:
        """Return `graph` compiled, computing in `dtype`."""
        ...


@runtime_checkable
class LoweringBackend(Backend, Protocol):
    """A backend that translates graphs into another language."""

    def lower(
        self,
        graph: Graph,
        inputs: Arrays,
        *,
        emit: str,
        dtype: DType = F32,
        options: Mapping[str, str | None],
    ) -> str:
        """Return `graph` as text.

        Args:
          graph: the graph.
          inputs: arrays for its inputs, of which only the shapes matter.
          emit: the target language, by the backend's name for it.
          dtype: the element type of the computation.
          options: further backend options, by name.

        Raises:
          UsageError: there is no such language, option or value.
          InputError: the graph cannot be lowered with these options.
        """
        ...


@runtime_checkable
class TracingBackend(Backend, Protocol):
    """A backend whose programs are pure functions, for transformations such as gradients."""

    def function(
        self, graph: Graph, *, dtype: DType = F32
    ) -> Callable[[Arrays, Arrays], dict[str, Array]]:
        """Return `graph` as ``f(params, inputs) → outputs``.

        Raises:
          InputError: an operation has no lowering, or an output is ragged.
        """
        ...


@runtime_checkable
class MeshBackend(Backend, Protocol):
    """A backend that simulates the devices of a graph's mesh in one process."""

    def run_on_mesh(self, graph: Graph, params: Arrays, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name, whole, put together from what each device holds.

        Args:
          graph: a graph that lies on a mesh, with collectives wherever a value is moved.
          params: the parameters by name, whole.
          inputs: the inputs by name, whole.

        Raises:
          InputError: the graph cannot run so, an array does not fit, or a size does not divide.
          AssertionError: devices hold different copies of what should be the same.
        """
        ...


@dataclass(frozen=True)
class EmittedProgram:
    """A model as a program that its owner reads, and what stands beside it in a checkpoint.

    Attributes:
      files: the text of each file, by its name.
      params: for each parameter of the unrolled graph its name in the checkpoint.
      config: what ``config.json`` says besides the graph.
    """

    files: Mapping[str, str]
    params: Mapping[str, str]
    config: JsonDict

    @property
    def auto_map(self) -> Mapping[str, object]:
        """The classes by which transformers loads it; empty for a program of JAX."""
        mapped = self.config.get("auto_map", {})
        assert isinstance(mapped, dict), "classes by name"
        return mapped


@runtime_checkable
class EmittingBackend(Protocol):
    """A backend that writes graphs as programs in the language of its name."""

    def emit(self, graph: Graph) -> EmittedProgram:
        """Return `graph` as a program, a function of the graph alone.

        Raises:
          InputError: the graph has something that cannot be written.
        """
        ...


EMITTERS = {"torch": "torch_source", "jax": "jax_source"}
"""The backends that write programs, by language."""

PROGRAM_FILES = {"torch": "modeling_st_moe.py", "jax": "jax_st_moe.py"}
"""The files of programs, by language."""


def program_language(folder: Path) -> str:
    """Return the language of the program in a folder, or nothing where there is none."""
    return next((n for n, file in PROGRAM_FILES.items() if (folder / file).is_file()), "")


def emit_program(graph: Graph, language: str) -> EmittedProgram:
    """Return `graph` as a program in `language`.

    Raises:
      UsageError: there is no such language.
      InputError: the graph has something that cannot be written.
    """
    if language not in EMITTERS:
        hint = nearest(language, EMITTERS) or f"languages: {', '.join(EMITTERS)}"
        raise UsageError(f"no program is written in {language!r}", hint=hint)
    return backend_with(EmittingBackend, EMITTERS[language]).emit(graph)


@cache
def _factories() -> dict[str, Callable[[], Backend]]:
    factories: dict[str, Callable[[], Backend]] = {}
    for point in entry_points(group="moecc.backends"):
        for name, factory in point.load().items():
            if name in factories:
                raise UsageError(f"two installed packages define the backend {name!r}")
            factories[name] = factory
    return factories


def backend_names() -> list[str]:
    """Return the names of the installed backends."""
    return sorted(_factories())


def get_backend(name: str) -> Backend:
    """Return the backend `name`.

    Raises:
      UsageError: there is no such backend.
      MachineError: it needs an extra that is not installed.
    """
    factory = _factories().get(name)
    if factory is None:
        raise UsageError([unknown_name("backend", str(name), backend_names())])
    return factory()


def backend_with(methods: Callable[..., B], name: str = "xla") -> B:
    """Return the backend `name`, which has the methods of the protocol `methods`.

    Raises: as `get_backend`.
    """
    backend = get_backend(name)
    assert isinstance(backend, cast(type, methods)), f"the backend {name} has these methods"
    return cast(B, backend)
