"""``make proof-jax-models``: models of other libraries of JAX, built small, converted and judged.

    python tests/jaxpr/sweep.py --out FILE [LIBRARY…]

The interpreter has moecc, jax and what it can have of levanter, keras-hub, transformers with its
models of Flax, google-tunix, gemma, penzai and equimo.  A mixture of copies is the dense model, so
that the outputs are compared; then a step of gradient descent is taken through the converted
function.  Each library runs in a process of its own; a model that cannot be built is listed with
the reason.  Models that FILE has of the same version are not judged again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

PIPELINE = "upcycle{experts=4 top-k=2}"
TOLERANCE = 2e-5
"""Of the largest output; the models compute in float32."""
BIT_BY_BIT = "the outputs are equal bit by bit: its blocks as they are drawn may not reach them"
SECONDS = 240
"""The limit of a model, in processor time."""
VOCAB, LENGTH, IMAGE = 96, 16, 32

Model = tuple[Callable[..., Any], Any, tuple[Any, ...]]
"""A function, its parameters, and its other arguments."""
Makers = Iterator[tuple[str, Callable[[], Model]]]


def tokens(batch: int = 2, length: int = LENGTH):
    import jax

    return jax.random.randint(jax.random.key(1), (batch, length), 1, VOCAB - 1)


# Each library: its models by name, and how one is made.


def levanter() -> Makers:
    """Configs of Levanter, layers in a scan under rematerialisation as it sets them."""
    sizes = {
        "seq_len": LENGTH, "max_seq_len": LENGTH, "hidden_dim": 32, "intermediate_dim": 64,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "n_routed_experts": 4,
    }  # fmt: skip
    names = ["llama.LlamaConfig", "gpt2.Gpt2Config", "mistral.MistralConfig", "qwen.QwenConfig",
             "qwen.Qwen3Config", "gemma.GemmaConfig", "gemma.Gemma2Config", "gemma.Gemma3Config",
             "olmo.Olmo2Config", "mixtral.MixtralConfig"]  # fmt: skip

    def make(name):
        import equinox as eqx
        import haliax as hax
        import jax

        module, _, cls = name.partition(".")
        config_class = getattr(__import__(f"levanter.models.{module}", fromlist=[cls]), cls)
        fields = inspect.signature(config_class).parameters
        config = config_class(**{k: v for k, v in sizes.items() if k in fields})
        model = config.build(hax.Axis("vocab", VOCAB), key=jax.random.key(0))
        params, static = eqx.partition(model, eqx.is_array)
        axes = ("replica", "data", "model")
        jax.set_mesh(jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3))
        position = getattr(config, "max_Pos", None) or config.Pos

        def run(params, ids):
            named = hax.named(ids, (hax.Axis("batch", ids.shape[0]), position))
            mask = hax.nn.attention.causal_mask(position, position.alias("key_position"))
            result = eqx.combine(params, static)(named, mask)
            result = result[0] if isinstance(result, tuple) else result
            return result.array

        return run, params, (tokens(),)

    for name in names:
        yield name, partial(make, name)


def keras_hub() -> Makers:
    """Backbones of keras-hub, run by ``stateless_call``."""
    sizes = {
        "vocabulary_size": VOCAB, "vocab_size": VOCAB, "num_layers": 2, "num_heads": 4,
        "num_attention_heads": 4, "num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "head_size": 8, "hidden_dim": 32, "embedding_dim": 32, "intermediate_dim": 64,
        "mlp_dim": 64, "dropout": 0.0, "max_sequence_length": 32, "num_experts": 4,
        "moe_intermediate_dim": 32, "shared_expert_intermediate_dim": 32, "top_k": 2,
        "image_shape": (IMAGE, IMAGE, 3), "patch_size": 8, "image_size": IMAGE, "filter_dim": 32,
        "attention_bias": False, "attention_dropout": 0.0, "rope_layer_enabled_list": [True, True],
        "layer_types": ["full_attention"] * 2, "mlp_bias": False, "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 32, "rope_theta": 1e4, "partial_rotary_factor": 1.0,
        "position_embedding_shape": (IMAGE, IMAGE, 3), "max_encoder_sequence_length": 32,
        "max_decoder_sequence_length": 32,
    }  # fmt: skip
    names = [
        "Albert",
        "Bart",
        "Bert",
        "Bloom",
        "DebertaV3",
        "DeiT",
        "DINOV2",
        "DINOV3",
        "DistilBert",
        "Electra",
        "ESM",
        "FNet",
        "Falcon",
        "Gemma",
        "GPT2",
        "GPTNeoX",
        "GptOss",
        "Llama",
        "Mistral",
        "Mixtral",
        "OPT",
        "Phi3",
        "Qwen",
        "Qwen3",
        "Qwen3Moe",
        "QwenMoe",
        "Roberta",
        "RoformerV2",
        "SmolLM3",
        "T5",
        "ViT",
        "Whisper",
        "XLMRoberta",
        "XLNet",
    ]

    def make(name):
        import jax
        import keras
        import keras_hub as hub

        cls = getattr(hub.models, f"{name}Backbone")
        fields = inspect.signature(cls.__init__).parameters
        keras.utils.set_random_seed(0)
        patch = (8, 8) if name in ("ViT", "DeiT") else 8
        chosen = {k: v for k, v in sizes.items() if k in fields}
        model = cls(**chosen | ({"patch_size": patch} if "patch_size" in chosen else {}))

        def example(key, spec):
            shape = [2, *(n or LENGTH for n in spec.shape[1:])]
            if "float" in str(spec.dtype):
                return jax.random.normal(jax.random.key(1), shape)
            if "mask" in key:
                return jax.numpy.ones(shape, spec.dtype)
            if "segment" in key:
                return jax.numpy.zeros(shape, spec.dtype)
            return jax.random.randint(jax.random.key(1), shape, 1, VOCAB - 1).astype(spec.dtype)

        spec = model.input
        inputs = (
            {key: example(key, part) for key, part in spec.items()}
            if isinstance(spec, dict)
            else example("", spec)
        )
        fixed = [v.value for v in model.non_trainable_variables]

        def run(params, inputs):
            return model.stateless_call(params, fixed, inputs, training=False)[0]

        return run, [v.value for v in model.trainable_variables], (inputs,)

    for name in names:
        yield name, partial(make, name)


def transformers() -> Makers:
    """The models of Flax that transformers had until version 4."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "n_embd": 32,
        "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64, "d_ff": 64, "d_kv": 8,
        "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "dim": 32, "hidden_dim": 64,
        "n_layers": 2, "n_heads": 4, "embedding_size": 32, "image_size": IMAGE, "patch_size": 8,
        "attention_types": [[["global", "local"], 1]], "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 4, "word_embed_proj_dim": 32,
        "decoder_start_token_id": 0, "attention_type": "original_full", "ffn_dim": 64,
        "attention_heads": 4, "forced_eos_token_id": None,
    }  # fmt: skip
    names = [
        "Albert",
        "Bart",
        "Beit",
        "Bert",
        "BigBird",
        "Blenderbot",
        "Bloom",
        "CLIPText",
        "CLIPVision",
        "Dinov2",
        "DistilBert",
        "Electra",
        "GPT2",
        "GPTNeo",
        "GPTJ",
        "Gemma",
        "Llama",
        "MBart",
        "MT5",
        "Marian",
        "Mistral",
        "OPT",
        "Pegasus",
        "RoFormer",
        "Roberta",
        "RobertaPreLayerNorm",
        "T5",
        "ViT",
        "XGLM",
        "XLMRoberta",
    ]

    def make(name):
        import jax
        import transformers

        model_class = getattr(transformers, f"Flax{name}Model")
        config_class = model_class.config_class
        stated = {k: v for k, v in sizes.items() if hasattr(config_class(), k)}
        model = model_class(config_class(**stated), seed=0)
        ids = {"input_ids": tokens()}
        if name in ("Beit", "CLIPVision", "Dinov2", "ViT"):
            ids = {"pixel_values": jax.random.normal(jax.random.key(1), (2, 3, IMAGE, IMAGE))}
        elif getattr(model.config, "is_encoder_decoder", False):
            ids["decoder_input_ids"] = tokens(length=8)

        def run(params, inputs):
            return model(**inputs, params=params)[0]

        return run, model.params, (ids,)

    for name in names:
        yield name, partial(make, name)


