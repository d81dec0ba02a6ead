"""Models that hold a text model beside encoders of images or sound: where their text model is.

A wrapper is read as its text model.  Its other tensors, its other settings and its files are kept,
and a converted text model is put back among them where transformers builds the text model from its
own config (`Wrapper.holds_any`), or where the family did not change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from moecc.errors import InputError
from moecc.families.reader import one_of, shown
from moecc.support.untyped import Json, JsonDict

TEXT, TIE = "text_config", "tie_word_embeddings"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Wrapper:
    """A model type of transformers that holds a text model.

    Attributes:
      architecture: the class that generates text.
      families: the family of the text model by the `model_type` that the wrapper calls it.
      holds_any: whether transformers builds the text model from its own config, whatever its
        family is.
      defaults: keys of the text model whose defaults differ from those of its family.
      uncalled: families whose text model the wrapper of transformers 4 calls with arguments that
        it does not take.
      twins: the wrapper with the same encoders, by the family of its text model.
      is_flat: whether older files state the text model's keys beside the wrapper's own.
      states_base: whether the base period has to be stated, of which versions of transformers have
        different defaults.
    """

    architecture: str
    families: Mapping[str, str] = field(default_factory=dict)
    holds_any: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()
    twins: Mapping[str, str] = field(default_factory=dict)
    is_flat: bool = False
    states_base: bool = False


WRAPPERS: Mapping[str, Wrapper] = {
    "llava": Wrapper("LlavaForConditionalGeneration", holds_any=True),
    "llava_next": Wrapper("LlavaNextForConditionalGeneration", holds_any=True),
    "llava_onevision": Wrapper(
        "LlavaOnevisionForConditionalGeneration", holds_any=True, uncalled=("qwen2_moe",)
    ),
    "vipllava": Wrapper("VipLlavaForConditionalGeneration", holds_any=True),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", holds_any=True),
    "internvl": Wrapper(
        "InternVLForConditionalGeneration", holds_any=True, uncalled=("qwen2_moe",)
    ),
    "idefics3": Wrapper("Idefics3ForConditionalGeneration", holds_any=True),
    "smolvlm": Wrapper("SmolVLMForConditionalGeneration", holds_any=True),
    "gemma3": Wrapper("Gemma3ForConditionalGeneration"),
    "gemma3n": Wrapper("Gemma3nForConditionalGeneration"),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration"),
    "qwen2_vl": Wrapper(
        "Qwen2VLForConditionalGeneration",
        {"qwen2_vl_text": "qwen2", "qwen2_vl": "qwen2"},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        is_flat=True,
    ),
    "qwen2_5_vl": Wrapper(
        "Qwen2_5_VLForConditionalGeneration",
        {"qwen2_5_vl_text": "qwen2", "qwen2_5_vl": "qwen2"},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        is_flat=True,
    ),
    "qwen3_vl": Wrapper(
        "Qwen3VLForConditionalGeneration", {"qwen3_vl_text": "qwen3"}, states_base=True
    ),
    "llama4": Wrapper("Llama4ForConditionalGeneration"),
    "qwen3_5": Wrapper(
        "Qwen3_5ForConditionalGeneration", twins={"qwen3_5_moe_text": "qwen3_5_moe"}
    ),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration"),
}
"""The wrappers that moecc reads, by `model_type`."""

TOWERS: Mapping[str, str] = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Pairs of an encoder of images and one of text, which are read as the former."""


def tower_config(config: Json) -> JsonDict:
    """Return the config of the encoder of images that one of `TOWERS` holds.

    Raises:
      InputError: the config has none.
    """
    parts = [config.get(key) for key in ("vision_config", "vision_config_dict")]
    stated = [part for part in parts if isinstance(part, Mapping)]
    if not stated:
        raise InputError(
            "the config has no encoder of images",
            where="config.json: vision_config",
            expected="an object with its keys",
            found=shown(parts[0]),
        )
    # transformers lets the second replace values of the first.
    keys = {key: value for part in stated for key, value in part.items()}
    keys.pop("architectures", None)
    return {**keys, "model_type": TOWERS[config["model_type"]]}


UNREADABLE: Mapping[str, str] = {
    "mllama": "layers of its text model attend to images",
    "paligemma": "its text model attends in both directions over the prompt",
    "blip-2": "its text model begins with the queries of another model",
}
"""Why the text model of other wrappers is no model of its own."""

LAYOUTS: tuple[tuple[str, str], ...] = (
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", _HEAD),
    ("model.text_model.", _HEAD),
    ("model.", _HEAD),
)
"""The beginning of a text model's tensors in a file in place of ``model.``, and the name of its
output matrix: older and newer files of transformers, those of Idefics 3, and those of Qwen2-VL."""


