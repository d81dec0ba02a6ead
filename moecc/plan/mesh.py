"""Meshes: the devices of a machine, in a grid whose axes have names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from moecc.errors import InputError, UsageError, nearest

AXES = ("data", "fsdp", "expert", "model")
"""The axes that moecc's layouts use, outermost first.

``data`` splits the batch; ``fsdp`` splits it and the parameters with it; ``expert`` splits it and
the experts; ``model`` splits heads, neurons and the vocabulary.
"""

_PART = re.compile(r"\s*([A-Za-z_]\w*)\s*[=:]\s*([1-9]\d{0,6})\s*\Z")


@dataclass(frozen=True)
class Mesh:
    """The axes of a mesh, outermost first, with their sizes in devices."""

    axes: tuple[tuple[str, int], ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by name."""
        return dict(self.axes)

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return prod(size for _, size in self.axes)

    def size(self, *names: str) -> int:
        """Return the product of the sizes of the axes `names`; one that is not there counts 1."""
        sizes = self.sizes
        return prod(sizes.get(name, 1) for name in names)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


def parse_mesh(text: str) -> Mesh:
    """Return the mesh that `text` says: ``data=8,expert=8``.

    Raises:
      UsageError: it cannot be read, an axis is unknown, or stands twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        match = _PART.match(part)
        if match is None:
            raise UsageError("not a mesh", expected="data=8,expert=8", found=text)
        name, size = match.groups()
        if name not in AXES:
            hint = nearest(name, AXES) or f"axes: {', '.join(AXES)}"
            raise UsageError(f"unknown mesh axis {name!r}", found=text, hint=hint)
        if name in found:
            raise UsageError(f"the mesh axis {name!r} stands twice", found=text)
        found[name] = int(size)
    return Mesh(tuple((n, found[n]) for n in found))


def check_devices(mesh: Mesh, devices: int, machine: str) -> None:
    """Check that a mesh has as many devices as a machine.

    Raises:
      InputError: it has more or fewer; the nearest size of its last axis is suggested.
    """
    if mesh.devices == devices:
        return
    name, size = mesh.axes[-1]
    rest = mesh.devices // size
    fits = f"{name}={devices // rest} would" if devices % rest == 0 else None
    raise InputError(
        "the mesh and the machine have different numbers of devices",
        where=f"mesh {mesh}",
        expected=f"{devices} devices of {machine}",
        found=str(mesh.devices),
        hint=fits,
    )


def meshes(devices: int, names: tuple[str, ...] = AXES) -> Iterator[Mesh]:
    """Yield every mesh of `devices` devices over `names`, without axes of size 1."""
    if not names:
        if devices == 1:
            yield Mesh(())
        return
    for size in (d for d in range(1, devices + 1) if devices % d == 0):
        for rest in meshes(devices // size, names[1:]):
            yield Mesh((*(((names[0], size),) if size > 1 else ()), *rest.axes))