def tunix() -> Makers:
    """Models of tunix, in nnx, with and without rematerialisation."""

    def make(name, remat):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        module = __import__(f"tunix.models.{name}.model", fromlist=["ModelConfig"])
        fields = inspect.signature(module.ModelConfig).parameters
        sizes = {
            "num_layers": 2, "vocab_size": VOCAB, "num_embed": VOCAB, "embed_dim": 32,
            "hidden_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "norm_eps": 1e-6,
            "rope_theta": 10_000, "sliding_window_size": 8, "use_tied_embedding": False,
            "dtype": jnp.float32, "param_dtype": jnp.float32,
        }  # fmt: skip
        chosen = {k: v for k, v in sizes.items() if k in fields}
        if remat is not None:
            chosen["remat_config"] = module.RematConfig[remat]
        classes = {"llama3": "Llama3", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}
        model_class = getattr(module, classes[name])
        model = model_class(module.ModelConfig(**chosen), rngs=nnx.Rngs(0))
        structure, state = nnx.split(model)

        def run(state, ids):
            length = ids.shape[1]
            places = jnp.broadcast_to(jnp.arange(length), ids.shape)
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (2, length, length))
            return nnx.merge(structure, state)(ids, places, None, mask)[0]

        return run, jax.tree.map(lambda x: x, state), (tokens(),)

    for name in ("llama3", "qwen2", "qwen3", "gemma3"):
        for remat in (None, "BLOCK", "DECODER"):
            yield f"{name} {remat or ''}".strip(), partial(make, name, remat)


