"""Draws mutations of configs, and saves for each a model of random weights and its outputs.

Run by an interpreter that has transformers.  Reads {"sources": [folder, …], "draws": n, "seed": n,
"out": folder} from standard input; of each source it reads config.json and the inputs.  A mutation
changes one key or two: of the file, of the config class or its bases, one that transformers' code
of the family reads, or one that has another name there.  It gives the key another value of its
type, a value of another type, or leaves it out.  Writes OUT/NUMBER with config.json, weights,
inputs and output.npy, and prints [{"folder": …, "source": …, "keys": …, "refused": …}, …].
"""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import shutil
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from logits_of import DoublePrecision
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    masking_utils,
    modeling_rope_utils,
)

ACTIVATIONS = ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu",
               "quick_gelu", "relu2", "tanh", "gelu_python", "gelu_10"]  # fmt: skip
PROJECTIONS = ["relu", "gelu", "silu", "gated-gelu", "gated-silu", "gated-relu", "gated-gelu_new"]
ROPE = [
    {"rope_type": "default", "rope_theta": 300.0},
    {"type": "linear", "factor": 2.5},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 300.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.2, "beta_fast": 8},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16, "rope_theta": 300.0},
    {"rope_type": "proportional", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    {"rope_type": "longrope", "short_factor": [1.5, 2.5], "long_factor": [3.0, 4.0],
     "original_max_position_embeddings": 4},
    {"rope_type": "longrope", "short_factor": [1.5, 2.5], "long_factor": [3.0, 4.0], "factor": 3.0,
     "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, "attention_factor": 0.9},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]  # fmt: skip
KINDS = ["full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv",
         "attention", "mamba"]  # fmt: skip
ANYWHERE = [
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "default_theta"),
    *("original_max_position_embeddings", "head_dim", "num_key_value_heads", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "is_causal", "is_decoder"),
    *("tie_word_embeddings", "add_cross_attention", "per_layer_config", "text_config"),
    *("hidden_act", "hidden_activation", "attention_bias", "use_bidirectional_attention"),
    *("chunk_size_feed_forward", "pruned_heads", "tie_encoder_decoder", "decoder"),
]
"""Keys that a config of any family may state, whether its class has them or not."""
WITHOUT_FUNCTION = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map"),
    *("_name_or_path", "id2label", "label2id", "num_labels", "return_dict", "problem_type"),
    *("output_hidden_states", "output_attentions", "use_return_dict", "quantization_config"),
    *("_attn_implementation", "attn_implementation", "name_or_path", "to_dict", "update"),
    *("get_text_config", "get", "convert_rope_params_to_dict", "standardize_rope_params"),
    *("is_encoder_decoder", "_experts_implementation", "attribute_map", "json", "sub_configs"),
    *("extra_files", "extra_config_files", "base_config_key", "sub_configs_defaults"),
    *("is_heterogeneous", "per_layer_attributes", "allow_global_per_layer_attribute_access"),
}
if transformers.__version__.startswith("4."):  # it ignores what moecc takes for a file of version 5
    WITHOUT_FUNCTION.add("rope_parameters")
ANY = [True, False, 0, 1, 2, 3, 5, 0.5, 2.5, None]


@cache
def names_in(module) -> set[str]:
    """Return the keys of a config that the code of a module reads."""
    code = inspect.getsource(module)
    read = set(re.findall(r"config\.([a-z]\w+)", code))
    return read | set(re.findall(r"attr\(\s*(?:\w+\.)*config,\s*\"(\w+)\"", code))


def names_that_code_reads(config, model) -> list[str]:
    """Return the keys that the code of a model, and that of all models' masks, reads."""
    modules = [sys.modules[type(model).__module__], masking_utils, modeling_rope_utils]
    read = set().union(*map(names_in, modules))
    attributes = {name for name in dir(type(config)) if not name.startswith("_")}
    methods = {name for name in attributes if callable(getattr(type(config), name, None))}
    named = {*read, *config.to_dict(), *config.attribute_map, *attributes}
    plans = {name for name in named if name.endswith("_plan")}
    return sorted(named - WITHOUT_FUNCTION - methods - plans)


def of_another_type(rng: random.Random, value):
    """Return a value that a writer of JSON may have put in place of `value`."""
    values = [None, str(value), [value], {"value": value}, "", [], {}, True, False, -1]
    if isinstance(value, int | float) and math.isfinite(value):
        values += [float(value), int(value), -value, 1e30]
    return rng.choice(values)


