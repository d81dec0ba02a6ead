"""A session: graphs that run many times on the same parameters, with values kept in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from moecc.backend import Backend, Program
from moecc.ir.graph import Graph
from moecc.types.arrays import Array, Arrays
from moecc.types.dtypes import DType


class Session(Protocol):
    """Parameters where the computation is, and values that stay there between runs.

    A run takes from the session the inputs that it is not given.  An output that has the name of
    an input is kept in its place, and not returned: a cache that goes in again.
    """

    def keep(self, values: Arrays) -> None:
        """Keep `values` under their names, in place of earlier ones."""
        ...

    def kept(self) -> dict[str, Array]:
        """Return what is kept, by name."""
        ...

    def run(self, graph: Graph, inputs: Arrays) -> dict[str, Array]:
        """Run `graph`, which is compiled once for each set of shapes; return its other outputs.

        Raises:
          InputError: an array is missing or does not fit its type.
        """
        ...


@runtime_checkable
class SessionBackend(Protocol):
    """A backend with sessions of its own."""

    def session(self, params: Arrays, *, dtype: DType) -> Session:
        """Return a session with `params`, each of which is read once, computing in `dtype`."""
        ...


@dataclass
class PlainSession:
    """A session of a backend that has none: all values go in and out at each run.

    Attributes:
      backend: compiles the graphs.
      params: the parameters by name.
      dtype: the type of the computation.
    """

    backend: Backend
    params: Arrays
    dtype: DType
    _values: dict[str, Array] = field(default_factory=dict)
    _programs: dict[Graph, Program] = field(default_factory=dict)

    def keep(self, values: Arrays) -> None:
        """Keep `values` under their names."""
        self._values.update(values)

    def kept(self) -> dict[str, Array]:
        """Return what is kept."""
        return dict(self._values)

    def run(self, graph: Graph, inputs: Arrays) -> dict[str, Array]:
        """Run `graph`."""
        if graph not in self._programs:
            self._programs[graph] = self.backend.compile(graph, dtype=self.dtype)
        given = {n: inputs[n] if n in inputs else self._values[n] for n in graph.inputs}
        made = self._programs[graph].run(self.params, given)
        self.keep({n: a for n, a in made.items() if n in graph.inputs})
        return {n: a for n, a in made.items() if n not in graph.inputs}


class ReadOnce(Mapping[str, Array]):
    """Parameters that are evaluated once and cached, for a model that runs many times."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self._params = params
        self._made: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._made:
            self._made[name] = self._params[name]
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def open_session(backend: Backend, params: Arrays, dtype: DType) -> Session:
    """Return a session of `backend`, or one that passes all values at each run."""
    if isinstance(backend, SessionBackend):
        return backend.session(params, dtype=dtype)
    return PlainSession(backend, ReadOnce(params), dtype)