def gemma() -> Makers:
    """Gemma of Google DeepMind, in Flax's linen."""

    def make(name):
        import dataclasses

        import jax
        from gemma import gm

        cls = getattr(gm.nn, name)
        config = dataclasses.replace(
            cls.config, num_embed=VOCAB, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8,
            num_kv_heads=2, attention_types=cls.config.attention_types[:2], vision_encoder=None,
            **({"num_layers": 2} if hasattr(cls.config, "num_layers") and "num_layers" in
               inspect.signature(type(cls.config)).parameters else {}),
        )  # fmt: skip

        class Small(cls):
            pass

        model = Small(config=config) if "config" in inspect.signature(cls).parameters else cls()
        params = model.init(jax.random.key(0), tokens())

        def run(params, ids):
            return model.apply(params, ids).logits

        return run, params, (tokens(),)

    for name in ("Gemma2_2B", "Gemma3_1B"):
        yield name, partial(make, name)


def penzai() -> Makers:
    """Transformers of penzai, whose parameters ``unbind_params`` takes out of the model."""

    def make(name):
        import jax
        from penzai import pz
        from penzai.models.transformer.variants import llamalike_common as common

        options = {
            "num_kv_heads": 2, "query_head_multiplier": 2, "embedding_dim": 32, "projection_dim": 8,
            "mlp_hidden_dim": 64, "num_decoder_blocks": 2, "vocab_size": VOCAB,
            "mlp_variant": "geglu_approx" if name == "gemma" else "swiglu",
            "tie_embedder_and_logits": name == "gemma", "rope_wavelength": 10_000,
            "rms_norm_eps": 1e-6, "attention_type": common.AttentionTypeGlobalCausal(),
            "activation_dtype": jax.numpy.float32, "parameter_dtype": jax.numpy.float32,
        }  # fmt: skip
        fields = inspect.signature(common.LlamalikeTransformerConfig).parameters
        config = common.LlamalikeTransformerConfig(
            **{k: v for k, v in options.items() if k in fields}
        )
        model = common.build_llamalike_transformer(
            config, init_base_rng=jax.random.key(0), name=name
        )
        slots, params = pz.unbind_params(model)

        def run(params, ids):
            named = pz.nx.wrap(ids).tag("batch", "seq")
            places = pz.nx.wrap(jax.numpy.arange(ids.shape[1])).tag("seq")
            bound = pz.bind_variables(slots, params)
            return bound(named, token_positions=places).unwrap("batch", "seq", "vocabulary")

        return run, params, (tokens(),)

    for name in ("llama", "gemma"):
        yield name, partial(make, name)