def draw_rope(rng: random.Random, config) -> dict[str, Any]:
    """Return rotary parameters, a fifth of the time those of each kind of layer."""
    stated = config.to_dict()
    kinds = sorted(set(stated.get("layer_types") or KINDS[:2]))
    if rng.random() < 0.2:
        return {kind: rng.choice(ROPE) for kind in kinds}
    parameters = json.loads(json.dumps(rng.choice(ROPE)))
    sizes = [stated.get(name) for name in ("hidden_size", "num_attention_heads")]
    known = all(isinstance(size, int) and size > 0 for size in sizes)
    width = stated.get("head_dim") or (sizes[0] // sizes[1] if known else 16)
    share = parameters.get("partial_rotary_factor") or stated.get("partial_rotary_factor")
    for name in ("short_factor", "long_factor"):
        if name in parameters and rng.random() < 0.9:  # a divisor for each frequency
            pairs = int(width * (share or 1)) // 2
            parameters[name] = [parameters[name][n % 2] + n / 8 for n in range(pairs)]
    return parameters


def mutate(rng: random.Random, key: str, value, config, depth: int = 0):
    """Return another value of the same type."""
    if key in ("rope_parameters", "rope_scaling") and depth == 0 and rng.random() < 0.7:
        return draw_rope(rng, config)
    if isinstance(value, bool):
        return not value
    if key == "feed_forward_proj":
        return rng.choice(PROJECTIONS)
    if key.endswith(("_act", "_act_fn", "activation", "activation_function")):
        return rng.choice(ACTIVATIONS)
    if key == "layer_types":
        layers = len(value) if value else 2
        used = sorted(set(value or KINDS[:2]))
        kinds = used + KINDS[:2] if rng.random() < 0.7 else KINDS
        return [rng.choice(kinds) for _ in range(layers)]
    if key == "per_layer_config":
        return {"0": {rng.choice(["sliding_window", "num_key_value_heads", "hidden_act"]): 2}}
    if key in ("text_config", "decoder"):
        return {"hidden_size": 8, "vocab_size": 16, "tie_word_embeddings": rng.random() < 0.5}
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, 2 * value, value // 2, 0, value + 4])
    if isinstance(value, float):
        return rng.choice([value * 1.5, value + 0.3, value * 100, 0.0])
    if isinstance(value, list) and value:
        changed = list(value)
        place = rng.randrange(len(value))
        changed[place] = mutate(rng, key + "[]", value[place], config, depth + 1)
        return changed
    if isinstance(value, dict) and value:
        name = rng.choice(sorted(value))
        return {**value, name: mutate(rng, name, value[name], config, depth + 1)}
    if isinstance(value, str):
        return rng.choice(["linear", "absolute", "relative_key", "eager", "default", value + "x"])
    return rng.choice([*ANY, *ACTIVATIONS[:3]] if value is None else ANY)


def auto_class(source: Path):
    if (source / "hidden.npy").is_file():
        return AutoModel
    if (source / "features.npy").is_file():
        return AutoModelForSpeechSeq2Seq
    decodes = (source / "decoder_tokens.npy").is_file()
    return AutoModelForSeq2SeqLM if decodes else AutoModelForCausalLM


def inputs_of(source: Path, config) -> dict[str, np.ndarray]:
    """Return the inputs of a source, in the sizes of `config`; padding is not among the tokens."""
    inputs = {}
    for name in ("tokens", "decoder_tokens", "features", "pixels", "audio"):
        if not (source / f"{name}.npy").is_file():
            continue
        array = np.load(source / f"{name}.npy")
        drawn = np.random.default_rng(5)
        if name.endswith("tokens"):
            array = array % config.vocab_size
            padding = config.pad_token_id
            array = np.where(array == padding, (array + 1) % config.vocab_size, array)
        elif name == "features":
            shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
            array = drawn.standard_normal(shape).astype(np.float32)
        elif name == "audio":
            samples = 49
            for number in reversed(range(len(config.conv_kernel))):
                samples = (samples - 1) * config.conv_stride[number] + config.conv_kernel[number]
            array = drawn.standard_normal((2, samples)).astype(np.float32)
        else:
            size = config.image_size
            sides = size if isinstance(size, list | tuple) else (size, size)
            array = drawn.standard_normal((2, config.num_channels, *sides)).astype(np.float32)
        inputs[name] = array
    return inputs


def fill(model):
    """Draw all parameters by their names."""
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *buffers]:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            drawn = rng.standard_normal(tuple(parameter.shape))
            is_vector = parameter.dim() < 2
            is_table = "embed" in name or "bias" in name
            scale = 0.3 if is_vector else 1.0 if is_table else max(parameter.shape[-1], 1) ** -0.5
            mean = 1.0 if is_vector and not name.endswith("bias") else 0.0
            values = (mean + scale * drawn).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))


