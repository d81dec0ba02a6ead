"""Make the golden checkpoints and logits with Hugging Face transformers.

Run from anywhere, with an interpreter that has torch and transformers (moecc itself is taken from
the checkout, and of its dependencies only ml_dtypes is needed):

    python tests/golden/make_golden.py write            # the cases of that major version
    python tests/golden/make_golden.py compare          # adds how far this version agrees

A case is a folder with a config.json and an entry of `manifest.json`, which says why it is there.
For a new one write the keys that matter into its config.json, and ``{"why": …}`` into the manifest;
`write` adds the defaults of transformers.  Sizes are chosen so that a wrong reading shows: periods
short enough that every rotary scaling changes the first 16 positions, windows shorter than the
sequence, heads that do not fill the width, and in the `square` cases equal sizes for axes that must
not be confused.

The golden files were made by `write` under transformers 5.24.0, then `write` under 4.57.6 for the
cases in the spelling of version 4, then `compare` under both.  Everything is a function of the
case's name and config: the same versions write the same bytes.

What `logits.npy` (of an encoder alone, `hidden.npy`) holds: the model is read back from disk and
evaluated with its weights in float64, and with every float32 that transformers' code asks for on
the way (norms, softmax, rotary tables, router) replaced by float64.  The result is rounded once, to
float32: relative error 6e-8 at most.  `manifest.json` records how far plain float32 arithmetic is
from that, in each version.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from moecc.families.bert import BertConfig  # noqa: E402
from moecc.families.config import ModelConfig  # noqa: E402
from moecc.families.encdec import EncDecConfig  # noqa: E402
from moecc.families.registry import CONFIGS, parse_config  # noqa: E402
from moecc.families.t5 import T5Config  # noqa: E402
from moecc.families.vision import VisionConfig  # noqa: E402
from moecc.families.wav2vec2 import AudioConfig  # noqa: E402
from moecc.families.whisper import TwoStackConfig, WhisperConfig  # noqa: E402

Inputs = dict[str, np.ndarray[Any, Any]]

MANIFEST = HERE / "manifest.json"
VERSION = f"transformers {transformers.__version__}"
MAJOR = int(transformers.__version__.split(".")[0])
TOKENS_SHAPE = (2, 16)
# Below this distance between the last chosen and the first other router logit, rounding could
# choose another expert, and the golden value would say nothing about the arithmetic.
SMALLEST_ROUTER_GAP = 5e-3


@dataclass(frozen=True)
class Case:
    """One checkpoint: its name, and what the manifest states of it."""

    name: str
    entry: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return HERE / self.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The keys of config.json, in the spelling of the version that wrote it."""
        config = json.loads((self.folder / "config.json").read_text())
        if issubclass(CONFIGS[config["model_type"]], T5Config) and self._has_head():
            # As version 5 writes a config, it says that the matrices are tied; see T5Config.
            config["tie_word_embeddings"] = False
        return config

    def _has_head(self) -> bool:
        files = (safetensors.safe_open(p, "np") for p in self.folder.glob("*.safetensors"))
        return any("lm_head.weight" in file.keys() for file in files)  # noqa: SIM118

    @property
    def family(self) -> str:
        """The name of the family."""
        return str(self.config["model_type"])

    @property
    def typed(self) -> type[ModelConfig]:
        """The class of config of the family."""
        return CONFIGS[self.family]

    @property
    def is_of_this_version(self) -> bool:
        """Whether the running major version writes it; a new case is any version's."""
        return str(self.entry.get("written_by", VERSION)).startswith(f"transformers {MAJOR}.")

    @property
    def output(self) -> str:
        """What the model returns: ``logits``, or of an encoder alone its ``hidden`` states."""
        alone = issubclass(self.typed, BertConfig | VisionConfig | AudioConfig)
        return "hidden" if alone else "logits"

    @property
    def decodes(self) -> bool:
        """Whether the model is an encoder-decoder, with tokens for the decoder."""
        return issubclass(self.typed, EncDecConfig | TwoStackConfig)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the model's inputs."""
        shapes = {VisionConfig: "pixels", WhisperConfig: "features", AudioConfig: "audio"}
        name = next((n for shape, n in shapes.items() if issubclass(self.typed, shape)), "tokens")
        return (name, "decoder_tokens") if self.decodes else (name,)


