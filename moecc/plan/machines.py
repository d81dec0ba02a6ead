"""Machines by name: peak arithmetic, memory, and the network between their devices.

A device is what JAX calls one: half a chip of TPU v4 and tpu7x, a chip of the others, a GPU.
The numbers and where they come from stand in ``machines.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from itertools import permutations
from math import ceil, prod
from pathlib import Path
from typing import Annotated, Literal

from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.formats.files import read_utf8
from moecc.plan.networks import Dim, Network, Slices, Switch, Torus
from moecc.support.record import Check, toml_reader
from moecc.support.text import amount
from moecc.support.untyped import Json, JsonDict
from moecc.types import count_bytes

_SHORT = re.compile(
    r"(?P<tpu>v4|v5e|v5litepod|v5p|v6e|tpu7x)-(?P<size>[1-9]\d{0,5})\Z"
    r"|(?P<gpu>[a-z]+\d+)x(?P<count>[1-9]\d{0,5})\Z"
    r"|(?P<count_>[1-9]\d{0,5})x(?P<gpu_>[a-z]+\d+)\Z"
    r"|(?P<one>[a-z]+\d+)\Z"
)
_CORES_IN_NAMES = {"v4": 2, "v5p": 2}
"""Clouds count the cores of these, two a chip, and the chips of the others."""

_CLOUD_NAMES = {"v5e": "v5litepod"}

MOST_SLICES = 64

MOST_CPUS = 1 << 10

MOST_GPUS = 1 << 13
"""The most GPUs of a machine that the search for one that fits tries."""

_WHOLE = re.compile(r"[1-9]\d{0,5}\Z")


@dataclass(frozen=True)
class Machine:
    """A machine, in numbers of one device.

    Attributes:
      name: as it is asked for, ``tpu:v5p:4x4x4``.
      kind: ``tpu``, ``gpu`` or ``cpu``.
      devices: how many devices JAX sees.
      peak_flops: FLOP/s by element type.
      usable_bytes: memory that a program can have.
      hbm_bytes_per_second: what the memory moves.
      network: how the devices are joined.
      sources: where the numbers come from.
      compiled_as: the machine of the table that programs are compiled for; empty if there is none.
      like: of a machine of a file, the one of the table that it begins from; empty without one.
    """

    name: str
    kind: str
    devices: int
    peak_flops: Mapping[str, float]
    usable_bytes: int
    hbm_bytes_per_second: float
    network: Network
    sources: tuple[str, ...]
    compiled_as: str
    like: str = ""

    def peak(self, dtype: str) -> float:
        """Return the FLOP/s of products of a type, or of float32 where the table has no other."""
        return self.peak_flops.get(dtype, self.peak_flops["f32"])


@cache
def table() -> Json:
    """Return the table of machines, as it stands in ``machines.json``."""
    machines: JsonDict = json.loads((files(__package__) / "machines.json").read_text("utf-8"))
    return machines


def efficiency(of: str) -> float:
    """Return the share of a peak that is reached in practice: ``compute``, ``hbm``, ``network``."""
    return float(table()["efficiency"][of])


def efficiency_range() -> tuple[float, float]:
    """Return the shares of the peak FLOP/s that small and large products reach."""
    low, high = table()["efficiency"]["compute_range"]
    return float(low), float(high)


def machine_names() -> list[str]:
    """Return how machines are asked for, one line a kind."""
    chips, gpus = table()["tpu"], table()["gpu"]
    return [
        f"tpu:{'|'.join(chips)}:TOPOLOGY[:SLICES]",
        f"gpu:{'|'.join(gpus)}:N",
        "cpu or cpu:N",
        "a file of your own, FILE.toml",
    ]


def parse_machine(text: str) -> Machine:
    """Return the machine called `text`: ``tpu:v5p:4x4x4``, ``gpu:h100:8``, ``cpu``, ``cpu:8``.

    What clouds and people call them are other names of the same: ``v5litepod-16``, ``v5p-128``,
    ``h100x8``, ``a100``.

    Raises:
      UsageError: there is no such machine, or its topology is not one.
    """
    text = _spelled_out(text.strip())
    kind, *words = text.split(":")
    if kind == "tpu" and len(words) == 2:
        return _tpu(text, *words)
    if kind == "tpu" and len(words) == 3:
        return _slices(text, *words)
    if kind == "gpu" and len(words) == 2:
        return _gpu(text, *words)
    if kind == "cpu" and len(words) <= 1:
        return _cpu(text, *words)
    raise _unknown(text)


def _spelled_out(text: str) -> str:
    """Return the full name of a machine by its accelerator type, or any other text as it is."""
    kind, _, name = text.lower().rpartition(":")
    short = _SHORT.match(name)
    if short is None or kind not in ("", "tpu" if short["tpu"] else "gpu"):
        return text
    if (single := short["one"]) is not None:
        return f"gpu:{single}:1" if single in table()["gpu"] else text
    if (gpu := short["gpu"] or short["gpu_"]) is not None:
        return f"gpu:{gpu}:{short['count'] or short['count_']}"
    name = next((n for n, spelled in _CLOUD_NAMES.items() if spelled == short["tpu"]), short["tpu"])
    count, cores = int(short["size"]), _CORES_IN_NAMES.get(name, 1)
    by_count = {prod(t) * cores: t for t in reversed(topologies(name))}
    topology = by_count.get(count)
    if topology is None:
        spelled = _CLOUD_NAMES.get(name, name)
        near = [*[n for n in sorted(by_count) if n < count][-1:],
                *[n for n in sorted(by_count) if n > count][:1]]  # fmt: skip
        raise UsageError(
            f"no TPU {name} has {amount(count, 'core' if cores > 1 else 'chip')}", where=text,
            expected=" or ".join(f"{spelled}-{n}" for n in near),
        )  # fmt: skip
    return f"tpu:{name}:{'x'.join(map(str, topology))}"


def _unknown(text: str, hint: str | None = None) -> UsageError:
    expected = "; ".join(machine_names())
    return UsageError(f"unknown machine {text!r}", expected=expected, hint=hint)


def _entry(text: str, kind: str, name: str) -> Json:
    entry: Json | None = table()[kind].get(name)
    if entry is None:
        raise _unknown(text, nearest(name, table()[kind]))
    return entry


def _sources(entry: Json) -> tuple[str, ...]:
    return tuple(table()["sources"][name] for name in entry["sources"])


# TPUs: slices of a torus, alone or several.


def _tpu(text: str, name: str, topology: str) -> Machine:
    entry = _entry(text, "tpu", name)
    dims = _topology(text, name, topology)
    cores: int = entry["devices_per_chip"]
    # The devices of a chip share its links.
    link = entry["link_bytes_per_second"] / cores
    torus = [
        Dim(size, size == 16 if entry["wrap"] == "16" else size % 4 == 0, link) for size in dims
    ]
    if cores > 1:
        torus.append(Dim(cores, False, entry["core_link_bytes_per_second"]))
    return Machine(
        name=text,
        kind="tpu",
        devices=prod(dims) * cores,
        peak_flops={dtype: peak / cores for dtype, peak in entry["peak_flops"].items()},
        usable_bytes=entry["usable_bytes_per_device"],
        hbm_bytes_per_second=entry["hbm_bytes_per_second"] / cores,
        network=Torus(tuple(torus)),
        sources=_sources(entry),
        compiled_as=text,
    )


def _slices(text: str, name: str, topology: str, count: str) -> Machine:
    """Return several slices of a topology, joined by the network of the data center."""
    entry, slice_ = _entry(text, "tpu", name), _tpu(f"tpu:{name}:{topology}", name, topology)
    if not _WHOLE.match(count) or int(count) > MOST_SLICES:
        expected = f"1 to {MOST_SLICES}"
        raise UsageError("not a number of slices", where=text, expected=expected, found=count)
    if int(count) == 1:
        return slice_
    assert isinstance(slice_.network, Torus), "a slice is a torus"
    outer = entry["scale_out_bytes_per_second"] / entry["devices_per_chip"]
    network = Slices(int(count), slice_.network, outer)
    devices = slice_.devices * int(count)
    return replace(slice_, name=text, devices=devices, network=network, compiled_as="")


def _topology(text: str, name: str, topology: str) -> tuple[int, ...]:
    parts = topology.lower().split("x")
    legal = topologies(name)
    if all(map(_WHOLE.match, parts)) and tuple(map(int, parts)) in legal:
        return tuple(map(int, parts))
    shown = ["x".join(map(str, t)) for t in legal if prod(t) <= 512]
    more = ", …" if len(shown) < len(legal) else ""
    raise UsageError(
        f"TPU {name} has no topology {topology!r}",
        where=text,
        expected=", ".join(shown) + more,
    )


@cache
def topologies(name: str) -> tuple[tuple[int, ...], ...]:
    """Return the topologies of a TPU in chips, smallest first.

    Small ones are parts of a host's or a cube's 4x4x4 chips; larger ones of three dimensions are
    made of whole cubes, their sizes ascending; of equal ones the least drawn out comes first.
    """
    entry = table()["tpu"][name]
    if entry["dims"] == 2:
        flat = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
        return tuple(flat)
    small = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    return (*small, *sorted(_cubes(entry["max_chips"]), key=lambda t: (prod(t), max(t), t)))


def _cubes(most: int) -> Iterator[tuple[int, int, int]]:
    for a in range(4, 25, 4):
        for b in range(a, 25, 4):
            for c in range(b, 65, 4):
                if a * b * c <= most:
                    yield a, b, c


# GPUs, and this machine.


def _gpu(text: str, name: str, count: str) -> Machine:
    entry = _entry(text, "gpu", name)
    per_node: int = entry["gpus_per_node"]
    if not _WHOLE.match(count) or (int(count) > per_node and int(count) % per_node):
        raise UsageError(
            f"no machine has {count!r} of {name}",
            where=text,
            expected=f"1 to {per_node}, or a multiple of {per_node}: whole nodes",
        )
    return Machine(
        name=text,
        kind="gpu",
        devices=int(count),
        peak_flops=entry["peak_flops"],
        usable_bytes=int(entry.get("usable_bytes_per_device", entry["hbm_bytes"])),
        hbm_bytes_per_second=entry["hbm_bytes_per_second"],
        network=Switch(
            min(per_node, int(count)),
            int(count),
            entry["link_bytes_per_second"],
            entry["node_bytes_per_second"],
        ),
        sources=_sources(entry),
        compiled_as=text,
    )


def _cpu(text: str, count: str = "1") -> Machine:
    if not _WHOLE.match(count) or int(count) > MOST_CPUS:
        expected = f"cpu:N, N from 1 to {MOST_CPUS:,}"
        raise UsageError("not a number of devices", where=text, expected=expected, found=count)
    entry, devices = table()["cpu"], int(count)
    rate = entry["link_bytes_per_second"] / devices
    return Machine(
        name=text,
        kind="cpu",
        devices=devices,
        peak_flops={dtype: peak / devices for dtype, peak in entry["peak_flops"].items()},
        usable_bytes=_memory_bytes() // devices,
        hbm_bytes_per_second=entry["hbm_bytes_per_second"] / devices,
        network=Switch(devices, devices, rate, rate),
        sources=_sources(entry),
        compiled_as=text,
    )


def _memory_bytes() -> int:
    """Return the memory of this machine, as the operating system reports it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # pragma: no cover - no such system is tested
        raise InputError("the operating system does not say how much memory there is") from None


