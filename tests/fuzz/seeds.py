"""Valid inputs of each grammar, from which mutants are made; small, so that they are cheap."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from moecc.ir.text import print_graph
from moecc.testing.generate import random_graph
from tests.support.layouts import layout_text

GOLDEN = Path(__file__).parent.parent / "golden"

TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 37,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 8,
}  # fmt: skip

WEIGHTS = (
    'source("a.b" : bf16[mlp=6, embed=4])',
    "full(0.5 : f32[expert=8])",
    'tile(source("a" : f32[mlp=3, embed=2]), expert=4, position=1)',
    'stack(source("a" : f32[mlp=3]), source("b" : f32[mlp=3]), axis=expert)',
    'concat(source("a" : f32[mlp=3]), full(1.0 : f32[mlp=2]), axis=mlp)',
    'each(expert=0..7, source("experts.{expert}.w" : bf16[mlp=6]))',
    'each(layer=0..6..2, slice(source("l.{layer}" : f32[mlp=8]), mlp=2:4))',
    'index(tile(source("a" : f16[mlp=3]), expert=8), expert=3)',
    'rename(permute(source("a" : f32[mlp=3, embed=2]), (embed, mlp)), mlp=inner)',
    'merge(split(source("a" : f32[mlp=6]), mlp=(group=2, mlp=3)), (group, mlp)=mlp)',
    'cast(scale(add(source("a" : f32[mlp=3]), full(2.0 : f32[mlp=3])), -0.5), bf16)',
    'minimum(mul(source("a" : f64[mlp=3]), source("a" : f64[mlp=3])), full(0.0 : f64[mlp=3]))',
    'std(source("a" : f32[mlp=3, embed=2]), keep=(mlp))',
    'mean(source("a" : f32[mlp=3]), subset(pred[mlp=3], axis=mlp, count=2, key=0x1f))',
    "normal(f32[expert=8, embed=2], std=0.02, mean=0.5, key=0x1f)",
    "truncated_normal(f32[expert=8], std=0.02, bound=2.0, key=0x1f)",
    "uniform(f32[expert=8], low=-0.1, high=0.1, key=0x1f)",
    'take(source("w" : f32[mlp=6]), mlp=permutation(i32[mlp=6], key=0x1f))',
    'take(source("w" : f32[mlp=6]), mlp=clusters(source("p" : i32[mlp=6, other=6]), axis=mlp, '
    "first=2, groups=2))",
    'fitted(source("c" : f32[e=3, o=3]), source("m" : f32[e=3]), source("x" : f32[expert=2, e=3]), '
    "ridge=0.01, std=0.5)",
    "select(subset(pred[expert=2, mlp=4], axis=mlp, count=2, key=0x3), "
    'tile(source("a" : f32[mlp=4]), expert=2), normal(f32[expert=2, mlp=4], std=0.5, key=0x7))',
    'take(source("w" : f32[mlp=6, embed=4]), mlp=permutation(i32[mlp=6], key=0x1f))',
    'clusters(source("pairs" : i32[mlp=6, other=6]), axis=mlp, first=2, groups=2)',
    'aligned(source("a" : f32[mlp=6]), source("b" : f32[mlp=6]), axis=mlp)',
    'fitted(source("c" : f32[embed=4, other=4]), source("m" : f32[embed=4]), '
    'source("x" : f32[expert=2, embed=4]), ridge=0.1, std=0.02)',
)

RULES = (
    layout_text("batch = data", "mlp = model", "kv_head = model ?", "expert with slot = data"),
    "# mine\n" + layout_text("param expert = data*model", "group = data", "vocab = model ?"),
    layout_text("batch = fsdp*data", "param embed = fsdp", "expert = expert", "seq = model"),
    "batch = data\nparam embed = data ?\n",
)

MACHINES = (
    "cpu", "cpu:8", "gpu:h100:8", "gpu:a100-80gb:64", "tpu:v4:2x2x4", "tpu:v5e:4x4",
    "tpu:v5p:4x4x4", "tpu:v6e:16x16", "tpu:tpu7x:2x2x2", "data=8,expert=8", "data:8,model:4",
    "fsdp=4,model=2", "expert=64",
)  # fmt: skip

CARD = (
    b"---\nlicense: apache-2.0\nlicense_name: x\nlanguage:\n- en\n- 'de'\n"
    b'datasets: [a, "b"]\n---\n# M\n'
)


def encoded(texts: Iterable[str]) -> list[bytes]:
    """Return texts as bytes."""
    return [text.encode() for text in texts]


@cache
def graphs() -> tuple[bytes, ...]:
    """Return random graphs, one with a body, one over a mesh, and one of a model."""
    from moecc.families import build
    from moecc.families.registry import parse_config
    from moecc.rewrite.pipeline import Pipeline
    from moecc.rewrite.runner import run_pipeline

    found = [print_graph(random_graph(seed, max_steps=4)) for seed in range(60)]
    config = json.loads((GOLDEN / "llama_gqa" / "config.json").read_text())
    for layers, pipeline in (
        (1, "upcycle{experts=4 top-k=2}"),
        (3, "roll-layers"),
        (1, "annotate-sharding{mesh=data:2,model:2 rules=tensor-parallel}"),
    ):
        graph = build(parse_config({**config, **TINY, "num_hidden_layers": layers}))
        run_pipeline(graph, Pipeline.parse(pipeline))
        found.append(print_graph(graph))
    found += [
        f"moecc 1\ngraph g {{\n  param %w : {_type_of(text)} = {text}\n  output w = %w\n}}\n"
        for text in WEIGHTS
    ]
    return tuple(encoded(sorted(found, key=len)))


def _type_of(text: str) -> str:
    from moecc.weights.text import parse_expr

    return str(parse_expr(text)[0].type)


@cache
def pipelines() -> tuple[bytes, ...]:
    """Return each pass with all of its options stated, and some pipelines."""
    from moecc.rewrite.pipeline import Pipeline, installed

    needs = {
        "annotate-sharding": "{mesh=data:2 rules=data-parallel}", "expert-parallel": "{via=ring}",
        "freeze": "{groups=moe}", "align-neurons": "{to=a}", "merge-adapter": "{source=a}",
    }  # fmt: skip
    texts = [
        "canonicalize,cse,dce", "upcycle{experts=4 top-k=2 layers=3,7,11},add-losses",
        "st-moe{experts=4 layers=every:2},specialize{mode=eval}", 'freeze{only="router"}',
        "upcycle{experts=8 granularity=2 shared=0.5 gates=sigmoid init=noise}",
    ]  # fmt: skip
    for name in installed().names():
        made = Pipeline.parse(f"{name}{needs.get(name, '')}")
        texts += [str(made), made.in_full()]
    return tuple(encoded(texts))


@cache
def configs() -> tuple[bytes, ...]:
    """Return the configs of the golden checkpoints, made small."""
    found = {}
    for file in sorted(GOLDEN.glob("*/config.json")):
        found[file.read_bytes()] = None
    return tuple(found)


def pack(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file of a header as it stands."""
    return struct.pack("<Q", len(header) if length is None else length % 2**64) + header + data