class DoublePrecision(TorchFunctionMode):
    """Gives float64 to code that asks for float32 by name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        named = {key: _widen(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **named)


def _widen(value):
    return torch.float64 if value is torch.float32 else value


def write(names: list[str]):
    """Write the folders of the cases that belong to the running version."""
    manifest = _read_manifest()
    manifest["versions"][VERSION] = _versions()
    for case in _cases(manifest, names):
        if case.is_of_this_version:
            manifest["cases"][case.name] = _write_case(case)
            print(case.name, manifest["cases"][case.name]["smallest_router_gap"])
    _write_manifest(manifest)


def compare(names: list[str]):
    """Record how far the running version is from the golden logits."""
    manifest = _read_manifest()
    for case in _cases(manifest, names):
        if case.entry.get("not_in_4") and MAJOR == 4:
            continue
        entry = case.entry.setdefault("differences", {})
        entry[VERSION] = {key: _shown(found) for key, found in _differences(case).items()}
        print(case.name, entry[VERSION])
    manifest["versions"][VERSION] = _versions()
    _write_manifest(manifest)


def _cases(manifest: dict[str, Any], names: list[str]) -> list[Case]:
    return [Case(name, manifest["cases"][name]) for name in names or manifest["cases"]]


def _write_case(case: Case) -> dict[str, Any]:
    folder, tokens = case.folder, {key: _input(case, key) for key in case.inputs}
    for attempt in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        _save(case, f"{case.name}/{attempt}")
        logits, gap = _double_logits(_load(case), case, tokens)
        if gap is None or gap > SMALLEST_ROUTER_GAP:
            break
    else:
        raise SystemExit(f"{case.name}: every attempt has a token near a tie between experts")
    for key, array in tokens.items():
        np.save(folder / f"{key}.npy", array)
    np.save(folder / f"{case.output}.npy", logits.astype(np.float32))
    return {
        "family": case.family,
        "why": case.entry["why"],
        "written_by": VERSION,
        **{key: case.entry[key] for key in ("not_in_4", "shard_bytes") if key in case.entry},
        "attempt": attempt,
        "smallest_router_gap": None if gap is None else f"{gap:.1e}",
        "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }


def _input(case: Case, key: str) -> np.ndarray[Any, Any]:
    """Return token ids, images or spectrograms; a decoder's tokens are fewer than the encoder's."""
    config, drawn = case.config, _generator(case.name, key)
    if key == "pixels":
        size = config["image_size"]
        sides = size if isinstance(size, list) else [size, size]
        return drawn.standard_normal((2, config.get("num_channels", 3), *sides), np.float32)
    if key == "audio":
        return drawn.standard_normal((2, parse_config(config).samples), np.float32)
    if key == "features":
        frames = 2 * config["max_source_positions"]
        return drawn.standard_normal((2, config["num_mel_bins"], frames), np.float32)
    shape = TOKENS_SHAPE
    if key == "decoder_tokens":
        shape = (TOKENS_SHAPE[0], TOKENS_SHAPE[1] - 5)
    tokens = drawn.integers(0, config["vocab_size"], shape)
    if case.family in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "m2m_100"):
        # Padding has no position, whether there is a mask or not.
        tokens[tokens == config["pad_token_id"]] += 1
    return tokens


def _auto(case: Case):
    if case.decodes:
        return AutoModelForSpeechSeq2Seq if "features" in case.inputs else AutoModelForSeq2SeqLM
    return AutoModel if case.output == "hidden" else AutoModelForCausalLM


def _save(case: Case, key: str):
    # Parameters are rounded once, to the type of the file, from what is drawn.
    stated = ("dtype", "torch_dtype", "model_type", "architectures", "transformers_version")
    keys = {name: value for name, value in case.config.items() if name not in stated}
    model = _auto(case).from_config(AutoConfig.for_model(case.family, **keys))
    is_t5 = issubclass(case.typed, T5Config)
    if is_t5 and case.config.get("tie_word_embeddings") is False and MAJOR > 4:
        # Version 5 always ties in memory, and gives the output matrix back when it is in the file.
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in sorted([*model.named_parameters(), *_stored_buffers(model)]):
            parameter.copy_(torch.from_numpy(_values(key, name, tuple(parameter.shape))))
    dtype = case.config.get("dtype") or case.config.get("torch_dtype") or "float32"
    model.to(getattr(torch, dtype))
    model.save_pretrained(case.folder, max_shard_size=case.entry.get("shard_bytes", "1GB"))


def _stored_buffers(model) -> list[tuple[str, Any]]:
    """Return the buffers that are part of a checkpoint: biases of a choice, factors."""
    ends = ("e_score_correction_bias", "expert_bias", "layer_scalar")
    return [(n, b) for n, b in model.named_buffers() if n.endswith(ends)]


def _values(key: str, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Draw a parameter: norms around 1, biases small but not 0, matrices of unit gain."""
    drawn = _generator(key, name).standard_normal(shape)
    is_norm = "norm" in name.lower() or ".ln_" in name
    is_scale = is_norm or name.endswith(("layer_scalar", "router.scale", "per_expert_scale"))
    if is_scale and not name.endswith("bias"):
        # These store scales less one, but for the norms of what delta rules read.
        families = ("gemma_", "gemma2_", "gemma3_", "nemotron", "qwen3_next", "qwen3_5")
        less_one = key.startswith(families) and ".linear_attn." not in name
        return (0 if less_one else 1) + 0.3 * drawn
    if name.endswith("A_log"):
        return drawn
    if ".act_fn." in name:
        # Transformers 4 keeps these in bfloat16, whatever the type of the model.
        return np.round(16 * drawn) / 16
    if name.endswith("bias"):
        return 0.3 * drawn
    tables = ("embed", "relative_attention_bias", ".wte", ".wpe")
    if any(table in name for table in tables) or name.startswith("shared"):
        return drawn
    # The router's logits are spread out, so that few tokens lie near a tie.
    routers = (".gate.weight", ".classifier.weight", ".router.proj.weight")
    gain = 2.0 if name.endswith(routers) else 1.0
    return gain * drawn / np.sqrt(shape[-1])