def sizes_of_kind(machine: Machine) -> Iterator[Machine]:
    """Yield the machines of the same chip, smallest first, up to the largest that there is."""
    if isinstance(machine.network, Slices) and machine.name.startswith("tpu:"):
        yield from _more_slices(machine.name)
        return
    if machine.name != machine.compiled_as:
        yield machine
        network, devices = machine.network, machine.devices
        while machine.kind == "gpu" and isinstance(network, Switch) and devices < MOST_GPUS:
            devices *= 2
            yield replace(
                machine, name=f"{machine.name} with devices = {devices}", devices=devices,
                network=replace(network, devices=devices),
            )  # fmt: skip
        return
    kind, *words = machine.name.split(":")
    if kind == "tpu":
        for dims in topologies(words[0]):
            yield parse_machine(f"tpu:{words[0]}:{'x'.join(map(str, dims))}")
    elif kind == "gpu":
        for power in range(MOST_GPUS.bit_length()):
            yield parse_machine(f"gpu:{words[0]}:{2**power}")
    else:
        yield machine


def _more_slices(name: str) -> Iterator[Machine]:
    """Yield one slice of a machine of several, and twice as many up to the most."""
    single = name.rpartition(":")[0]
    for power in range(MOST_SLICES.bit_length()):
        yield parse_machine(f"{single}:{2**power}")


