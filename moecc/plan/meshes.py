"""The meshes of a machine: a grid of all its devices, whose axes have the names of layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moecc.errors import InputError, UsageError, nearest
from moecc.ir.mesh import Mesh, parse_mesh
from moecc.sharding.rules import mesh_axes

AXES = ("data", "fsdp", "expert", "model")
"""The axes that layouts use, outermost first.

``data`` splits the batch; ``fsdp`` splits it and the parameters with it; ``expert`` splits it and
the experts; ``model`` splits heads, neurons and the vocabulary.
"""


MOST_TENSOR = 64
"""The search splits neurons over at most so many devices; a mesh that is given may have more."""


def plan_mesh(text: str, rules: Sequence[str] | None = None) -> Mesh:
    """Return the mesh that `text` spells: ``data=8,expert=8``.

    Args:
      text: the axes with their sizes.
      rules: the layouts whose axes it may have; None: `AXES`.

    Raises:
      UsageError: it cannot be read, an axis is unknown, or stands twice.
    """
    try:
        mesh = parse_mesh(text)
    except InputError as error:
        raise UsageError(error.problems) from None
    axes = AXES if rules is None else mesh_axes(rules)
    for name in mesh.names:
        if name not in axes:
            hint = nearest(name, axes) or f"axes: {', '.join(axes)}"
            raise UsageError(f"unknown mesh axis {name!r}", found=text, hint=hint)
    return mesh


def check_devices(mesh: Mesh, devices: int, machine: str) -> None:
    """Check that a mesh has as many devices as a machine.

    Raises:
      InputError: it has more or fewer; the size of its last axis that would do is suggested.
    """
    if mesh.devices == devices:
        return
    name, size = mesh.axes[-1]
    rest = mesh.devices // size
    raise InputError(
        "the mesh and the machine have different numbers of devices",
        where=f"mesh {mesh}",
        expected=f"{devices} devices of {machine}",
        found=str(mesh.devices),
        hint=f"{name}:{devices // rest} would" if devices % rest == 0 else None,
    )


def searched_meshes(
    devices: int, experts: int, rules: Sequence[str] | None = None
) -> Iterator[Mesh]:
    """Yield the meshes that a search tries, skipping those equivalent up to renaming axes.

    Args:
      devices: of the machine.
      experts: of a layer, 0 in a dense model.
      rules: the layouts whose axes they may have; None: `AXES`.
    """
    if rules is not None:
        # Layouts reject meshes with an axis over which nothing is sharded.
        yield from meshes(devices, mesh_axes(rules))
        return
    for mesh in meshes(devices):
        data = mesh.sizes.get("data", 1)
        if mesh.sizes.get("model", 1) > MOST_TENSOR:
            continue
        # Experts would be sharded over data, as they are over an axis of their own.
        if experts and data > 1 and "expert" not in mesh.names and experts % data == 0:
            continue
        yield mesh


def meshes(devices: int, names: Sequence[str] = AXES) -> Iterator[Mesh]:
    """Yield every mesh of `devices` devices over axes of `names`; one device is ``data:1``."""
    for sizes in _products(devices, len(names)):
        axes = tuple((n, s) for n, s in zip(names, sizes, strict=True) if s > 1)
        yield Mesh(axes or ((names[0], 1),))


def _products(of: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield every tuple of `count` numbers whose product is `of`."""
    if count == 1:
        yield (of,)
        return
    for size in (d for d in range(1, of + 1) if of % d == 0):
        for rest in _products(of // size, count - 1):
            yield (size, *rest)