def unpack(content: bytes) -> tuple[bytes, bytes]:
    """Return the header and the data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return content[8 : 8 + size], content[8 + size :]


@cache
def safetensors() -> tuple[bytes, ...]:
    """Return small files of safetensors, one of each element type."""
    types = {"BOOL": 1, "U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8}
    found = []
    for count in (1, 3):
        entries = {"__metadata__": {"format": "pt"}}
        at = 0
        for number, (kind, size) in enumerate(list(types.items())[: count * 3]):
            shape = [2, number + 1]
            end = at + 2 * (number + 1) * size
            entries[f"model.layers.{number}.weight"] = {
                "dtype": kind, "shape": shape, "data_offsets": [at, end],
            }  # fmt: skip
            at = end
        found.append(pack(json.dumps(entries).encode(), bytes(at)))
    return (pack(b"{}", b""), *found)


@cache
def gguf_files() -> tuple[bytes, ...]:
    """Return small GGUF files: a model, one with a tokenizer, one quantised."""
    from ..checkpoint.gguf.conftest import GgufBuilder, add_model  # noqa: TID252

    found = [GgufBuilder().key("general.architecture", "string", "llama").build()]
    small = {"layers": 1, "heads": 2, "groups": 1, "hidden": 16, "mlp": 32, "vocab": 6}
    for architecture in ("llama", "qwen2", "qwen3"):
        made = add_model(GgufBuilder(), architecture, **small)
        made.key("tokenizer.ggml.model", "string", "gpt2").key(
            "tokenizer.ggml.pre", "string", "gpt-2"
        )
        made.array("tokenizer.ggml.tokens", "string", ["a", "b", "ab", "<s>", "</s>", "c"])
        made.array("tokenizer.ggml.token_type", "i32", [1, 1, 1, 3, 3, 1])
        made.array("tokenizer.ggml.merges", "string", ["a b"])
        made.key("tokenizer.ggml.bos_token_id", "u32", 3)
        found.append(made.build())
    made = add_model(GgufBuilder(), "llama", **{**small, "hidden": 32}, kind="Q8_0")
    made.key("tokenizer.ggml.model", "string", "llama").key("general.license", "string", "mit")
    made.array("tokenizer.ggml.tokens", "string", ["<unk>", "<s>", "</s>", "▁a", "b", "▁ab"])
    made.array("tokenizer.ggml.scores", "f32", [0.0, 0.0, 0.0, -1.0, -2.0, -3.0])
    made.array("tokenizer.ggml.token_type", "i32", [2, 3, 3, 1, 1, 1])
    found.append(made.build())
    return tuple(found)


@cache
def manifests() -> tuple[bytes, ...]:
    """Return the documents of two manifests, without their seals."""
    from moecc.formats.manifest import FileRecord, Manifest, TensorRecord, WeightFileRecord, dump

    digest = "0123456789abcdef" * 4
    plain = Manifest(
        pipeline="upcycle{experts=4}", seed=0, source="x", family_from="llama", dtype="bf16",
        source_files={"model.safetensors": FileRecord(10, digest)}, family_to="mixtral",
        preserves="reassociation", weights={"model.safetensors": WeightFileRecord(10, digest)},
        files={"config.json": FileRecord(3, digest)},
        tensors={"w": TensorRecord(digest, "bf16", (2, 3), "model.safetensors")}, notes=("n",),
        lineage=({"run": "a", "steps": 3},), receipt={"schema": "moecc.receipt/1", "promised": {}},
    )  # fmt: skip
    document = json.loads(dump(plain))
    del document["seal"]
    return (json.dumps(document).encode(),)


@cache
def tokenizers() -> tuple[bytes, ...]:
    """Return documents with a tokenizer, its config and the generation config in one."""
    from moecc.train.tokens.encoders import byte_tokenizer, byte_tokenizer_config

    special = {"id": 5, "content": "<s>", "special": True, "normalized": False,
               "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    bpe = {
        "version": "1.0", "added_tokens": [special], "normalizer": None, "pre_tokenizer": level,
        "decoder": level, "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "d": 4, "<s>": 5},
                  "merges": [["a", "b"], "a b"], "unk_token": None, "byte_fallback": False,
                  "ignore_merges": False},
    }  # fmt: skip
    pieces = {
        **bpe, "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {**bpe["model"], "byte_fallback": True, "fuse_unk": True, "unk_token": "d"},
    }  # fmt: skip
    words = {**bpe, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    unigram = {**bpe, "model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]], "unk_id": 0}}
    settings = {"bos_token": "<s>", "eos_token": {"content": "<s>"}, "chat_template": "{{ x }}",
                "add_bos_token": True}  # fmt: skip
    generation = {"bos_token_id": 5, "eos_token_id": [5, 4], "pad_token_id": 0}
    found = [
        {"tokenizer": t, "settings": settings, "generation": generation}
        for t in (bpe, pieces, words, unigram)
    ]
    own = json.loads(byte_tokenizer()), json.loads(byte_tokenizer_config())
    found.append({"tokenizer": own[0], "settings": own[1], "generation": {}})
    return tuple(json.dumps(document).encode() for document in found)


@cache
def indices() -> tuple[bytes, ...]:
    """Return the index of a sharded checkpoint."""
    return ((GOLDEN / "llama_sharded" / "model.safetensors.index.json").read_bytes(),)


@cache
def recipes() -> tuple[bytes, ...]:
    """Return the recipes that moecc ships."""
    from moecc.train.recipe_text import shipped_recipes, shipped_text

    return tuple(encoded(map(shipped_text, shipped_recipes())))


@cache
def receipts() -> tuple[bytes, ...]:
    """Return a receipt, its members those that are read."""
    document = {
        "schema": "moecc.receipt/1",
        "promised": {"kind": "approximate", "reason": "r", "predicted_error": 0.1},
        "checked": [{"pass": "upcycle", "measured_error": 0.0}],
        "verified": {"dtype": "f32", "layers": 2, "inputs": {"tokens": [2, 128]},
                     "difference": {"max_relative": 1e-6}, "tolerance": 1e-5},
        "engines": [{"engine": "vLLM", "version": "1", "runs": True, "reasons": []}],
    }  # fmt: skip
    return (json.dumps(document).encode(),)


@cache
def arrays() -> tuple[bytes, ...]:
    """Return files of token ids: .npy, and .npz."""
    import io

    import numpy as np

    found = []
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    for save in (np.save, lambda f, a: np.savez(f, tokens=a)):
        file = io.BytesIO()
        save(file, tokens)
        found.append(file.getvalue())
    return tuple(found)


@cache
def adapters() -> tuple[bytes, ...]:
    """Return safetensors files of an adapter whose header holds its config."""
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"v_proj|o.*": 2.0},
        "use_rslora": False, "fan_in_fan_out": False, "base_model_name_or_path": "a/llama_gqa",
        "init_lora_weights": True, "use_dora": False, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    shapes = {"q_proj": ((2, 16), (16, 2)), "v_proj": ((2, 16), (8, 2))}
    header = {"__metadata__": {"adapter": json.dumps(config)}}
    size = 0
    for module, pair in shapes.items():
        for letter, shape in zip("AB", pair, strict=True):
            name = f"base_model.model.model.layers.0.self_attn.{module}.lora_{letter}.weight"
            ends = [size, size := size + 4 * shape[0] * shape[1]]
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": ends}
    return (pack(json.dumps(header).encode(), bytes(size)),)


@cache
def runs() -> tuple[bytes, ...]:
    """Return documents with step.json, lineage.json and the lines of a run's journal."""
    from moecc.ir.conventions import METRIC

    digest = "sha256:" + "0123456789abcdef" * 4
    file = {"size_bytes": 3, "sha256": "0123456789abcdef" * 4}
    stages = [
        {"kind": "convert", "source": "x", "pipeline": "upcycle{experts=4}", "preserves": "exact"},
        {"kind": "train", "start": "x", "recipe": digest, "recipe_toml": "", "from_step": 0,
         "steps": 3, "tokens": 96, "data": {"corpus": {"tokens": 96}}},
    ]  # fmt: skip
    document = {
        "step": {"schema": "moecc.step/1", "step": 3, "recipe": digest, "tokens": 96,
                 "left_out": [1], "loss": 3.5, "files": {"a/b": file}, "run_files": {},
                 "tensors": {"w": {"dtype": "f32", "shape": [2, 3]}}},
        "lineage": {"schema": "moecc.lineage/1", "moecc": "1", "card": {"license": ["mit"]},
                    "stages": stages},
        "metrics": [
            {"step": 1, "loss": 3.6, "tokens": 32, "spread": {"layers.0.mlp": [0.5, 0.5]},
             f"{METRIC}layers.0.mlp.loads": [0.5, 0.5]},
            {"step": 2, "loss": 3.5, "tokens": 64, "held_out": {"text": 3.4}, "left_out": [1]},
        ],
        "speed": [{"step": 1, "seconds": 0.5}],
    }  # fmt: skip
    return (json.dumps(document).encode(),)


