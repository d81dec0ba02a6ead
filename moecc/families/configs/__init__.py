"""Typed configs of model families, read from and written to config.json.

`parse_config` and `read_config` return the config of whichever family a file names; each config
class has `from_json` and `to_json`.  Both spellings of transformers, 4 and 5, are read, and both
are written side by side.
"""

from moecc.families.configs.granite import GraniteMoeConfig
from moecc.families.configs.llama import MixtralConfig
from moecc.families.configs.olmo import FlexOlmoConfig, Olmo2Config, OlmoeConfig
from moecc.families.configs.phi import Phi3Config, PhimoeConfig
from moecc.families.configs.qwen import Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig
from moecc.families.configs.rope import attention_factor, rotary_frequencies

from .base import DecoderConfig
from .bert import BertConfig, MPNetConfig, RobertaConfig
from .encdec import STACKS, EncDecConfig, Experts
from .ernie4_5_moe import Ernie45MoeConfig
from .gemma import Gemma2Config, Gemma3TextConfig, GemmaConfig
from .glm4_moe import Glm4MoeConfig
from .gpt import Gpt2Config, GptConfig, GptNeoXConfig
from .gpt_oss import GptOssConfig
from .granite import GraniteConfig
from .llama import LlamaConfig, MistralConfig
from .model import ACTIVATIONS, DTYPES, ModelConfig
from .moe import MoeConfig
from .opt import OptConfig
from .parse import CONFIGS, DECODERS, ORIGINS, load_installed, parse_config, read_config
from .rope import RopeConfig
from .smollm3 import SmolLM3Config
from .st_moe import GraphConfig, StMoeConfig
from .switch import SwitchTransformersConfig
from .t5 import MT5Config, T5Config, UMT5Config
from .vision import Dinov2Config, VisionConfig, ViTConfig
from .whisper import WhisperConfig

__all__ = [
    "Ernie45MoeConfig",
    "FlexOlmoConfig",
    "Glm4MoeConfig",
    "GraniteMoeConfig",
    "GptOssConfig",
    "PhimoeConfig",
    "OlmoeConfig",
    "ACTIVATIONS",
    "CONFIGS",
    "DECODERS",
    "DTYPES",
    "ORIGINS",
    "STACKS",
    "BertConfig",
    "DecoderConfig",
    "Dinov2Config",
    "EncDecConfig",
    "Experts",
    "Gemma2Config",
    "Gemma3TextConfig",
    "GemmaConfig",
    "Gpt2Config",
    "GptConfig",
    "GptNeoXConfig",
    "GraniteConfig",
    "GraphConfig",
    "LlamaConfig",
    "MPNetConfig",
    "MistralConfig",
    "MixtralConfig",
    "ModelConfig",
    "MoeConfig",
    "Olmo2Config",
    "Phi3Config",
    "Qwen2Config",
    "Qwen2MoeConfig",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "RobertaConfig",
    "RopeConfig",
    "SmolLM3Config",
    "StMoeConfig",
    "SwitchTransformersConfig",
    "T5Config",
    "MT5Config",
    "UMT5Config",
    "OptConfig",
    "ViTConfig",
    "VisionConfig",
    "WhisperConfig",
    "attention_factor",
    "load_installed",
    "parse_config",
    "read_config",
    "rotary_frequencies",
]
