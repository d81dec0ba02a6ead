"""Importing jax on a computer without accelerators, where plug-ins for them may be installed.

The extras `tpu` and `gpu-aot` are there to compile for machines elsewhere.  jax tries every plug-in
when it starts, and those that find no device warn at length: here they are not asked.
"""

from __future__ import annotations

import glob
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from moecc.errors import MachineError

_DEVICES = (
    "/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel*",
    "/dev/vfio/[0-9]*",
)  # fmt: skip
_PCI_VENDORS = "/sys/bus/pci/devices/*/vendor"
_GOOGLE = "0x1ae0"

_CUDA = "jax_plugins.xla_cuda"
_ABSENT = (b"cudart_stub.cc", b"All log messages before absl::InitializeLog()")
"""What lines say that are written while CUDA's plug-in is loaded where there is no CUDA."""


def import_jax() -> None:
    """Import jax, for the CPU alone if this computer has nothing else and the user chose nothing.

    ``JAX_PLATFORMS`` is left alone where it is set, where a device of a TPU or a GPU is seen, where
    a TPU's runtime has left a variable, and where there are plug-ins for other accelerators.
    """
    if not is_cpu_alone():
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with _without(_ABSENT):
        import_module("jax")


def find_devices() -> None:
    """Let jax find its devices, which loads the plug-ins.

    Not before processes have met: `jax.distributed` comes first.

    Raises:
      MachineError: it finds none: ``JAX_PLATFORMS`` names what is not there, or a plug-in fails.
    """
    import jax

    try:
        with _without(_ABSENT) if is_cpu_alone() else nullcontext():
            jax.devices()
    except RuntimeError as error:
        stated = os.environ.get("JAX_PLATFORMS")
        raise MachineError(
            "jax finds no device",
            where="JAX_PLATFORMS" if stated else None,
            found=str(error),
            hint="JAX_PLATFORMS=cpu computes on the processor",
        ) from error


@cache
def is_cpu_alone() -> bool:
    """Return whether jax can find nothing here but a CPU."""
    # The plug-ins that jax would try, libtpu's aside.
    spec = find_spec("jax_plugins")
    folders = [] if spec is None else spec.submodule_search_locations
    names = [m.name for m in iter_modules(folders, "jax_plugins.")]
    names += [p.value for p in entry_points(group="jax_plugins")]
    return not has_accelerator() and all(name.startswith(_CUDA) for name in names)


def has_accelerator() -> bool:
    """Return whether this computer may have an accelerator that jax can use."""
    if sys.platform != "linux" or any(name.startswith("TPU_") for name in os.environ):
        return True
    if any(glob.glob(pattern) for pattern in _DEVICES):
        return True
    return any(Path(p).read_text("ascii").strip() == _GOOGLE for p in glob.glob(_PCI_VENDORS))


@contextmanager
def _without(noise: tuple[bytes, ...]) -> Iterator[None]:
    """Hold back the standard error, and then write it without the lines of `noise`."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if not any(text in line for text in noise):
                    os.write(2, line)


# Keep compiled programs on disk: runs that are resumed, sweeps and prompts compile nothing again.

_LARGEST_BYTES = 2 << 30
_LEAST_SECONDS = 0.1
"""Programs of one layer compile in 0.2 to 0.5 s, and a model that generates has a dozen."""


def keep_compiled_programs() -> None:
    """Let jax keep programs in ``~/.cache/moecc/xla``, unless it was told where, or not to.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder, and ``JAX_ENABLE_COMPILATION_CACHE=false``
    keeps nothing.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(home, "moecc", "xla")))
    jax.config.update("jax_compilation_cache_max_size", _LARGEST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