def equimo() -> Makers:
    """A vision transformer of equimo, in equinox."""

    def make():
        import equinox as eqx
        import jax
        from equimo.models.vit import VisionTransformer

        fields = inspect.signature(VisionTransformer.__init__).parameters
        sizes = {
            "img_size": IMAGE, "in_channels": 3, "dim": 32, "patch_size": 8, "num_heads": [4],
            "depths": [2], "num_classes": 10, "key": jax.random.key(0),
        }  # fmt: skip
        model = VisionTransformer(**{k: v for k, v in sizes.items() if k in fields})
        params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_array)

        def run(params, images):
            call = partial(eqx.combine(params, static), key=jax.random.key(0), inference=True)
            return jax.vmap(call)(images)

        return run, params, (jax.random.normal(jax.random.key(1), (2, 3, IMAGE, IMAGE)),)

    yield "VisionTransformer", make


LIBRARIES: Mapping[str, Callable[[], Makers]] = {
    "levanter": levanter, "keras-hub": keras_hub, "transformers": transformers,
    "google-tunix": tunix, "gemma": gemma, "penzai": penzai, "equimo": equimo,
}  # fmt: skip


# Convert and judge.


@dataclass(frozen=True)
class Verdict:
    """What came of a model.

    Attributes:
      model: its name.
      outcome: ``right``, ``wrong``, ``undecided``, ``no block``, ``rejected`` or
        ``not built``.
      blocks: the blocks that were found.
      converted: those that became mixtures.
      difference: of the outputs, of the largest one.
      is_trained: whether a step through the converted function has finite gradients, some of
        experts, and a finite loss behind it.
      reason: why it is not right, or the first near miss.
    """

    model: str
    outcome: str
    blocks: int = 0
    converted: int = 0
    difference: float | None = None
    is_trained: bool | None = None
    reason: str = ""


def judge(name: str, make: Callable[[], Model]) -> Verdict:
    """Return what comes of a model."""
    import jax
    import numpy as np

    from moecc import jax as mx
    from moecc.errors import MoeccError

    try:
        run, params, args = make()
        params = drawn(params)
        dense = arrays(jax.jit(run)(params, *args))
    except Exception as error:
        return Verdict(name, "not built", reason=summary(error))
    try:
        moe = mx.convert(run, params, *args, PIPELINE, causal=False)
    except MoeccError as error:
        is_miss = "matched nothing" in str(error) or "no block" in str(error)
        return Verdict(name, "no block" if is_miss else "rejected", reason=summary(error))
    report = moe.report
    converted = sum(block.is_converted for block in report.blocks)
    sparse = arrays(jax.jit(moe(run))(moe.params, *args))
    gap = max(
        float(np.abs(a - b).max() / (np.abs(a).max() or 1.0))
        for a, b in zip(dense, sparse, strict=True)
    )
    is_trained = trains(moe, run, args)
    is_right = gap <= TOLERANCE and is_trained and converted > 0
    reason = "; ".join(map(str, report.misses[:1]))
    outcome = "right" if is_right else "wrong"
    if is_right and gap == 0:
        outcome, reason = "undecided", BIT_BY_BIT
    counts = len(report.blocks), converted
    return Verdict(name, outcome, *counts, float(f"{gap:.1e}"), is_trained, reason)