def short_tpu_name(chip: str, topology: str) -> str:
    """Return what clouds call a slice of TPUs: ``v5litepod-16``, ``v5p-128``."""
    chips = prod(map(int, topology.split("x")))
    return f"{_CLOUD_NAMES.get(chip, chip)}-{chips * _CORES_IN_NAMES.get(chip, 1)}"


def short_names() -> Iterator[str]:
    """Yield what clouds and people call the machines: ``v5e-16``, ``v5litepod-16``, ``h100x8``."""
    for chip in table()["tpu"]:
        for spelled in dict.fromkeys((chip, _CLOUD_NAMES.get(chip, chip))):
            for dims in topologies(chip):
                yield f"{spelled}-{prod(dims) * _CORES_IN_NAMES.get(chip, 1)}"
    for chip, entry in table()["gpu"].items():
        yield chip
        yield from (f"{chip}x{entry['gpus_per_node'] * 2**power}" for power in range(5))


# Machines that users describe in a file: ``--machine FILE.toml``.
#
# A file begins from a machine of the table (``like``) and says what differs, or says everything.

SUFFIX = ".toml"
MAX_BYTES = 1 << 16
MAX_DEVICES = 1 << 17


def _is_size(text: str) -> bool:
    try:
        return count_bytes(text) > 0
    except UsageError:
        return False


