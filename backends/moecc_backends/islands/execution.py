"""How the part of a block is run: on whole arrays, with hints for a mesh, or shard by shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from moecc.errors import InputError
from moecc.ir.graph import Value
from moecc.ir.mesh import Mesh, mesh_of
from moecc.sharding.layout import Layout
from moecc.types import DType
from moecc_backends.islands.parts import Part
from moecc_backends.xla.lower.function import finalize_output, lower_values
from moecc_backends.xla.lower.mesh import GspmdLowering
from moecc_backends.xla.mesh.specs import spec
from moecc_backends.xla.trace.context import (
    DEFAULTS,
    DIRECT,
    DeviceView,
    Interceptor,
    Options,
    varies,
)
from moecc_backends.xla.trace.typed_jax import manual_axes
from moecc_backends.xla.trace.values import Named

Arrays = Mapping[Value, jax.Array]
Made = tuple[jax.Array, tuple[jax.Array, ...]]
"""The output ``[*tokens, embed]`` of a part, and the other values that it returns."""


@dataclass(frozen=True)
class Execution:
    """How parts are run.

    Attributes:
      options: what is chosen for the lowering.
      mesh: the devices of the mesh that the graph lies on; or that XLA's partitioner has.
    """

    options: Options = DEFAULTS
    mesh: jax.sharding.Mesh | None = None

    def run(self, part: Part, arrays: Arrays, dtype: DType, *, side: bool) -> Made:
        """Return what a part makes of its input and parameters.

        Args:
          part: the part.
          arrays: its input, ``[*tokens, embed]``, its parameters and what else it takes.
          dtype: the type to compute in.
          side: whether the other values are wanted.

        Raises:
          InputError: the graph lies on a mesh, and no devices were given, or others.
        """
        own = mesh_of(part.x.graph)
        if own is None:
            return self._lowered(part, arrays, dtype, side, interceptor=self._hints(part))
        if set(own.names) <= manual_axes():
            return self._lowered(part, arrays, dtype, side, view=DeviceView(own))
        return self._mapped(part, arrays, dtype, side, own)

    def _hints(self, part: Part) -> Interceptor:
        """Return what holds values to a layout of the mesh, where there is a mesh."""
        if self.mesh is None or set(self.mesh.axis_names) & manual_axes():
            return DIRECT
        experts = next((v.type["expert"].size for v in part.params if "expert" in v.type), 0)
        assert isinstance(experts, int), "the number of experts is known"
        grid = Mesh(tuple((n, int(s)) for n, s in self.mesh.shape.items()))
        return GspmdLowering(self.mesh, Layout(grid, experts))

    def _lowered(
        self,
        part: Part,
        arrays: Arrays,
        dtype: DType,
        side: bool,
        *,
        view: DeviceView | None = None,
        interceptor: Interceptor = DIRECT,
    ) -> Made:
        nodes = list(part.side_nodes if side else part.nodes)
        used = {v for n in nodes for v in n.operands} | {part.x}
        given = _alike({v: a for v, a in arrays.items() if v in used})
        values = lower_values(nodes, given, dtype, self.options, view, interceptor)
        y = values[part.y]
        assert isinstance(y, Named), "rows are combined"
        others = tuple(finalize_output(values[v], v) for v in part.side) if side else ()
        return y.to(part.x.type.names).array, others

    def _mapped(self, part: Part, arrays: Arrays, dtype: DType, side: bool, own: Mesh) -> Made:
        """Run a part that lies on a mesh, shard by shard, with the collectives of its graph."""
        found = "none" if self.mesh is None else ",".join(
            f"{n}:{s}" for n, s in self.mesh.shape.items()
        )  # fmt: skip
        if self.mesh is None or found != str(own):
            raise InputError(
                "the blocks lie on a mesh of devices",
                expected=f"moe(function, mesh=…) with the mesh {own}",
                found=found,
            )
        values = list(arrays)
        view = DeviceView(own)

        def one(*given: jax.Array) -> Made:
            local = dict(zip(values, given, strict=True))
            y, others = self._lowered(part, local, dtype, side, view=view)
            settled = (view.settled(a, v.type) for a, v in zip(others, part.side, strict=False))
            return view.settled(y, part.y.type), tuple(settled)

        order = {a.name: a for a in part.y.type.axes}
        result = part.y.type.with_axes(order[n] for n in part.x.type.names)
        mapped = jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=tuple(spec(v.type) for v in values),
            out_specs=(spec(result), tuple(spec(v.type) for v in part.side) if side else ()),
            check_vma=True,
        )
        made: Made = mapped(*arrays.values())
        return made


def _alike(arrays: Arrays) -> Arrays:
    """Return arrays that all differ along the mesh axes along which any does.

    In a `shard_map` of the user tokens differ from device to device, and copies of experts do not.
    """
    axes = frozenset[str]().union(*map(varies, arrays.values()))
    return {v: DeviceView().varying(a, axes) for v, a in arrays.items()} if axes else arrays
