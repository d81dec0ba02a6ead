"""Machines that users describe in a file: ``--machine FILE.toml``.

A file begins from a machine of the table (``like``) and says what differs, or says everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path

from moecc.checkpoint.files import read_utf8
from moecc.errors import InputError, Problem, UsageError
from moecc.plan.machines import Machine, parse_machine
from moecc.plan.networks import Network, Slices, Switch, Torus
from moecc.support.parse_units import count_bytes
from moecc.toml.fields import FieldReader
from moecc.toml.parse import parse_toml
from moecc.toml.places import Path as Keys
from moecc.toml.places import shown_place, toml_places

SUFFIX = ".toml"
MAX_BYTES = 1 << 16
MAX_DEVICES = 1 << 17


class Kind(StrEnum):
    """What a machine consists of, where no machine of the table says it."""

    unsaid = ""
    gpu = "gpu"
    cpu = "cpu"


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of products by element type; 0 where the type has none of its own."""

    f32: float = 0.0
    bf16: float = 0.0
    f16: float = 0.0
    i8: float = 0.0
    f8e4m3fn: float = 0.0
    f8e5m2: float = 0.0


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
    kind: Kind = Kind.unsaid
    devices: int = 0
    devices_per_node: int = 0
    memory: str = ""
    memory_bytes_per_second: float = 0.0
    link_bytes_per_second: float = 0.0
    node_bytes_per_second: float = 0.0
    slice_bytes_per_second: float = 0.0
    peak_flops: Peaks = field(default_factory=Peaks)
    source: str = ""


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
    table, places = parse_toml(text, path), toml_places(text)

    def where(keys: Keys) -> str:
        return shown_place(keys, places, path)

    reader = FieldReader(where)
    own = reader.section(OwnMachine, table, ())
    problems = [problem for _, problem in reader.problems]
    if not problems:
        zeros = dict(_zeros(own, table))
        found = [*zeros.items(), *((key, p) for key, p in _faults(own) if key not in zeros)]
        problems = [replace(p, where=f"{where((key,))}: {key}") for key, p in found]
    if problems:
        raise InputError(problems)
    return _made(own, path)


def _faults(own: OwnMachine) -> Iterator[tuple[str, Problem]]:
    """Yield what is wrong with values that were read, with the key that is to blame."""
    for key, value in _numbers(own):
        if value < 0:
            yield key, _not_positive(value)
    if own.devices > MAX_DEVICES:
        yield "devices", Problem("too many devices", expected=f"at most {MAX_DEVICES:,}")
    if own.memory and _bytes(own.memory) is None:
        yield "memory", Problem("not a number of bytes", expected='"72 GB"', found=own.memory)
    try:
        base = parse_machine(own.like) if own.like else None
    except UsageError as error:
        yield "like", error.problems[0]
        return
    if base is None:
        yield from _unsaid(own)
    else:
        yield from _said_by_name(own, base)
    yield from _uneven(own, base)


def _zeros(own: OwnMachine, table: Mapping[str, object]) -> Iterator[tuple[str, Problem]]:
    """Yield the numbers that a file says are 0, which otherwise means that it does not say."""
    peaks = table.get("peak_flops", {})
    said = {**table, **(peaks if isinstance(peaks, dict) else {})}
    for name, key, value in _named_numbers(own):
        if value == 0 and name in said:
            yield key, _not_positive(value)


def _not_positive(value: float) -> Problem:
    return Problem("not a positive number", expected="more than 0", found=f"{value:g}")


def _numbers(own: OwnMachine) -> Iterator[tuple[str, float]]:
    """Yield every number of a file with its key."""
    yield from ((key, value) for _, key, value in _named_numbers(own))


def _named_numbers(own: OwnMachine) -> Iterator[tuple[str, str, float]]:
    """Yield every number of a file with its name, and the key at the top."""
    for each in fields(own):
        value = getattr(own, each.name)
        if isinstance(value, (int, float)):
            yield each.name, each.name, value
    for each in fields(own.peak_flops):
        yield each.name, "peak_flops", getattr(own.peak_flops, each.name)