def drawn(params):
    """Return parameters whose arrays of zeros are drawn: tunix begins products of blocks so."""
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return structure.unflatten(
        0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.any(leaf)
        else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    )


def arrays(result) -> list[Any]:
    """Return the arrays of floating point of a result, in float64."""
    import jax
    import numpy as np

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(result)]
    return [leaf.astype(np.float64) for leaf in leaves if leaf.dtype.kind not in "biuV"]


def trains(moe, run: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether a step of gradient descent reaches the experts and stays finite."""
    import jax
    import jax.numpy as jnp

    def loss(params):
        floats = [x for x in jax.tree.leaves(moe(run)(params, *args)) if x.dtype.kind == "f"]
        return sum(jnp.mean(jnp.square(x - 0.5)) for x in floats)

    def step(params):
        value, gradients = jax.value_and_grad(loss, allow_int=True)(params)
        moved = jax.tree.map(
            lambda p, g: p - 1e-3 * g if jnp.issubdtype(p.dtype, jnp.floating) else p,
            params, gradients,
        )  # fmt: skip
        norm = sum(
            jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(gradients)
            if jnp.issubdtype(g.dtype, jnp.floating)
        )  # fmt: skip
        return value, norm, loss(moved)

    value, norm, after = jax.jit(step)(moe.params)
    return bool(jnp.isfinite(value) & jnp.isfinite(after) & jnp.isfinite(norm) & (norm > 0))


def summary(error: BaseException) -> str:
    """Return an error in a line, without paths and addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"/\S+/", "", re.sub(r"0x[0-9a-f]+", "", text))
    name = (
        "" if type(error).__name__ in ("InputError", "UsageError") else f"{type(error).__name__}: "
    )
    return f"{name}{text}"[:300]


class OverTime(BaseException):
    """A model took more than its processor time."""


def run_library(name: str, judged: Collection[str]):
    """Print the verdicts on the models of a library that are not `judged`, a line of JSON each."""

    def expire(number, frame):
        raise OverTime

    signal.signal(signal.SIGVTALRM, expire)
    for model, make in LIBRARIES[name]():
        if model in judged:
            continue
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            verdict = judge(model, make)
        except OverTime:
            verdict = Verdict(model, "wrong", reason=f"more than {SECONDS} s of processor time")
        except Exception as error:
            verdict = Verdict(model, "wrong", reason=summary(error))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(json.dumps(vars(verdict)), flush=True)


def read_verdicts(name: str, judged: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the verdicts on the models of a library, judged in a process of its own."""
    command = [sys.executable, "-P", "-W", "ignore", __file__, "--library", name, *judged]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # Some libraries print lines of their own.
        yield from (json.loads(line) for line in process.stdout if line.startswith('{"model"'))


def main():
    """Judge the libraries, each in a process of its own, and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("names", nargs="*", help="libraries; with --library models to leave out")
    options = parser.parse_args()
    if options.library:
        run_library(options.library, options.names)
        return
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    libraries = record.get("libraries", {})
    for name in options.names or LIBRARIES:
        try:
            stated = version(name)
        except PackageNotFoundError:
            continue
        library = libraries.setdefault(name, {"version": stated, "models": []})
        if library["version"] != stated:
            library |= {"version": stated, "models": []}
        for verdict in read_verdicts(name, [model["model"] for model in library["models"]]):
            library["models"].append(verdict)
            print(name, verdict, file=sys.stderr, flush=True)
            options.out.write_text(json.dumps(summed(libraries), indent=1) + "\n", "utf-8")


def summed(libraries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of the verdicts, with their sums."""
    models = [model for library in libraries.values() for model in library["models"]]
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": version("jax"),
        "moecc": version("moecc"),
        "pipeline": PIPELINE,
        "tolerance": TOLERANCE,
        "models": len(models),
        "outcomes": Counter(model["outcome"] for model in models),
        "blocks": sum(model["blocks"] for model in models),
        "converted": sum(model["converted"] for model in models),
        "libraries": libraries,
    }


if __name__ == "__main__":
    main()
