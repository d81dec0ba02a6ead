"""The network between the devices of a machine, and the routes that mesh axes take through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import gcd, prod

HOP_SECONDS = 1e-6
"""The shortest time of a hop between neighbours (How to Scale Your Model: about 1 µs)."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A row of devices.

    Attributes:
      size: how many.
      wrap: whether the last is joined to the first.
      link_bytes_per_second: what one link carries in one direction.
    """

    size: int
    wrap: bool
    link_bytes_per_second: float

    @property
    def gather_rate(self) -> float:
        """Bytes per second that reach a device: from both sides in a ring, from one at an end."""
        return self.link_bytes_per_second * (2 if self.wrap else 1)

    def exchange_seconds(self, local_bytes: float) -> float:
        """Return the time of an all-to-all of `local_bytes` a device.

        On average a byte goes a quarter of a ring, in both directions at once; of an open row, half
        of all bytes cross the middle.
        """
        steps = self.size / (8 if self.wrap else 4)
        return local_bytes * steps / self.link_bytes_per_second


@dataclass(frozen=True)
class Route(ABC):
    """The part of a network that one mesh axis, or several together, run over."""

    devices: int

    @abstractmethod
    def all_gather(self, full_bytes: float) -> float:
        """Return the seconds to gather `full_bytes`, of which each device has its share."""

    @abstractmethod
    def all_to_all(self, local_bytes: float) -> float:
        """Return the seconds to exchange `local_bytes` of each device, an equal part with each."""


@dataclass(frozen=True)
class TorusRoute(Route):
    """Rows of a torus; a gather uses all of them at once."""

    dims: tuple[Dim, ...] = ()

    def all_gather(self, full_bytes: float) -> float:
        """Return the seconds of an all-gather or a reduce-scatter."""
        if self.devices == 1:
            return 0.0
        share = (self.devices - 1) / self.devices
        return full_bytes * share / self._rate + self._latency

    def all_to_all(self, local_bytes: float) -> float:
        """Return the seconds of an all-to-all: of the slowest row, as they work side by side."""
        if self.devices == 1:
            return 0.0
        return max(d.exchange_seconds(local_bytes) for d in self.dims) + self._latency

    @cached_property
    def _rate(self) -> float:
        return sum(dim.gather_rate for dim in self.dims)

    @cached_property
    def _latency(self) -> float:
        hops = sum(d.size // 2 if d.wrap else d.size - 1 for d in self.dims)
        return hops * HOP_SECONDS


@dataclass(frozen=True)
class SwitchRoute(Route):
    """Devices behind one switch, each by a link; `TwoLevelRoute` has the latency of a group.

    Attributes:
      link_bytes_per_second: what a device sends, and receives.
    """

    link_bytes_per_second: float

    def all_gather(self, full_bytes: float) -> float:
        """Return the seconds of an all-gather or a reduce-scatter."""
        return full_bytes * (self.devices - 1) / self.devices / self.link_bytes_per_second

    def all_to_all(self, local_bytes: float) -> float:
        """Return the seconds of an all-to-all, of which a device keeps its own part."""
        return local_bytes * (self.devices - 1) / self.devices / self.link_bytes_per_second


@dataclass(frozen=True)
class TwoLevelRoute(Route):
    """Devices in equal groups: GPUs in nodes, TPUs in tori, with a slower network between them.

    Attributes:
      within: the route of the devices of one group.
      outer_bytes_per_second: what a device sends to other groups, and receives.
      latency: the seconds that the switches between devices take.
    """

    within: Route
    outer_bytes_per_second: float
    latency: float

    def all_gather(self, full_bytes: float) -> float:
        """Return the seconds of an all-gather or a reduce-scatter: of the slower of both levels."""
        inner = self.within.devices
        outer = self.devices // inner
        # Each group receives what it has not, over the links of all its devices.
        outside = full_bytes * (outer - 1) / outer / (inner * self.outer_bytes_per_second)
        return max(self.within.all_gather(full_bytes), outside) + self.latency

    def all_to_all(self, local_bytes: float) -> float:
        """Return the seconds of an all-to-all: of the slower of both levels."""
        inner = self.within.devices
        inside = self.within.all_to_all(local_bytes * inner / self.devices)
        beyond = (self.devices - inner) / self.devices
        outside = local_bytes * beyond / self.outer_bytes_per_second
        return max(inside, outside) + self.latency


@dataclass(frozen=True)
class Network(ABC):
    """The network between the devices of a machine."""

    @abstractmethod
    def routes(self, sizes: dict[str, int]) -> dict[tuple[str, ...], Route]:
        """Lay the axes of a mesh on the network.

        Args:
          sizes: the axes of the mesh by name, outermost first; their product is all devices.

        Returns:
          A route for each axis, and for each set of axes that one collective may run over; keys
          are in the order of `sizes`.
        """


@dataclass(frozen=True)
class Torus(Network):
    """TPU chips in a torus; devices of one chip are a row of their own."""

    dims: tuple[Dim, ...]

    def routes(self, sizes: dict[str, int]) -> dict[tuple[str, ...], Route]:
        """Lay axes on rows: the innermost axis chooses first, whole rows before parts of rows."""
        free, rows = list(self.dims), {}
        for name in reversed(sizes):
            rows[name] = _take(free, sizes[name])
        return {
            axes: TorusRoute(
                prod(sizes[a] for a in axes), _joined(tuple(d for a in axes for d in rows[a]))
            )
            for axes in _subsets(tuple(sizes))
        }


def _take(free: list[Dim], size: int) -> tuple[Dim, ...]:
    """Take rows with `size` devices out of `free`: whole ones if some fit, the most of them."""
    if size == 1:
        return ()
    for count in range(len(free), 0, -1):
        fitting = [c for c in combinations(free, count) if prod(d.size for d in c) == size]
        if fitting:
            best = max(fitting, key=lambda c: sum(d.gather_rate for d in c))
            for dim in best:
                free.remove(dim)
            return best
    return _take_parts(free, size)


def _take_parts(free: list[Dim], size: int) -> tuple[Dim, ...]:
    rows = []
    for i, dim in sorted(enumerate(free), key=lambda pair: -pair[1].size):
        part = gcd(dim.size, size)
        if part == 1:
            continue
        # A part of a ring has open ends.
        is_whole = part == dim.size
        rows.append(Dim(part, dim.wrap and is_whole, dim.link_bytes_per_second))
        free[i] = Dim(dim.size // part, False, dim.link_bytes_per_second)
        size //= part
    free[:] = [d for d in free if d.size > 1]
    return tuple(rows)


def _joined(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return tuple(d for d in dims if d.size > 1)


def _subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [c for count in range(1, len(names) + 1) for c in combinations(names, count)]


@dataclass(frozen=True)
class Switch(Network):
    """GPUs: full bandwidth within a node, a share of the node's links between nodes.

    Attributes:
      per_node: devices of one node.
      devices: all of them.
      link_bytes_per_second: what a device sends within its node.
      node_bytes_per_second: what a node sends to others.
    """

    per_node: int
    devices: int
    link_bytes_per_second: float
    node_bytes_per_second: float

    def routes(self, sizes: dict[str, int]) -> dict[tuple[str, ...], Route]:
        """Lay axes on nodes: the innermost axis fills a node first."""
        room, inner = self.per_node, {}
        for name in reversed(sizes):
            inner[name] = gcd(room, sizes[name])
            room //= inner[name]
        outer, routes = self.node_bytes_per_second / self.per_node, dict[tuple[str, ...], Route]()
        for axes in _subsets(tuple(sizes)):
            devices = prod(sizes[a] for a in axes)
            within = SwitchRoute(prod(inner[a] for a in axes), self.link_bytes_per_second)
            routes[axes] = TwoLevelRoute(devices, within, outer, HOP_SECONDS * (devices > 1))
        return routes


@dataclass(frozen=True)
class Slices(Network):
    """Several equal tori: full links within one, a network of the data center between them.

    Attributes:
      count: how many.
      torus: one of them.
      outer_bytes_per_second: what a device sends to other tori.
    """

    count: int
    torus: Torus
    outer_bytes_per_second: float

    def routes(self, sizes: dict[str, int]) -> dict[tuple[str, ...], Route]:
        """Lay axes on tori: the outermost axis goes across them first."""
        room, inner = self.count, {}
        for name, size in sizes.items():
            across = gcd(room, size)
            room //= across
            inner[name] = size // across
        routes = dict[tuple[str, ...], Route]()
        for axes, within in self.torus.routes(inner).items():
            devices = prod(sizes[a] for a in axes)
            latency = HOP_SECONDS * (devices > within.devices)
            routes[axes] = TwoLevelRoute(devices, within, self.outer_bytes_per_second, latency)
        return routes