def _load(case: Case, config=None):
    model, report = _auto(case).from_pretrained(
        case.folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if MAJOR > 4 and not case.decodes and case.output == "logits":
        model.set_experts_implementation("eager")
    # Version 4 stores these numbers, which follow from the window, and version 5 does not.
    wrong = {
        key: kept
        for key, found in report.items()
        if (kept := [name for name in found if "relative_position_index" not in str(name)])
    }
    if wrong:
        raise SystemExit(f"{case.folder}: {wrong}")
    return model.eval()


ARGUMENTS = {
    "tokens": "input_ids",
    "decoder_tokens": "decoder_input_ids",
    "pixels": "pixel_values",
    "features": "input_features",
    "audio": "input_values",
}
"""What transformers calls the inputs."""


def _run(model, case: Case, inputs: Inputs):
    given = {ARGUMENTS[key]: torch.from_numpy(array) for key, array in inputs.items()}
    given = {k: t.to(model.dtype) if t.is_floating_point() else t for k, t in given.items()}
    if case.output == "hidden":
        return model(**given).last_hidden_state
    return model(**given, use_cache=False).logits


ROUTERS = (".gate", ".classifier", ".router", ".router.layer")
"""The ends of the names of modules that give a router's logits."""


def _distance_from_the_border(logits) -> float:
    """Return how near a logit comes to where SparseMixer stops to count it."""
    best = logits.topk(2, dim=-1).values
    near = [(b - logits) / logits.abs().clamp(min=b) - 0.02 for b in best.split(1, dim=-1)]
    return min(distance.abs().min().item() for distance in near)


def _double_logits(model, case: Case, tokens: Inputs) -> tuple[np.ndarray[Any, Any], float | None]:
    """Return logits in float64 and the smallest distance of a routing decision from a tie."""
    model = model.double()
    for module in model.modules():
        if hasattr(module, "per_layer_input_scale"):
            module.per_layer_input_scale = torch.tensor(0.5, dtype=torch.float64).sqrt()
    gaps = []
    chosen = getattr(model.config, "num_experts_per_tok", None)
    chosen = chosen or getattr(model.config, "top_k_experts", None) or 1
    if case.family == "switch_transformers":
        for module in model.modules():
            if hasattr(module, "ignore_padding_tokens"):
                module.dtype = torch.float64

    def note_gap(module, inputs, output):
        found = output[0] if isinstance(output, tuple) else output
        if case.family == "llama4_text":  # gates, and then logits
            found = output[1]
        if case.family == "gpt_oss":
            # Version 4 gives the gates only.
            rows = inputs[0].reshape(-1, module.weight.shape[1])
            found = torch.nn.functional.linear(rows, module.weight, module.bias)
        if not found.is_floating_point():
            return  # version 4 of some families gives the chosen experts only
        if case.family == "gemma4_text":
            found = found.log()  # its probabilities
        if case.family == "phimoe":
            gaps.append(_distance_from_the_border(found))
        if len(inputs) > 1 and inputs[1] is not None:  # lfm2_moe's bias in the choice
            found = found.sigmoid() + inputs[1]
        scores = _scores(module, found)
        if getattr(module, "topk_group", None) not in (None, getattr(module, "num_group", None)):
            scores = _open_scores(module, scores, gaps)
        scores = scores.sort(descending=True).values
        if chosen < scores.shape[-1]:
            gaps.append((scores[..., chosen - 1] - scores[..., chosen]).min().item())

    for name, module in model.named_modules():
        if name.endswith(ROUTERS):
            module.register_forward_hook(note_gap)
    # Integer tensors take part in the dynamic scaling, and become what the default says.
    torch.set_default_dtype(torch.float64)
    with torch.no_grad(), DoublePrecision():
        _widen_rotary(model)
        logits = _run(model, case, tokens)
    torch.set_default_dtype(torch.float32)
    assert logits.dtype == torch.float64
    return logits.numpy(), min(gaps, default=None)


def _scores(module, logits):
    """Return that by which experts are chosen: with a bias not their logits."""
    if hasattr(module, "e_score_correction_bias"):
        return logits.sigmoid() + module.e_score_correction_bias
    if hasattr(module, "moe_statics"):
        return module.moe_statics(logits.softmax(-1))
    return logits


def _open_scores(module, scores, gaps: list[float]):
    """Return the scores of experts in open groups, and record how near the choice is to a tie."""
    is_biased = hasattr(module, "e_score_correction_bias")
    by_group = scores.unflatten(-1, (module.num_group, -1))
    strength = by_group.topk(1 + is_biased).values.sum(-1)
    best = strength.sort(descending=True)
    border = best.values[..., module.topk_group - 1 : module.topk_group + 1]
    gaps.append((border[..., 0] - border[..., 1]).min().item())
    shape = (*best.indices.shape[:-1], module.topk_group, by_group.shape[-1])
    index = best.indices[..., : module.topk_group, None].expand(shape)
    return by_group.gather(-2, index).flatten(-2)


def _widen_rotary(model):
    """Make the rotary tables again, under the default type of the moment."""
    for module in list(model.modules()):
        if getattr(module, "rotary_emb", None) is not None:
            # ModernBERT's layers have a config each, in version 4.
            rotary = module.rotary_emb
            module.rotary_emb = type(rotary)(config=getattr(rotary, "config", model.config))
        if hasattr(module, "rotary_emb_local"):
            # Gemma 3 in version 4: its class takes the period from where the global one lies.
            local = copy.deepcopy(model.config)
            local.rope_theta = local.rope_local_base_freq
            local.rope_scaling = {"rope_type": "default"}
            module.rotary_emb_local = type(module.rotary_emb_local)(config=local)


def _differences(case: Case) -> dict[str, float]:
    """Compare with the config that moecc writes, and with the folder's own config."""
    tokens = {key: np.load(case.folder / f"{key}.npy") for key in case.inputs}
    golden, config = np.load(case.folder / f"{case.output}.npy"), _config(case)
    with torch.no_grad():
        single = _run(_load(case, config), case, tokens)
    found = {
        "float64": _double_logits(_load(case, config), case, tokens)[0],
        "float32": single.numpy(),
        "float64, config.json as it is": _as_it_is(case, tokens),
    }
    largest = np.abs(golden).max()
    return {key: float(np.abs(logits - golden).max() / largest) for key, logits in found.items()}


def _config(case: Case):
    """Return the config of a case as moecc spells it, which both versions understand."""
    written = parse_config(case.config).to_json()
    if case.family == "dinov2":
        # moecc writes no token of masked patches, which are no part of the graph.
        written["use_mask_token"] = True
    if case.family == "siglip_vision_model":
        # Nor the head that pools by attention.
        written["vision_use_head"] = case.config.get("vision_use_head", True)
    return AutoConfig.for_model(**written)


def _as_it_is(case: Case, tokens: Inputs) -> np.ndarray[Any, Any]:
    try:
        return _double_logits(_load(case), case, tokens)[0]
    except (SystemExit, RuntimeError, ValueError) as error:
        print(f"{case.name}: {str(error)[:300]}")
        return np.full((), np.inf)


def _shown(difference: float) -> str:
    return f"{difference:.1e}" if np.isfinite(difference) else "does not load"


def _generator(*key: str) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def _read_manifest() -> dict[str, Any]:
    if MANIFEST.exists():
        return json.loads(MANIFEST.read_text())
    return {"schema": 1, "versions": {}, "cases": {}}


def _write_manifest(manifest: dict[str, Any]):
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")


def main():
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Make or compare golden checkpoints.")
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("names", nargs="*", help="cases; default: all")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    (write if arguments.action == "write" else compare)(arguments.names)


if __name__ == "__main__":
    main()
