"""A step that `moecc compile --save` wrote, read back and called."""

from __future__ import annotations

from importlib.util import find_spec

import jax

from moecc.errors import InputError, MachineError
from moecc.support.extras import install_hint
from moecc_backends.xla.trace.typed_jax import PyTree, abstract_array


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

    def __repr__(self) -> str:
        leaves = len(self._exported.in_avals)
        where = f"{' or '.join(self.platforms)}, {self.devices} devices"
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
        found, expected = map(str, map(jax.tree.structure, (arguments, self.arguments)))
        if found != expected:
            raise InputError(
                "the program takes other arguments", expected=expected[:200],
                found=found[:200], hint="step.arguments has them, with shapes and types",
            )  # fmt: skip
        return self._exported.call(*arguments)


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