# A default is 0 where a file says nothing; a stated number is more.
Rate = Annotated[float, Check(lambda rate: rate > 0, "more than 0")]
Devices = Annotated[
    int, Check(lambda count: 0 < count <= MAX_DEVICES, f"more than 0, at most {MAX_DEVICES:,}")
]


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of products by element type; 0 where the type has none of its own."""

    f32: Rate = 0.0
    bf16: Rate = 0.0
    f16: Rate = 0.0
    i8: Rate = 0.0
    f8e4m3fn: Rate = 0.0
    f8e5m2: Rate = 0.0


@dataclass(frozen=True)
class OwnMachine:
    """The keys of a file; all numbers are of one device, but for the last.

    Attributes:
      like: a machine of the table, from which all that is not stated is taken.
      kind: without `like`: ``gpu`` or ``cpu``.
      devices: how many devices jax sees; of a TPU its topology says it.
      devices_per_node: how many are joined by the fast links; all of them by default.
      memory: what a program can have, ``"72 GB"``.
      memory_bytes_per_second: what the memory moves.
      link_bytes_per_second: what a device sends to its neighbours, in one direction.
      node_bytes_per_second: what a whole node sends to other nodes.
      slice_bytes_per_second: what a device of a TPU of several slices sends to other slices.
      peak_flops: FLOP/s by element type.
      source: where the numbers come from, for the report.
    """

    like: str = ""
    kind: Literal["", "gpu", "cpu"] = ""
    devices: Devices = 0
    devices_per_node: Devices = 0
    memory: Annotated[str, Check(_is_size, '"72 GB"')] = ""
    memory_bytes_per_second: Rate = 0.0
    link_bytes_per_second: Rate = 0.0
    node_bytes_per_second: Rate = 0.0
    slice_bytes_per_second: Rate = 0.0
    peak_flops: Peaks = field(default_factory=Peaks)
    source: str = ""


MEMORY_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
"""The variable of JAX for the share of a GPU's memory that a program can have (default: 0.75)."""

