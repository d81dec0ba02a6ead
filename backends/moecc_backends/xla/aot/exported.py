"""A step that `moecc compile --save` wrote, read back and called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import jax

from moecc.errors import InputError, MachineError, Problem
from moecc.support.extras import install_hint
from moecc.support.text import amount
from moecc_backends.xla.trace.typed_jax import PyTree, abstract_array

_FEW = 4
"""How many arrays are named where arguments do not suit a program."""


class ExportedStep:
    """A program of `jax.export`, with the arguments that it takes.

    Attributes:
      platforms: what it was compiled for: ``("cpu",)``, ``("tpu",)``, ``("cuda",)``.
      devices: how many it runs on.
      arguments: shapes and types of its arguments, as trees: parameters by the names that
        ``params()`` of the model has after the passes that the report names, and inputs by theirs;
        of a training step the state, the batch, a random key and the learning rate.
    """

    def __init__(self, exported: PyTree) -> None:
        self._exported = exported
        self.platforms: tuple[str, ...] = tuple(exported.platforms)
        self.devices: int = exported.nr_devices
        shapes = [abstract_array(a.shape, a.dtype) for a in exported.in_avals]
        self.arguments: PyTree = jax.tree.unflatten(exported.in_tree, shapes)[0]
        self._types = _types(self.arguments)

    def __repr__(self) -> str:
        leaves = len(self._exported.in_avals)
        where = f"{' or '.join(self.platforms)}, {amount(self.devices, 'device')}"
        return f"<moecc.LoadedStep {where}, {leaves} arrays>"

    def place(self, *arguments: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
        """Return arguments with every array where the program expects it.

        Args:
          *arguments: as `arguments`.
          mesh: of the devices, its axes and sizes those that the program was compiled for.
        """
        shardings = self._exported.in_shardings_jax(mesh)
        places = jax.tree.unflatten(self._exported.in_tree, shardings)[0]
        return jax.tree.map(
            lambda a, s: a if s is None else jax.device_put(a, s), arguments, places
        )

    def __call__(self, *arguments: PyTree) -> PyTree:
        """Run the program.

        Raises:
          InputError: the arguments are others than `arguments`.
        """
        problems = list(_differences(_types(arguments), self._types))
        if problems:
            raise InputError(problems)
        return self._exported.call(*arguments)


def _types(tree: PyTree) -> dict[str, str]:
    """Return type and shape of each array by its place: ``[0]['lm_head.weight']``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): _type(leaf) for path, leaf in leaves}


def _type(leaf: object) -> str:
    # Every step asks this of its whole state: arrays of jax are not traced for it.
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return f"{leaf.dtype}{list(leaf.shape)}"
    try:
        made = jax.eval_shape(lambda x: x, leaf)
    except TypeError:
        return f"no array, but {type(leaf).__name__}"
    return f"{made.dtype}{list(made.shape)}"


def _differences(found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each array that is missing, too many, or of another type; the first."""
    names = [n for n in {**expected, **found} if found.get(n) != expected.get(n)]
    for name in names[:_FEW]:
        yield Problem(
            f"the program takes other arguments ({len(names)} differ)", f"argument {name}",
            expected=expected.get(name, "no such array"), found=found.get(name, "none"),
            hint="step.arguments has them; parameters are those after the passes of the report",
        )  # fmt: skip


def load_step(data: bytes, where: str) -> ExportedStep:
    """Return the program in the bytes of a file.

    Raises:
      InputError: it is none.
      MachineError: an extra is missing.
    """
    if find_spec("flatbuffers") is None:
        raise MachineError("reading an artefact needs flatbuffers", hint=install_hint("export"))
    from jax import export

    try:
        return ExportedStep(export.deserialize(bytearray(data)))
    # Flatbuffers have no checks of their own: what is no artefact fails in any way.
    except Exception as error:
        raise InputError(
            "not an artefact of moecc compile --save", where=where,
            found=f"{type(error).__name__}: {error}"[:200],
        ) from None  # fmt: skip
