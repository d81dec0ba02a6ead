"""Compiling a function for hardware that is not attached, and what came of it."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jax.stages import Lowered, Wrapped

from moecc.errors import InputError
from moecc.plan.machines import Machine
from moecc_backends.xla.trace.typed_jax import PyTree

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
"""How libtpu reports that a program is too large."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one device, in bytes.

    Attributes:
      arguments: parameters, optimiser state and inputs.
      outputs: results, those that take the place of donated arguments included.
      aliased: the part of the outputs that does.
      temporaries: what lives while the program runs.
      code: the program itself.
      peak: the most that is needed at a time, as the compiler reports.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int

    def to_json(self) -> dict[str, int]:
        """Return the sizes by kind, with unit in the names."""
        return {f"{name}_bytes": size for name, size in asdict(self).items()}


class DoesNotFit(InputError):
    """The compiler reports that a device has not enough memory.

    Attributes:
      needed_bytes: what the program needs, as far as the compiler reports.
      available_bytes: what there is.
    """

    def __init__(self, needed_bytes: int, available_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        super().__init__(
            "the program does not fit into the memory of a device",
            expected=f"{available_bytes / 1e9:.2f} GB at most",
            found=f"{needed_bytes / 1e9:.2f} GB",
            hint="a larger mesh, rematerialisation, or fewer tokens a batch",
        )


@dataclass(frozen=True)
class Compiled:
    """A program compiled ahead of time.

    Attributes:
      lowered_seconds: tracing and lowering to StableHLO.
      compiled_seconds: what XLA took.
      memory: of one device.
      hlo: the optimised program, as one device runs it.
      host_peak_bytes: the most memory that this process has had so far.
    """

    lowered_seconds: float
    compiled_seconds: float
    memory: Memory
    hlo: str
    host_peak_bytes: int


def lower(function: Wrapped, arguments: Sequence[PyTree], machine: Machine) -> Lowered:
    """Trace and lower a jitted `function` of abstract `arguments` for `machine`."""
    platform = {"gpu": "cuda"}.get(machine.kind, machine.kind)
    lowered: Lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
    return lowered


def compile_ahead(function: Wrapped, arguments: Sequence[PyTree], machine: Machine) -> Compiled:
    """Compile a jitted `function` of abstract `arguments`, whose shardings name the devices.

    Raises:
      DoesNotFit: a device has not enough memory.
    """
    start = time.perf_counter()
    lowered = lower(function, arguments, machine)
    lowered_seconds = time.perf_counter() - start
    return compile_lowered(lowered, lowered_seconds, machine)


def compile_lowered(
    lowered: Lowered,
    lowered_seconds: float,
    machine: Machine,
    options: Mapping[str, str | float] | None = None,
) -> Compiled:
    """Compile what `lower` returned, with `options` of XLA.

    Raises:
      DoesNotFit: a device has not enough memory.
    """
    start = time.perf_counter()
    try:
        given: dict[str, Any] = dict(options or {})  # jax takes numbers, which its type leaves out
        compiled = lowered.compile(compiler_options=given or None)
    except RuntimeError as error:
        raise refusal(error) from None
    seconds = time.perf_counter() - start
    return Compiled(
        lowered_seconds,
        seconds,
        _memory(compiled.memory_analysis(), is_cpu=machine.kind == "cpu"),
        compiled.as_text() or "",
        host_peak_bytes(),
    )


def host_peak_bytes() -> int:
    """Return the most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory(analysis: object, *, is_cpu: bool) -> Memory:
    arguments, outputs, aliased, temporaries, code = (
        int(getattr(analysis, f"{kind}_size_in_bytes"))
        for kind in ("argument", "output", "alias", "temp", "generated_code")
    )
    peak = int(getattr(analysis, "peak_memory_in_bytes", 0))
    if is_cpu or not peak:
        # The peak that XLA's CPU compiler reports leaves the temporaries out.
        peak = arguments + outputs - aliased + temporaries
    return Memory(arguments, outputs, aliased, temporaries, code, peak)


def refusal(error: RuntimeError) -> Exception:
    """Return the compiler's error, as `DoesNotFit` where it is about the memory of a device."""
    matches = (pattern.search(str(error)) for pattern in _TOO_LARGE)
    found = next((match for match in matches if match is not None), None)
    if found is None:
        return error
    needed, available = (int(float(found[at]) * _UNITS[found[at + 1]]) for at in (1, 3))
    return DoesNotFit(needed, available)