LEAST_FRACTION, MOST_FRACTION = 0.92, 0.98


def memory_fraction(machine: Machine, needed_bytes: float) -> float | None:
    """Return the share of a GPU's memory to ask JAX for, in whole percents; None elsewhere."""
    if machine.kind != "gpu":
        return None
    needed = ceil(100 * needed_bytes / machine.usable_bytes) / 100
    return min(max(needed, LEAST_FRACTION), MOST_FRACTION)


def fraction_remark(fraction: float | None, needed_bytes: float, usable_bytes: float) -> str:
    """Return the variable that a plan needs beyond what templates set, or nothing."""
    if fraction is None or fraction <= LEAST_FRACTION:
        return ""
    is_beyond = needed_bytes > MOST_FRACTION * usable_bytes
    return f"needs {MEMORY_VARIABLE}={fraction:g}" + " and more, which may not fit" * is_beyond


def find_machine(text: str) -> Machine:
    """Return a machine by its name, or from the file that describes it.

    Args:
      text: as `parse_machine` takes it, or a path that ends in ``.toml``.

    Raises:
      UsageError: there is no machine of this name.
      InputError: the file is missing, or describes none; all problems at once.
    """
    return read_machine(text) if text.strip().endswith(SUFFIX) else parse_machine(text)


def read_machine(path: str) -> Machine:
    """Return the machine that a file describes. Raises InputError with every problem."""
    text = read_utf8(Path(path), MAX_BYTES, "a machine")
    table, reader = toml_reader(text, path)
    stated = reader.section(OwnMachine, table)
    reader.raise_if_any()
    for key, problem in _faults(stated):
        reader.add((key,), problem)
    reader.raise_if_any()
    base = parse_machine(stated.like) if stated.like else _nothing(stated.kind)
    peaks = {f.name: getattr(stated.peak_flops, f.name) for f in fields(stated.peak_flops)}
    return replace(
        base,
        name=path,
        devices=stated.devices or base.devices,
        peak_flops={**base.peak_flops, **{name: peak for name, peak in peaks.items() if peak}},
        usable_bytes=count_bytes(stated.memory) if stated.memory else base.usable_bytes,
        hbm_bytes_per_second=stated.memory_bytes_per_second or base.hbm_bytes_per_second,
        network=_network(stated, base),
        sources=(stated.source or path, *base.sources),
        like=base.name,
    )


def _faults(stated: OwnMachine) -> Iterator[tuple[str, Problem]]:
    """Yield the problems of values that do not go together, with the key that is to blame."""
    try:
        base = parse_machine(stated.like) if stated.like else None
    except UsageError as error:
        yield "like", error.problems[0]
        return
    yield from _unsaid(stated) if base is None else _said_by_name(stated, base)
    devices, per_node = _nodes(stated, base)
    if per_node and devices > per_node and devices % per_node:
        expected = f"a multiple of {per_node}"
        yield "devices", Problem("not whole nodes", expected=expected, found=str(devices))


def _unsaid(stated: OwnMachine) -> Iterator[tuple[str, Problem]]:
    """Yield what a file without `like` must have and has not."""
    needed: JsonDict = {
        "kind": stated.kind, "devices": stated.devices, "memory": stated.memory,
        "memory_bytes_per_second": stated.memory_bytes_per_second,
        "link_bytes_per_second": stated.link_bytes_per_second,
        "peak_flops": stated.peak_flops.f32,
    }  # fmt: skip
    if stated.slice_bytes_per_second:
        yield "slice_bytes_per_second", Problem("only TPUs have slices", expected='like = "tpu:…"')
    if stated.devices_per_node and stated.devices_per_node < stated.devices:
        needed["node_bytes_per_second"] = stated.node_bytes_per_second
    expected = {"kind": "gpu | cpu", "peak_flops": "f32 at least"}
    for key, value in needed.items():
        if not value:
            yield key, Problem(
                "a key is missing", expected=expected.get(key),
                hint='or like = "gpu:h100:8", and what differs from it',
            )  # fmt: skip


