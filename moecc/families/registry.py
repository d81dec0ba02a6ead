"""The families: parse any config.json to the typed config of its family, and add further ones.

An installed package registers each `Family` under the entry point ``moecc.families``; a file of
one's own holds it in a variable, and is given to a command with ``--load``.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from moecc.errors import InputError, Problem, UsageError, describe_error, raise_problems
from moecc.families.config import ModelConfig, TensorNames
from moecc.families.decoder import DecoderConfig
from moecc.families.mixture import MoeConfig
from moecc.families.reader import one_of, shown
from moecc.families.wrappers import TEXT, TOWERS, text_config, tower_config, wrapper_of
from moecc.support.user_files import run_file

if TYPE_CHECKING:
    from moecc.families.graphs.parameters import GraphRequest
    from moecc.ir.graph import Graph

Config = TypeVar("Config", bound=ModelConfig)


class Families(UserDict[str, type[ModelConfig]]):
    """The config classes by `model_type`; the module of one is imported when it is asked for.

    Args:
      dense: the decoder-only families without experts: the names of their classes after those of
        their modules, beside this one.
      mixtures: those with experts, likewise.
      others: all others, likewise.
    """

    def __init__(
        self, *, dense: Mapping[str, str], mixtures: Mapping[str, str], others: Mapping[str, str]
    ) -> None:
        classes = {**dense, **mixtures, **others}
        super().__init__(cast("dict[str, type[ModelConfig]]", classes))
        self.kinds: Mapping[str, type[ModelConfig]] = {
            **dict.fromkeys(dense, DecoderConfig),
            **dict.fromkeys(mixtures, MoeConfig),
            **dict.fromkeys(others, ModelConfig),
        }

    def __getitem__(self, name: str) -> type[ModelConfig]:
        """Return the class of a family. Raises KeyError if there is none."""
        config: Any = self.data[name]
        if isinstance(config, str):
            module, _, class_name = config.partition(".")
            config = self.data[name] = getattr(
                import_module(f"moecc.families.{module}"), class_name
            )
        return cast("type[ModelConfig]", config)

    def of_kind(self, kind: type[Config]) -> dict[str, type[Config]]:
        """Return the families of a kind, DecoderConfig or MoeConfig; others are not imported."""
        names = [n for n in self if issubclass(self.kinds.get(n) or self[n], kind)]
        return {name: cast("type[Config]", self[name]) for name in names}


# Of families that run in as many engines, `--to auto` takes the first.
CONFIGS = Families(
    dense={
        "llama": "llama.LlamaConfig",
        "mistral": "llama.MistralConfig",
        "qwen2": "qwen.Qwen2Config",
        "qwen3": "qwen.Qwen3Config",
        "olmo2": "olmo.Olmo2Config",
        "granite": "granite.GraniteConfig",
        "phi3": "phi.Phi3Config",
        "smollm3": "llama.SmolLM3Config",
        "gemma": "gemma.GemmaConfig",
        "gemma2": "gemma.Gemma2Config",
        "gemma3_text": "gemma.Gemma3TextConfig",
        "olmo": "olmo.OlmoConfig",
        "olmo3": "olmo.Olmo3Config",
        "ernie4_5": "ernie.Ernie45Config",
        "glm": "glm.GlmConfig",
        "glm4": "glm.Glm4Config",
        "hunyuan_v1_dense": "llama.HunYuanDenseV1Config",
        "exaone4": "olmo.Exaone4Config",
        "seed_oss": "llama.SeedOssConfig",
        "helium": "llama.HeliumConfig",
        "arcee": "nemotron.ArceeConfig",
        "nemotron": "nemotron.NemotronConfig",
        "starcoder2": "nemotron.Starcoder2Config",
        "apertus": "nemotron.ApertusConfig",
        "granitemoehybrid": "granite.GraniteHybridConfig",
        "stablelm": "phi.StableLmConfig",
        "phi": "phi.PhiConfig",
        "cohere": "cohere.CohereConfig",
        "cohere2": "cohere.Cohere2Config",
        "gptj": "falcon.GptJConfig",
        "falcon": "falcon.FalconConfig",
        "lfm2": "lfm2.Lfm2Config",
        "qwen3_5_text": "qwen.Qwen35TextConfig",
    },
    mixtures={
        "mixtral": "llama.MixtralConfig",
        "qwen2_moe": "qwen.Qwen2MoeConfig",
        "qwen3_moe": "qwen.Qwen3MoeConfig",
        "qwen3_next": "qwen.Qwen3NextConfig",
        "qwen3_5_moe_text": "qwen.Qwen35MoeTextConfig",
        "glm4_moe": "glm.Glm4MoeConfig",
        "granitemoe": "granite.GraniteMoeConfig",
        "flex_olmo": "olmo.FlexOlmoConfig",
        "ernie4_5_moe": "ernie.Ernie45MoeConfig",
        "olmoe": "olmo.OlmoeConfig",
        "gpt_oss": "gpt_oss.GptOssConfig",
        "phimoe": "phi.PhimoeConfig",
        "lfm2_moe": "lfm2.Lfm2MoeConfig",
        "llama4_text": "llama.Llama4TextConfig",
        "deepseek_v2": "deepseek.DeepseekV2Config",
        "deepseek_v3": "deepseek.DeepseekV3Config",
        "kimi_k2": "deepseek.KimiK2Config",
    },
    others={
        "gemma3n_text": "gemma4.Gemma3nTextConfig",
        "gemma4_text": "gemma4.Gemma4TextConfig",
        "gpt2": "gpt.Gpt2Config",
        "gpt_neox": "gpt.GptNeoXConfig",
        "opt": "gpt.OptConfig",
        "bloom": "alibi.BloomConfig",
        "mpt": "alibi.MptConfig",
        "t5": "t5.T5Config",
        "mt5": "t5.MT5Config",
        "umt5": "t5.UMT5Config",
        "switch_transformers": "t5.SwitchTransformersConfig",
        "bert": "bert.BertConfig",
        "roberta": "bert.RobertaConfig",
        "xlm-roberta": "bert.XlmRobertaConfig",
        "xlm-roberta-xl": "bert.XlmRobertaXlConfig",
        "camembert": "bert.CamembertConfig",
        "mpnet": "bert.MPNetConfig",
        "distilbert": "bert.DistilBertConfig",
        "electra": "bert.ElectraConfig",
        "albert": "bert.AlbertConfig",
        "modernbert": "modernbert.ModernBertConfig",
        "deberta-v2": "deberta.DebertaV2Config",
        "clip_text_model": "bert.ClipTextConfig",
        "vit": "vision.ViTConfig",
        "dinov2": "vision.Dinov2Config",
        "dinov3_vit": "vision.Dinov3ViTConfig",
        "clip_vision_model": "vision.ClipVisionConfig",
        "siglip_vision_model": "vision.SiglipVisionConfig",
        "swin": "swin.SwinConfig",
        "whisper": "whisper.WhisperConfig",
        "wav2vec2": "wav2vec2.Wav2Vec2Config",
        "hubert": "wav2vec2.HubertConfig",
        "bart": "bart.BartConfig",
        "mbart": "bart.MBartConfig",
        "marian": "bart.MarianConfig",
        "m2m_100": "bart.M2M100Config",
        "st_moe": "st_moe.StMoeConfig",
    },
)
"""The families that moecc reads and writes, by `model_type`; others may be added."""


def decoders() -> dict[str, type[DecoderConfig]]:
    """Return the decoder-only families."""
    return CONFIGS.of_kind(DecoderConfig)


def mixtures() -> dict[str, type[MoeConfig]]:
    """Return the decoder-only families with experts."""
    return CONFIGS.of_kind(MoeConfig)


ORIGINS: dict[str, str] = {}
"""The package or file of each family that was added."""

ENTRY_POINT = "moecc.families"
"""Of packages: each entry is a `Family`."""


@dataclass(frozen=True)
class Family:
    """A model architecture: how its config is read, and how its graph is built.

    Attributes:
      config: the class of its config, derived from `ModelConfig` or from that of a similar family.
      build: builds the graph of a config; None where the builder of a base class does.
      names: the names of its tensors that moecc looks for by itself: embedding and head.
      shrink: returns a config with small sizes, for checks of passes; None where that of a base
        class does, or where checks of passes have no use for one.
    """

    config: type[ModelConfig]
    build: Callable[[Any, GraphRequest], Graph] | None = None
    names: TensorNames | None = None
    shrink: Callable[[Any], ModelConfig] | None = None

    def register(self, origin: str) -> None:
        """Add the family to those that moecc reads and writes.

        Args:
          origin: the package or file that it is from.

        Raises:
          UsageError: its name is taken, or something that it needs is missing.
        """
        where = f"{origin}, {_title(self.config)}"
        problems = [Problem(fault, where) for fault in self._faults(origin)]
        raise_problems(problems, UsageError)
        config: Any = self.config
        name = config.model_type
        CONFIGS[name], ORIGINS[name] = config, origin
        if self.build is not None:
            config.builder = staticmethod(self.build)
        if self.names is not None:
            config.names = self.names
        if self.shrink is not None:
            config.shrunk = self.shrink

    def _faults(self, origin: str) -> Iterator[str]:
        """Yield why it cannot be added."""
        config: object = self.config
        if not isinstance(config, type) or not issubclass(config, ModelConfig):
            yield "its config is no subclass of ModelConfig"
            return
        needed = ("model_type", "architecture", "defaults")
        missing = [name for name in needed if not hasattr(config, name)]
        if missing:
            yield f"its config has no {' and no '.join(missing)}"
            return
        if "__dataclass_fields__" not in vars(config):
            yield "its config is not a dataclass: @dataclass(frozen=True, kw_only=True) is missing"
        previous = ORIGINS.get(config.model_type, "moecc")
        if CONFIGS.get(config.model_type, config) is not config and previous != origin:
            yield f"the family {config.model_type!r} is defined twice; another is in {previous}"
        if self.build is None and config.builder is None and not config.graphs:
            yield "nothing builds its graph: Family(build=…) is missing"


def _title(config: object) -> str:
    return getattr(config, "__name__", repr(config))


def parse_config(data: Mapping[str, object], where: str = "config.json") -> ModelConfig:
    """Read a config of whichever family `model_type` names; of a wrapper, that of its text model.

    Raises InputError with every problem: an unknown family, a wrong type or size, contradictory
    keys, quantised weights, a model with its own code.
    """
    if not isinstance(data, Mapping):
        raise InputError("not a config", where=where, expected="a JSON object", found=shown(data))
    if (wrapper := wrapper_of(data)) is not None:
        data, where = text_config(wrapper, data), f"{where}: {TEXT}"
    name = data.get("model_type")
    if isinstance(name, str) and name in TOWERS:
        data, where = tower_config(data), f"{where}: vision_config"
        name = data["model_type"]
    load_installed()
    config = CONFIGS.get(name) if isinstance(name, str) else None
    if name == "st_moe" and "graph" in data:
        from moecc.families.st_moe import GraphConfig

        config = GraphConfig
    if config is not None:
        return config.from_json(data, where)
    raise InputError(
        "unknown family",
        where=f"{where}: model_type",
        expected=one_of(CONFIGS),
        found=shown(name) if "model_type" in data else "nothing",
        hint=_way_out(data),
    )


@cache
def load_installed() -> None:
    """Let every installed package add its families to `CONFIGS`, once.

    Raises UsageError if a package cannot be imported, or one of its families cannot be added.
    """
    for point in entry_points(group=ENTRY_POINT):
        origin = point.dist.name if point.dist is not None else point.value
        try:
            family = point.load()
            family.register(origin)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                "a package states a family that cannot be loaded",
                where=f"{origin}, entry point {ENTRY_POINT}: {point.name} = {point.value}",
                found=describe_error(error),
                hint="mend the package, or uninstall it",
            ) from error


def add_families(file: str) -> int:
    """Run a Python file, add the families that it holds in variables, and return their number.

    Raises:
      UsageError: the file cannot be run; see `Family.register`.
    """
    module = run_file(Path(file))
    families = [thing for thing in vars(module).values() if isinstance(thing, Family)]
    for family in families:
        family.register(file)
    return len(families)


def _way_out(data: Mapping[str, object]) -> str:
    """Return what to do about a config without a family that is known."""
    named = data.get("architectures")
    classes = named if isinstance(named, list) else []
    # Those with similar names are other families.
    likely = [name for name, config in CONFIGS.items() if config.architecture in classes]
    if data.get("model_type") is None:
        if likely:
            return f'add "model_type": "{likely[0]}", as the class in architectures has it'
        return 'add "model_type", which names the family, to the file'
    ways = (
        "moecc.torch.convert takes any module of PyTorch; or add the family (--load FILE.py, or a "
        "package), or write its graph as a .moe file over the folder's tensors: "
        "docs/adding-a-family.md"
    )
    if classes:
        ways = f"moecc convert --via torch reads the folder if its class is of transformers; {ways}"
    if likely:
        return f"the class in architectures is that of model_type {likely[0]!r}; else {ways}"
    return ways