def _unsaid(own: OwnMachine) -> Iterator[tuple[str, Problem]]:
    """Yield what a file without `like` must have and has not."""
    needed: dict[str, object] = {
        "kind": own.kind.value, "devices": own.devices, "memory": own.memory,
        "memory_bytes_per_second": own.memory_bytes_per_second,
        "link_bytes_per_second": own.link_bytes_per_second,
        "peak_flops": own.peak_flops.f32,
    }  # fmt: skip
    if own.slice_bytes_per_second:
        yield "slice_bytes_per_second", Problem("only TPUs have slices", expected='like = "tpu:…"')
    if own.devices_per_node and own.devices_per_node < own.devices:
        needed["node_bytes_per_second"] = own.node_bytes_per_second
    expected = {"kind": "gpu | cpu", "peak_flops": "f32 at least"}
    for key, value in needed.items():
        if not value:
            yield key, Problem(
                "a key is missing", expected=expected.get(key),
                hint='or like = "gpu:h100:8", and what differs from it',
            )  # fmt: skip


def _said_by_name(own: OwnMachine, base: Machine) -> Iterator[tuple[str, Problem]]:
    """Yield the keys that the name of a machine decides: a topology, a share of the memory."""
    if own.kind is not Kind.unsaid:
        yield "kind", Problem("said twice", found=f"like = {own.like!r} is a {base.kind}")
    keys = {"tpu": ("devices", "devices_per_node", "node_bytes_per_second"), "cpu": ("devices",)}
    if own.slice_bytes_per_second and not isinstance(base.network, Slices):
        expected = 'several slices, like = "tpu:v5p:4x4x4:2"'
        problem = Problem("the machine has one slice", expected=expected, found=own.like)
        yield "slice_bytes_per_second", problem
    for key in keys.get(base.kind, ()):
        if getattr(own, key):
            example = {"tpu": "tpu:v5e:4x4", "cpu": "cpu:8"}[base.kind]
            yield key, Problem("the name of the machine decides it", hint=f'like = "{example}"')


def _uneven(own: OwnMachine, base: Machine | None) -> Iterator[tuple[str, Problem]]:
    """Yield devices that are not whole nodes."""
    devices, per_node = _nodes(own, base)
    if per_node and devices > per_node and devices % per_node:
        yield (
            "devices",
            Problem("not whole nodes", expected=f"a multiple of {per_node}", found=str(devices)),
        )


def _nodes(own: OwnMachine, base: Machine | None) -> tuple[int, int]:
    """Return how many devices there are, and how many of them in a node."""
    devices = own.devices or (base.devices if base else 0)
    network = base.network if base else None
    per_node = network.per_node if isinstance(network, Switch) else 0
    return devices, min(own.devices_per_node or per_node or devices, devices)


def _made(own: OwnMachine, path: str) -> Machine:
    base = parse_machine(own.like) if own.like else _nothing(own.kind.value)
    peaks = {f.name: getattr(own.peak_flops, f.name) for f in fields(own.peak_flops)}
    return replace(
        base,
        name=path,
        devices=own.devices or base.devices,
        peak_flops={**base.peak_flops, **{name: peak for name, peak in peaks.items() if peak}},
        usable_bytes=_bytes(own.memory) or base.usable_bytes,
        hbm_bytes_per_second=own.memory_bytes_per_second or base.hbm_bytes_per_second,
        network=_network(own, base),
        sources=(own.source or path, *base.sources),
    )


def _nothing(kind: str) -> Machine:
    """Return what a file without `like` fills in; this computer compiles for any CPU."""
    empty = Switch(0, 0, 0.0, 0.0)
    return Machine("", kind, 0, {}, 0, 0.0, empty, (), "cpu" if kind == "cpu" else "")


def _network(own: OwnMachine, base: Machine) -> Network:
    network, link = base.network, own.link_bytes_per_second
    if isinstance(network, Torus):
        return _relinked(network, link) if link else network
    if isinstance(network, Slices):
        torus = _relinked(network.torus, link) if link else network.torus
        outer = own.slice_bytes_per_second or network.outer_bytes_per_second
        return replace(network, torus=torus, outer_bytes_per_second=outer)
    assert isinstance(network, Switch), "there are three kinds of networks"
    devices, per_node = _nodes(own, base)
    link = link or network.link_bytes_per_second
    return Switch(
        per_node, devices, link,
        own.node_bytes_per_second or network.node_bytes_per_second or link * per_node,
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


def _bytes(text: str) -> int | None:
    try:
        return count_bytes(text)
    except UsageError:
        return None
