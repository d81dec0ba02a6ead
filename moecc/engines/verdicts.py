"""Whether each engine runs a model as it is, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from moecc.checkpoint.gguf.families import GGUF_MIXTURES
from moecc.checkpoint.gguf.misfits import misfits
from moecc.engines.conditions import unfulfilled
from moecc.engines.table import Engine, Reading, engine_table
from moecc.families.configs import ModelConfig, MoeConfig

UNKNOWN = "it does not know this family"


@dataclass(frozen=True)
class Verdict:
    """Whether an engine runs a model.

    Attributes:
      engine: its name.
      version: the version that was looked at.
      runs: whether it computes the model as it is.
      reasons: what it does not do, if not.
      silent: whether it computes another function without an error.
      note: how it reads the model, if not from the folder.
    """

    engine: str
    version: str
    runs: bool
    reasons: tuple[str, ...] = ()
    silent: bool = False
    note: str = ""

    @property
    def release(self) -> str:
        """The engine and its version."""
        return release_of(self.engine, self.version)

    def __str__(self) -> str:
        if self.runs:
            return f"{self.engine} ✓" + (f" ({self.note})" if self.note else "")
        return f"{self.engine} ✗ ({'; '.join(self.reasons)})"

    def to_json(self) -> dict[str, object]:
        """Return the verdict as JSON values."""
        return asdict(self)


def release_of(engine: str, version: str) -> str:
    """Return an engine and its version, ``transformers 5`` and ``5.1.0`` as one."""
    name, _, major = engine.rpartition(" ")
    return f"{name} {version}" if name and version.startswith(major) else f"{engine} {version}"


def verdicts(config: ModelConfig) -> tuple[Verdict, ...]:
    """Return the verdict of each engine on a model of `config`; none for dense families."""
    table = engine_table()
    readings = table.reads.get(config.model_type)
    if readings is None:
        return ()
    return tuple(_verdict(engine, readings.get(engine.name), config) for engine in table.engines)


def verdicts_on_gguf(architecture: str) -> tuple[Verdict, ...]:
    """Return the verdict on a GGUF file that moecc writes: only llama.cpp was looked at."""
    engines = (engine for engine in engine_table().engines if engine.name == "llama.cpp")
    sparse = architecture in GGUF_MIXTURES
    return tuple(Verdict(e.name, e.version, runs=True) for e in engines if sparse)


def _verdict(engine: Engine, reading: Reading | None, config: ModelConfig) -> Verdict:
    if reading is None:
        return Verdict(engine.name, engine.version, False, (UNKNOWN,))
    if reading.never:
        return Verdict(engine.name, engine.version, False, (reading.never,))
    if reading.gguf:
        return _through_gguf(engine, reading.gguf, config)
    needs, silent = (unfulfilled(words, config) for words in (reading.needs, reading.silent))
    return Verdict(
        engine.name, engine.version, not needs and not silent, needs + silent,
        silent=bool(silent) and not needs,
    )  # fmt: skip


def _through_gguf(engine: Engine, architecture: str, config: ModelConfig) -> Verdict:
    sparse = config.sparse_layers if isinstance(config, MoeConfig) else ()
    problems = misfits(architecture, GGUF_MIXTURES[architecture], config.to_json(), sparse)
    reasons = tuple(problem.found or problem.what for problem in problems)
    note = "" if reasons else f"as gguf:{architecture}"
    return Verdict(engine.name, engine.version, not reasons, reasons, note=note)


def summary(found: Iterable[Verdict]) -> str:
    """Return the verdicts in one line: ``transformers 5 ✓, SGLang ✗ (…)``."""
    return ", ".join(map(str, found))