def wrapper_of(config: Mapping[str, object], *, by_family: bool = True) -> Wrapper | None:
    """Return the wrapper whose config this is; None for the config of another model.

    Args:
      config: any config.
      by_family: whether the text model is read by its family, not by a graph of the user's own.

    Raises:
      InputError: the text model of this wrapper cannot be read alone.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        return None
    if name in UNREADABLE and by_family:
        raise InputError(
            f"the text model of {name} cannot be converted alone: {UNREADABLE[name]}",
            where="config.json: model_type",
            expected=f"a text model, or one inside {one_of(WRAPPERS)}",
            found=shown(name),
            hint="moecc convert --via torch reads any class of transformers",
        )
    return WRAPPERS.get(name)


def text_config(wrapper: Wrapper, config: Json, *, is_tied: bool | None = None) -> JsonDict:
    """Return the config of the text model as its family spells it.

    Args:
      wrapper: the wrapper.
      config: its config.
      is_tied: whether the file lacks an output matrix; None where only the config is known.

    Raises:
      InputError: the config has no text model.
    """
    text = config.get(TEXT)
    if text is None and wrapper.is_flat:
        text = {k: v for k, v in config.items() if not k.startswith("vision")}
    if not isinstance(text, Mapping):
        raise InputError(
            "the config has no text model",
            where=f"config.json: {TEXT}",
            expected="an object with the text model's keys",
            found=shown(text) if TEXT in config else "nothing",
        )
    name = str(text.get("model_type"))
    stating = [text, text.get("rope_scaling"), text.get("rope_parameters")]
    states_base = any(isinstance(part, Mapping) and "rope_theta" in part for part in stating)
    if wrapper.states_base and not states_base:
        raise InputError(
            "versions of transformers have different defaults of the base period",
            where=f"config.json: {TEXT}: rope_theta",
            expected="the number that the model was trained with",
            found="nothing",
        )
    tied = config.get(TIE, text.get(TIE))
    keys: JsonDict = {
        **wrapper.defaults,
        **{k: v for k, v in text.items() if k not in ("architectures", TIE)},
        "model_type": wrapper.families.get(name, name),
    }
    for key in ("rope_scaling", "rope_parameters"):
        if key in keys and (rope := without_sections(keys.pop(key))) is not None:
            keys[key] = rope
    if "rope_parameters" in keys and "rope_theta" not in text:
        keys.pop("rope_theta", None)
    if is_tied is not None or tied is not None:
        keys[TIE] = tied if is_tied is None else is_tied
    return keys


SECTIONS = ("mrope_section", "mrope_interleaved")


def without_sections(rope: object) -> object:
    """Return rotary settings without the sections of three-part positions.

    Text has three equal positions a token, so that sections compute what a single one does.
    """
    if not isinstance(rope, Mapping):
        return rope
    settings = {k: v for k, v in rope.items() if k not in SECTIONS}
    kinds = ("type", "rope_type")
    settings |= {key: "default" for key in kinds if settings.get(key) == "mrope"}
    return settings


def text_names(tensors: Collection[str]) -> dict[str, str]:
    """Return the names in the file of a text model's tensors, by their names in its family."""
    for prefix, head in LAYOUTS:
        if f"{prefix}embed_tokens.weight" in tensors:
            names = {f"model.{n.removeprefix(prefix)}": n for n in tensors if n.startswith(prefix)}
            return {**names, _HEAD: head} if head in tensors else names
    return {}


def file_name(name: str, names: Mapping[str, str]) -> str:
    """Return the name in a file of a tensor of the text model, new ones among them.

    Args:
      name: its name in the family.
      names: those that the file of the source has, as `text_names` returns them.
    """
    embedding = names["model.embed_tokens.weight"]
    prefix = embedding.removesuffix("embed_tokens.weight")
    if name == _HEAD:
        return next(head for start, head in LAYOUTS if start == prefix)
    return f"{prefix}{name.removeprefix('model.')}"


def _renamed(config: Json, twin: str) -> JsonDict:
    """Return the config of a wrapper as that of its twin, whose other parts have its name."""
    name = config["model_type"]
    parts = {
        key: {**part, "model_type": twin + part["model_type"].removeprefix(name)}
        for key, part in config.items()
        if isinstance(part, Mapping) and str(part.get("model_type")).startswith(name)
    }
    named = {"model_type": twin, "architectures": [WRAPPERS[twin].architecture]}
    return {**config, **parts, **named}


def _with_sections(text: Json, before: Json) -> JsonDict:
    """Return the config of a text model with the sections of positions that it had."""
    rope = before.get("rope_parameters") or {}
    sections = {key: rope[key] for key in SECTIONS if key in rope}
    return {**text, "rope_parameters": {**text["rope_parameters"], **sections}}


def put_back(config: Json, text: Json, before: Json) -> JsonDict:
    """Return a wrapper's config with a converted text model.

    Of a text model that stays in its family only the settings that changed are written, since the
    wrapper has names of its own for the rest.

    Args:
      config: the config of the wrapper.
      text: the config of the converted text model, as its family writes it.
      before: the config of the text model that was read, written likewise.
    """
    if text["model_type"] != before["model_type"]:
        tied = {k: v for k, v in text.items() if k == TIE}
        twin = WRAPPERS[config["model_type"]].twins.get(text["model_type"])
        if twin is None:
            return {**config, TEXT: dict(text), **tied}
        return {**_renamed(config, twin), TEXT: _with_sections(text, config[TEXT]), **tied}
    changes = {key: value for key, value in text.items() if before.get(key) != value}
    if TEXT not in config:
        return {**config, **changes}
    return {**config, TEXT: {**config[TEXT], **changes}}
