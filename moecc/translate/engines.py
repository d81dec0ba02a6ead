"""Whether each engine runs a model as it is, before anything is written."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from moecc.families.config import ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.gpt_oss import GptOssConfig
from moecc.families.mixture import MoeConfig
from moecc.formats.gguf.config import misfits
from moecc.formats.gguf.families import GGUF_MIXTURES
from moecc.support.untyped import Json

# The conditions under which an engine reads a model as it is, by the words of the table.

Holds = Callable[[DecoderConfig], bool]


@dataclass(frozen=True)
class Condition:
    """A condition.

    Attributes:
      holds: whether a config fulfils it.
      otherwise: what the engine does not do with a config that does not.
    """

    holds: Holds
    otherwise: str


def _every_layer(config: DecoderConfig) -> bool:
    return not isinstance(config, MoeConfig) or all(config.sparse_layers)


def _not_renormalised(config: DecoderConfig) -> bool:
    if not isinstance(config, MoeConfig) or config.experts_per_token == config.num_experts:
        return True  # the gates of all experts add up to 1
    return not config.norm_topk_prob


def _full_attention(config: DecoderConfig) -> bool:
    seen = (window for window in config.sliding_windows if window is not None)
    return all(window >= config.max_position_embeddings for window in seen)


def _several_choices(config: DecoderConfig) -> bool:
    if not isinstance(config, MoeConfig) or not config.norm_topk_prob:
        return True
    return config.experts_per_token > 1


def _released_swiglu(config: DecoderConfig) -> bool:
    if not isinstance(config, GptOssConfig):
        return True
    return (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)


def _every_second_window(config: DecoderConfig) -> bool:
    windows = config.sliding_windows
    return None not in windows[::2] and set(windows[1::2]) <= {None}


CONDITIONS: Mapping[str, Condition] = {
    "every layer": Condition(_every_layer, "dense layers among sparse ones"),
    "untied": Condition(
        lambda c: not c.tie_word_embeddings, "an output matrix tied to the embedding"
    ),
    "plain heads": Condition(
        lambda c: c.head_dim * c.num_attention_heads == c.hidden_size,
        "heads of another width than hidden_size / heads",
    ),
    "qkv biases": Condition(lambda c: c.qkv_bias, "queries, keys and values without biases"),
    "no attention biases": Condition(
        lambda c: not c.qkv_bias and not c.output_bias, "biases of the attention's projections"
    ),
    "attention biases": Condition(
        lambda c: c.qkv_bias and c.output_bias, "attention projections without biases"
    ),
    "head bias": Condition(lambda c: c.head_bias, "an output matrix without a bias"),
    "released SwiGLU": Condition(
        _released_swiglu, "another SwiGLU than that of the released models"
    ),
    "every second window": Condition(
        _every_second_window, "windows other than in every second layer from the first"
    ),
    "yarn": Condition(lambda c: c.rope.type == "yarn", "rotary positions other than YaRN"),
    "full attention": Condition(_full_attention, "sliding windows"),
    "silu": Condition(lambda c: c.hidden_act == "silu", "another activation than SiLU"),
    "plain rope": Condition(lambda c: c.rope.type == "default", "scaled rotary positions"),
    "usual rope factor": Condition(
        lambda c: c.rope.attention_factor is None, "an attention_factor of rotary scalings"
    ),
    "no routing bias": Condition(
        lambda c: not isinstance(c, MoeConfig) or not c.routing_bias,
        "a bias in the choice of experts",
    ),
    "several choices": Condition(_several_choices, "one renormalised gate a token"),
    "epsilon 1e-5": Condition(
        lambda c: c.rms_norm_eps == 1e-5, "another epsilon than 1e-5 of its norms of queries"
    ),
    "not renormalised": Condition(_not_renormalised, "renormalised gates"),
}


def unfulfilled(words: tuple[str, ...], config: ModelConfig) -> tuple[str, ...]:
    """Return what an engine does not do, of the conditions `words` that `config` does not meet."""
    if not isinstance(config, DecoderConfig):
        return ()
    found = (CONDITIONS[word] for word in words)
    return tuple(c.otherwise for c in found if not c.holds(config))


# The table of engines: what each reads of each family, with version and source.


@dataclass(frozen=True)
class Engine:
    """An engine in the version that was looked at.

    Attributes:
      name: as its makers spell it.
      version: the version.
      checked: ``run`` if its logits were compared, ``read`` if its code was read.
      source: the test, or the package, that the facts are from.
    """

    name: str
    version: str
    checked: str
    source: str


@dataclass(frozen=True)
class Reading:
    """The conditions under which an engine reads a family.

    Attributes:
      needs: without these it refuses the checkpoint.
      silent: without these it loads it and computes another function.
      gguf: the architecture of GGUF that it reads instead of a folder; empty if it reads folders.
      never: why it reads none of moecc's checkpoints of the family; empty if it may.
    """

    needs: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    gguf: str = ""
    never: str = ""


@dataclass(frozen=True)
class Table:
    """The engines, and for each family what they read of it."""

    engines: tuple[Engine, ...]
    reads: Mapping[str, Mapping[str, Reading]]


@cache
def engine_table() -> Table:
    """Return the table that comes with moecc."""
    text = files("moecc.translate").joinpath("engines.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    engines = tuple(
        Engine(name, row["version"], row["checked"], row["source"])
        for name, row in data["engines"].items()
    )
    reads = {
        family: {name: _reading(row) for name, row in rows.items()}
        for family, rows in data["reads"].items()
    }
    return Table(engines, reads)


def _reading(row: Json) -> Reading:
    needs, silent = (tuple(row.get(key, ())) for key in ("needs", "silent"))
    return Reading(needs, silent, row.get("as", ""), row.get("never", ""))


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