@cache
def journals() -> tuple[bytes, ...]:
    """Return the journal of a conversion that was killed."""
    head = {"facts": {"source": {"files": {"a": 1}}, "pipeline": "x", "seed": 0},
            "schema": "moecc.journal/2"}  # fmt: skip
    lines = [head, {"name": "w", "sha256": "0" * 64}, {"name": "v", "sha256": "1" * 64,
             "nonfinite_count": 2, "nonfinite": [], "zeros": ["v"]}]  # fmt: skip
    return ("".join(f"{json.dumps(line)}\n" for line in lines).encode(),)


@cache
def plans() -> tuple[bytes, ...]:
    """Return a saved plan, its members those that are read."""
    request = {"model": "m", "machine": "cpu:8", "pipeline": "upcycle{experts=8}", "step": "train",
               "batch_tokens": None, "sequence": "64", "optimizer": "adamw", "dtype": "bf16",
               "weight_dtype": None, "micro_batches": 1, "reduce_dtype": None,
               "overlap": False}  # fmt: skip
    best = {"mesh": {"fsdp": 2, "expert": 4}, "rules": ["fsdp", "expert-parallel"],
            "dense_weights": "whole", "via": "ring", "remat": "none", "sliced": False,
            "seconds": 0.05}  # fmt: skip
    document = {"schema": "moecc.plan/1", "request": request, "best": best, "parameters": 4256,
                "batch": {"tokens": 2048}}  # fmt: skip
    return (json.dumps(document).encode(),)


@cache
def proofs() -> tuple[bytes, ...]:
    """Return logs of proofs, each with its two graphs."""
    from moecc.ir.text import parse, print_graph
    from moecc.prove import prove
    from tests.checker.logs import PROOFS

    text = "moecc 1\ngraph g {{\n  input %x : f32[a=A, b=4]\n  {}\n  output y = %y\n}}\n"
    source = 'source("w" : f32[b=4, c=3])'
    plain = (
        f"param %w : f32[b=4, c=3] = {source}\n  %y = contract %x, %w {{over=b}} : f32[a=A, c=3]"
    )
    tiled = (
        f"param %w : f32[e=2, b=4, c=3] = tile({source}, e=2)\n"
        "  %z = contract %x, %w {over=b} : f32[a=A, e=2, c=3]\n"
        "  %y = mean %z {axes=(e)} : f32[a=A, c=3]"
    )
    before, after = (parse(text.format(lines)) for lines in (plain, tiled))
    verdict = prove(before, after)
    assert verdict.status == "proved"
    by_moecc = verdict.log, print_graph(before), print_graph(after)
    return tuple(
        json.dumps({"log": log, "before": one, "after": other}).encode()
        for log, one, other in (by_moecc, *PROOFS)
    )