def _said_by_name(stated: OwnMachine, base: Machine) -> Iterator[tuple[str, Problem]]:
    """Yield the keys that the name of a machine decides: a topology, a share of the memory."""
    if stated.kind:
        yield "kind", Problem("said twice", found=f"like = {stated.like!r} is a {base.kind}")
    keys = {"tpu": ("devices", "devices_per_node", "node_bytes_per_second"), "cpu": ("devices",)}
    if stated.slice_bytes_per_second and not isinstance(base.network, Slices):
        expected = 'several slices, like = "tpu:v5p:4x4x4:2"'
        problem = Problem("the machine has one slice", expected=expected, found=stated.like)
        yield "slice_bytes_per_second", problem
    for key in keys.get(base.kind, ()):
        if getattr(stated, key):
            example = {"tpu": "tpu:v5e:4x4", "cpu": "cpu:8"}[base.kind]
            yield key, Problem("the name of the machine decides it", hint=f'like = "{example}"')


def _nodes(stated: OwnMachine, base: Machine | None) -> tuple[int, int]:
    """Return how many devices there are, and how many of them in a node."""
    devices = stated.devices or (base.devices if base else 0)
    network = base.network if base else None
    per_node = network.per_node if isinstance(network, Switch) else 0
    return devices, min(stated.devices_per_node or per_node or devices, devices)


def _nothing(kind: str) -> Machine:
    """Return what a file without `like` fills in; this computer compiles for any CPU."""
    empty = Switch(0, 0, 0.0, 0.0)
    return Machine("", kind, 0, {}, 0, 0.0, empty, (), "cpu" if kind == "cpu" else "")


def _network(stated: OwnMachine, base: Machine) -> Network:
    network, link = base.network, stated.link_bytes_per_second
    if isinstance(network, Torus):
        return _relinked(network, link) if link else network
    if isinstance(network, Slices):
        torus = _relinked(network.torus, link) if link else network.torus
        outer = stated.slice_bytes_per_second or network.outer_bytes_per_second
        return replace(network, torus=torus, outer_bytes_per_second=outer)
    assert isinstance(network, Switch), "there are three kinds of networks"
    devices, per_node = _nodes(stated, base)
    link = link or network.link_bytes_per_second
    return Switch(
        per_node, devices, link,
        stated.node_bytes_per_second or network.node_bytes_per_second or link * per_node,
    )  # fmt: skip


def _relinked(torus: Torus, link: float) -> Torus:
    """Return a torus with other links between chips; those within a chip stay."""
    between = min(dim.link_bytes_per_second for dim in torus.dims)
    return Torus(
        tuple(
            replace(dim, link_bytes_per_second=link)
            if dim.link_bytes_per_second == between
            else dim
            for dim in torus.dims
        )
    )


# The room that an array takes: a TPU keeps arrays in tiles, and pads them to whole ones.

TILE = (8, 128)
"""Entries of the last axis but one and of the last, in one tile of a TPU (XLA, tiled layout)."""

PACKED_ROWS = 2
"""Rows of 16 bits that a TPU packs into one of 32; shards with parts of one are gathered by a sum
(found with SmolLM2 on meshes of 8 to 64 devices, libtpu 0.0.42.1)."""


def padded(sizes: Iterable[float], kind: str) -> float:
    """Return the entries that an array takes on a machine of `kind`, padding included.

    Of all orders of its axes XLA takes one that pads least.
    """
    axes = [s for s in sizes if s != 1]
    entries = float(prod(axes))
    if kind != "tpu" or len(axes) < 2:
        return entries
    return min(
        entries / (outer * inner) * in_tiles(outer, inner) for outer, inner in permutations(axes, 2)
    )


def in_tiles(outer: float, inner: float) -> int:
    """Return the entries that a matrix takes in tiles, its last dimension being `inner`."""
    return _whole(outer, TILE[0]) * _whole(inner, TILE[1])


def _whole(size: float, tile: int) -> int:
    return ceil(size / tile) * tile
