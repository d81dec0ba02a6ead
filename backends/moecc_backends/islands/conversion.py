"""A conversion: new parameters, and functions of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import jax

from moecc.api.arguments import flag, folder_text
from moecc.errors import UsageError
from moecc_backends.islands.call import Call
from moecc_backends.islands.execution import Execution
from moecc_backends.islands.jaxprs import AnyArray
from moecc_backends.islands.record import Record
from moecc_backends.islands.saving import write_folder
from moecc_backends.xla.dispatch.choose import check_dispatch
from moecc_backends.xla.trace.context import AUTO, Options
from moecc_backends.xla.trace.typed_jax import Function, PyTree


@dataclass(frozen=True)
class Conversion(Record):
    """Converted parameters, and every function of them; see `Record` for the attributes."""

    def __call__(
        self,
        function: Function,
        *,
        losses: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        dispatch: str = AUTO,
    ) -> Function:
        """Return `function` on the new parameters, traced and rewritten anew at each trace.

        Args:
          function: takes the dense parameters first.
          losses: whether losses and metrics are returned, too: then the result is a pair of it
            and a dictionary; a scalar, or the first of a tuple if it is one, is the model's loss
            and has ``loss.auxiliary`` added to it.
          mesh: the devices that experts are sharded over: the mesh of the graph, where a pass put
            it on one; else of XLA's partitioner, which has hints where tokens and experts go.
          dispatch: one of `moecc.ir.conventions.DISPATCHES`, or ``auto``.

        Returns:
          A function that takes new parameters first, and further inputs of the graph, such as the
          random key of ``specialize{mode=train}``, as ``moe_inputs={"key": key}``.

        Raises:
          UsageError: it is no function, or there is no such lowering.
          InputError: a routing of the graph does not fit it.
        """
        if not callable(function):
            raise UsageError("not a function", expected="a function", found=type(function).__name__)
        options = Options(dispatch)
        check_dispatch(self.graph, options)
        execution = Execution(options, _partitioned(mesh))

        @wraps(function)
        def converted(
            params: PyTree,
            *args: PyTree,
            moe_inputs: Mapping[str, AnyArray] | None = None,
            **kwargs: PyTree,
        ) -> AnyArray:
            call = Call(self.state, function, losses, execution)
            return call.run(params, args, kwargs, moe_inputs or {})

        return converted

    def save(self, folder: str | Path, params: PyTree = None, *, force: bool = False) -> Path:
        """Write parameters to a folder, from which `load` makes this conversion again.

        Args:
          folder: the folder, new or empty.
          params: parameters of the same tree, trained for example; those of the conversion if None.
          force: whether an existing folder is replaced.

        Raises:
          UsageError: `folder` is no path, or `force` not True or False.
          InputError: the folder cannot be used, the parameters do not fit, or an array cannot be
            stored.
          MachineError: the disk is too small, or a write failed.
        """
        return write_folder(self, Path(folder_text(folder)), params, force=flag("force", force))


def _partitioned(mesh: object) -> jax.sharding.Mesh | None:
    """Return a mesh over whose axes XLA's partitioner places values.

    The axes of `jax.make_mesh` are explicit by default: it must not.

    Raises:
      UsageError: it is no mesh of devices.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, jax.sharding.Mesh):
        expected, found = "a jax.sharding.Mesh", type(mesh).__name__
        raise UsageError("not a mesh of devices", expected=expected, found=found)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names)
