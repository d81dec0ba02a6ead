"""Parse any config.json to the typed config of its family."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points

from moecc.errors import InputError, UsageError, described
from moecc.families.alibi import BloomConfig, MptConfig
from moecc.families.apertus import ApertusConfig
from moecc.families.bart import BartConfig, M2M100Config, MarianConfig, MBartConfig
from moecc.families.bert import (
    AlbertConfig,
    BertConfig,
    CamembertConfig,
    ClipTextConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    RobertaConfig,
    XlmRobertaConfig,
)
from moecc.families.cohere import Cohere2Config, CohereConfig
from moecc.families.config import ModelConfig
from moecc.families.decoder import DecoderConfig
from moecc.families.ernie import Ernie45Config, Ernie45MoeConfig
from moecc.families.exaone import Exaone4Config
from moecc.families.falcon import FalconConfig
from moecc.families.gemma import Gemma2Config, Gemma3TextConfig, GemmaConfig
from moecc.families.glm import Glm4Config, Glm4MoeConfig, GlmConfig
from moecc.families.gpt import Gpt2Config, GptNeoXConfig, OptConfig
from moecc.families.gpt_oss import GptOssConfig
from moecc.families.gptj import GptJConfig
from moecc.families.granite import GraniteConfig, GraniteHybridConfig, GraniteMoeConfig
from moecc.families.hunyuan import HunYuanDenseV1Config
from moecc.families.lfm2 import Lfm2Config
from moecc.families.llama import (
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    SeedOssConfig,
    SmolLM3Config,
)
from moecc.families.mixture import MoeConfig
from moecc.families.modernbert import ModernBertConfig
from moecc.families.nemotron import ArceeConfig, NemotronConfig
from moecc.families.olmo import FlexOlmoConfig, Olmo2Config, Olmo3Config, OlmoConfig, OlmoeConfig
from moecc.families.phi import Phi3Config, PhiConfig, PhimoeConfig
from moecc.families.qwen import Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig
from moecc.families.reader import one_of, shown
from moecc.families.st_moe import FAMILY, GraphConfig, StMoeConfig
from moecc.families.stablelm import StableLmConfig
from moecc.families.starcoder2 import Starcoder2Config
from moecc.families.t5 import MT5Config, SwitchTransformersConfig, T5Config, UMT5Config
from moecc.families.vision import (
    ClipVisionConfig,
    Dinov2Config,
    Dinov3ViTConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from moecc.families.whisper import WhisperConfig
from moecc.families.wrappers import TEXT, TOWERS, text_config, tower_config, wrapper_of

# Of families that run in as many engines, `--to auto` takes the first.
CONFIGS: dict[str, type[ModelConfig]] = {
    config.model_type: config
    for config in (
        LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Olmo2Config, GraniteConfig,
        Phi3Config, SmolLM3Config, GemmaConfig, Gemma2Config, Gemma3TextConfig,
        OlmoConfig, Olmo3Config, Ernie45Config, GlmConfig, Glm4Config, HunYuanDenseV1Config,
        Exaone4Config, SeedOssConfig, HeliumConfig, ArceeConfig, NemotronConfig, Starcoder2Config,
        ApertusConfig, GraniteHybridConfig, StableLmConfig, PhiConfig, CohereConfig, Cohere2Config,
        GptJConfig, FalconConfig, Lfm2Config,
        MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, Glm4MoeConfig, GraniteMoeConfig,
        FlexOlmoConfig, Ernie45MoeConfig, OlmoeConfig, GptOssConfig, PhimoeConfig,
        Gpt2Config, GptNeoXConfig, OptConfig, BloomConfig, MptConfig,
        T5Config, MT5Config, UMT5Config, SwitchTransformersConfig,
        BertConfig, RobertaConfig, XlmRobertaConfig, CamembertConfig, MPNetConfig, DistilBertConfig,
        ElectraConfig, AlbertConfig, ModernBertConfig, ClipTextConfig,
        ViTConfig, Dinov2Config, Dinov3ViTConfig, ClipVisionConfig, SiglipVisionConfig,
        WhisperConfig, BartConfig, MBartConfig, MarianConfig, M2M100Config,
        StMoeConfig,
    )
}  # fmt: skip
"""The families that moecc reads and writes, by `model_type`; others may be added."""


def decoders() -> dict[str, type[DecoderConfig]]:
    """Return the decoder-only families."""
    return {name: c for name, c in CONFIGS.items() if issubclass(c, DecoderConfig)}


def mixtures() -> dict[str, type[MoeConfig]]:
    """Return the decoder-only families with experts."""
    return {name: c for name, c in CONFIGS.items() if issubclass(c, MoeConfig)}


ORIGINS: dict[str, str] = {}
"""The package or file of each family that was added."""

ENTRY_POINT = "moecc.families"
"""Of packages: each entry is a `moecc.families.outside.Family`."""


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
    if name == FAMILY and "graph" in data:
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
                found=described(error),
                hint="mend the package, or uninstall it",
            ) from error


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
        "moecc convert --via torch reads any class of transformers; or add the family (--load "
        "FILE.py, or a package), or write its graph as a .moe file over the folder's tensors: "
        "docs/adding-a-family.md"
    )
    if likely:
        return f"the class in architectures is that of model_type {likely[0]!r}; else {ways}"
    return ways