def loaded(auto, folder: Path):
    kwargs = {"dtype": torch.float64, "attn_implementation": "eager"}
    model = auto.from_pretrained(folder, **kwargs)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def compute(auto, folder: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), DoublePrecision():
            model = loaded(auto, folder)
            names = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids",
                     "features": "input_features", "pixels": "pixel_values",
                     "audio": "input_values"}  # fmt: skip
            arrays = {names[n]: torch.from_numpy(a) for n, a in inputs.items()}
            arrays = {n: a.double() if a.is_floating_point() else a for n, a in arrays.items()}
            if auto is AutoModelForCausalLM:
                arrays["use_cache"] = False
            made = model(**arrays)
            result = made.last_hidden_state if auto is AutoModel else made.logits
            return result.numpy()
    finally:
        torch.set_default_dtype(torch.float32)


def write(source: Path, folder: Path, keys: dict[str, Any]) -> str | None:
    """Write the model of a config and its outputs; return why transformers does not have it."""
    folder.mkdir(parents=True)
    auto = auto_class(source)
    text = json.dumps(keys)
    (folder / "config.json").write_text(text)
    try:
        config = AutoConfig.from_pretrained(folder)
        model = auto.from_config(config)
        fill(model)
        inputs = inputs_of(source, config)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(text)
        for name, array in inputs.items():
            np.save(folder / f"{name}.npy", array)
        np.save(folder / "output.npy", compute(auto, folder, inputs))
    except Exception as error:  # whatever it raises, it does not have the model
        return f"{type(error).__name__}: {str(error)[:160]}"
    return None


def draw(rng: random.Random, source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys that a mutation changes, with their values, and the config."""
    keys = json.loads((source / "config.json").read_text())
    if source not in NAMES:
        config = AutoConfig.from_pretrained(source)
        model = auto_class(source).from_config(config)
        names = names_that_code_reads(config, model)
        NAMES[source] = sorted({*names, *keys} - WITHOUT_FUNCTION), config
    names, config = NAMES[source]
    changes = {}
    number = 2 if rng.random() < 0.2 else 1
    elsewhere = [name for name in ANYWHERE if name not in WITHOUT_FUNCTION]
    for key in rng.sample(names if rng.random() < 0.75 else elsewhere, number):
        try:
            value = keys[key] if key in keys else getattr(config, key, None)
        except Exception:  # a property of another family
            value = None
        if hasattr(value, "to_dict"):
            value = value.to_dict()
        try:
            json.dumps(value)
        except TypeError:
            value = None
        kind = rng.random()
        if key in keys and kind < 0.15 and not is_large(type(config), key, value):
            del keys[key]
            changes[key] = ABSENT
            continue
        other = of_another_type(rng, value) if kind > 0.85 else mutate(rng, key, value, config)
        changes[key] = keys[key] = other
    return changes, keys


def is_large(config: type, key: str, stated) -> bool:
    """Whether a model that lacks a size has one that costs seconds."""
    try:
        default = getattr(config(), key, None)
    except Exception:  # a class without defaults
        return True
    if key == "max_position_embeddings" or not isinstance(default, int):
        return False
    return default > 256 or (isinstance(stated, int) and default > 8 * max(stated, 8))


ABSENT = "(absent)"
NAMES: dict[Path, tuple[list[str], Any]] = {}


def main():
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    question = json.load(sys.stdin)
    rng, out = random.Random(question["seed"]), Path(question["out"])
    sources = [Path(source) for source in question["sources"]]
    cases, drawn = [], set()
    for number in range(question["draws"]):
        source = sources[number % len(sources)]
        for _ in range(20):
            changes, keys = draw(rng, source)
            word = (source, json.dumps(changes))
            if word not in drawn:
                break
        drawn.add(word)
        folder = out / str(number)
        refused = write(source, folder, keys)
        if refused:
            shutil.rmtree(folder)
        case = {"folder": str(folder), "source": source.name, "keys": changes}
        cases.append({**case, "refused": refused})
    json.dump(cases, sys.stdout)


if __name__ == "__main__":
    main()
