"""Settings that all tests share.

MOECC_HYPOTHESIS chooses the profile: ``dev``, ``ci`` (where CI is set: the same examples
every time) or ``nightly`` (5,000 examples a test).
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before jax looks at its devices: what lies on a mesh is tested on a CPU that is eight devices.
# Programs run once or twice here, so LLVM does not optimise them: compiling takes half the time.
# The older emitters of fused loops make less text for LLVM to compile.  What XLA does to a program,
# which is what the tests about compiled programs read, is the same but for the size of its buffers:
# tests about memory ask for the emitters that users have.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Programs are small: to compile the parts of one side by side costs more than it saves.
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
# From 0.12 on jaxlib has the newer emitters alone.
if find_spec("jaxlib") and [*map(int, version("jaxlib").split(".")[:2])] < [0, 12]:
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

# What a command says does not depend on how busy the machine is.
os.environ["MOECC_PROGRESS"] = "off"

# Tests, whose assertions pytest rewrites, and what hundreds of child processes import, are compiled
# once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# So are programs: a child, the other worker and the next run find them.  With a limit jax locks the
# folder, which several processes write.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "cache"
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 30)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

from moecc.ir import Graph, verify  # noqa: E402
from moecc.rewrite.passes import Context, Pass, PassResult  # noqa: E402
from moecc.rewrite.runner import run_pass  # noqa: E402
from tests.support.commands import Moecc  # noqa: E402

# Nothing here outlives a loss of power, so that the disk need not be waited for.  That whatever is
# written is synchronised, and in which order, is tested by what is called (`tests/kill/power.py`).
os.fsync = lambda descriptor: None  # type: ignore[assignment]

# A shell that starts the suite in the background has SIGINT ignored, and nohup SIGHUP, and so have
# all programs that tests start and interrupt.  A signal that is handled here is not ignored there.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)

# No deadline: the first example of a test pays for imports and caches.
# A hit rate (`moecc.testing.laws`) is judged after 50 graphs.
EXAMPLES = 100 if os.environ.get("MOECC_TIER") == "all" else 50
settings.register_profile("dev", deadline=None, max_examples=EXAMPLES)
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", deadline=None, max_examples=5000, print_blob=True)
settings.load_profile(os.environ.get("MOECC_HYPOTHESIS", "ci" if os.environ.get("CI") else "dev"))


def pytest_collection_finish() -> None:
    """Spare the collector what lives as long as the tests: thousands of them, and libraries.

    It is also run less often than Python does; both together save a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    # jax looks at every entry of its cache whenever it adds one, 20 ms with 600 of them: child
    # processes, which add few, keep the folder small.
    if "jax._src.lru_cache" in sys.modules:
        cache = sys.modules["jax._src.lru_cache"].LRUCache
        cache._evict_if_needed = lambda self, *, additional_size=0: None


@pytest.fixture
def moecc(capsys):
    return Moecc(capsys)


@pytest.fixture(autouse=True, scope="session")
def _verify_what_passes_produce():
    """Verify the graph after every pass that a test applies, whether through a pipeline or not."""
    patch = pytest.MonkeyPatch()
    original = Pass.__init_subclass__

    def verifying(apply: Any) -> Any:
        @functools.wraps(apply)
        def wrapped(self: Pass, graph: Graph, ctx: Context) -> PassResult:
            result: PassResult = apply(self, graph, ctx)
            # Of a pipeline the runner itself verifies the graph: a wide graph costs as much as
            # the pass.
            if sys._getframe(2).f_code is not run_pass.__code__:
                verify(graph)
            return result

        return wrapped

    def init_subclass(cls: type[Pass], **kwargs: Any) -> None:
        original(**kwargs)
        if "apply" in vars(cls):
            patch.setattr(cls, "apply", verifying(cls.apply))

    for cls in _subclasses(Pass):
        if "apply" in vars(cls):
            patch.setattr(cls, "apply", verifying(cls.apply))
    patch.setattr(Pass, "__init_subclass__", classmethod(init_subclass))
    yield
    patch.undo()


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
