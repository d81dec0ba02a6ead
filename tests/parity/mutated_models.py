"""Draws mutations of configs, and saves for each a model of random weights and its outputs.

Run by an interpreter that has transformers.  Reads {"sources": [folder, …], "draws": n, "seed": n,
"out": folder} from standard input; of each source it reads config.json and the inputs.  A mutation
changes one key: one of the config class, one that transformers' code of the family reads, or one
that has another name there.  Writes OUT/NUMBER with config.json, weights, inputs and output.npy,
and prints [{"folder": …, "source": …, "key": …, "value": …, "refused": …}, …].
"""

from __future__ import annotations

import inspect
import json
import random
import re
import shutil
import sys
import zlib
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
]  # fmt: skip
WITHOUT_FUNCTION = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map"),
    *("_name_or_path", "id2label", "label2id", "num_labels", "return_dict", "problem_type"),
    *("output_hidden_states", "output_attentions", "use_return_dict", "quantization_config"),
    *("_attn_implementation", "attn_implementation", "name_or_path", "to_dict", "update"),
    *("get_text_config", "get", "convert_rope_params_to_dict", "standardize_rope_params"),
    *("is_encoder_decoder", "_experts_implementation", "attribute_map"),
}
ANY = [True, False, 0, 1, 2, 3, 5, 0.5, 2.5, None]


def names_that_code_reads(config: Any, model: Any) -> list[str]:
    """Return the keys that the code of a model, and that of all models' masks, reads."""
    modules = [sys.modules[type(model).__module__], masking_utils, modeling_rope_utils]
    code = "\n".join(map(inspect.getsource, modules))
    read = set(re.findall(r"config\.([a-z]\w+)", code))
    read |= set(re.findall(r"attr\(\s*(?:\w+\.)*config,\s*\"(\w+)\"", code))
    methods = {name for name in dir(type(config)) if callable(getattr(type(config), name, None))}
    named = {*read, *config.to_dict(), *config.attribute_map, "is_causal", "layer_types"}
    return sorted(named - WITHOUT_FUNCTION - methods)


def mutate(rng: random.Random, key: str, value: Any, depth: int = 0) -> Any:
    """Return another value of the same type."""
    if key in ("rope_parameters", "rope_scaling") and depth == 0 and rng.random() < 0.7:
        return rng.choice(ROPE)
    if isinstance(value, bool):
        return not value
    if key == "feed_forward_proj":
        return rng.choice(PROJECTIONS)
    if key.endswith(("_act", "_act_fn", "activation", "activation_function")):
        return rng.choice(ACTIVATIONS)
    if key == "layer_types":
        layers = len(value) if value else 2
        kinds = ["full_attention", "sliding_attention", "chunked_attention"]
        return [rng.choice(kinds) for _ in range(layers)]
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, 2 * value, value // 2, 0, value + 4])
    if isinstance(value, float):
        return rng.choice([value * 1.5, value + 0.3, value * 100, 0.0])
    if isinstance(value, list) and value:
        changed = list(value)
        place = rng.randrange(len(value))
        changed[place] = mutate(rng, key + "[]", value[place], depth + 1)
        return changed
    if isinstance(value, dict) and value:
        name = rng.choice(sorted(value))
        return {**value, name: mutate(rng, name, value[name], depth + 1)}
    if isinstance(value, str):
        return rng.choice(["linear", "absolute", "relative_key", "eager", "default", value + "x"])
    return rng.choice([*ANY, *ACTIVATIONS[:3]] if value is None else ANY)


def auto_class(source: Path) -> Any:
    if (source / "hidden.npy").is_file():
        return AutoModel
    if (source / "features.npy").is_file():
        return AutoModelForSpeechSeq2Seq
    decodes = (source / "decoder_tokens.npy").is_file()
    return AutoModelForSeq2SeqLM if decodes else AutoModelForCausalLM


def inputs_of(source: Path, config: Any) -> dict[str, np.ndarray]:
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


def fill(model: Any) -> None:
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


def loaded(auto: Any, folder: Path) -> Any:
    kwargs = {"dtype": torch.float64, "attn_implementation": "eager"}
    model = auto.from_pretrained(folder, **kwargs)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def compute(auto: Any, folder: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
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


def draw(rng: random.Random, source: Path) -> tuple[str, Any, dict[str, Any]]:
    keys = json.loads((source / "config.json").read_text())
    if source not in NAMES:
        config = AutoConfig.from_pretrained(source)
        model = auto_class(source).from_config(config)
        NAMES[source] = names_that_code_reads(config, model), config
    names, config = NAMES[source]
    key = rng.choice(names)
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
    changed = mutate(rng, key, value)
    return key, changed, {**keys, key: changed}


NAMES: dict[Path, tuple[list[str], Any]] = {}


def main() -> None:
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
            key, value, keys = draw(rng, source)
            word = (source, key, json.dumps(value))
            if word not in drawn:
                break
        drawn.add(word)
        folder = out / str(number)
        refused = write(source, folder, keys)
        if refused:
            shutil.rmtree(folder)
        case = {"folder": str(folder), "source": source.name, "key": key, "value": value}
        cases.append({**case, "refused": refused})
    json.dump(cases, sys.stdout)


if __name__ == "__main__":
    main()
