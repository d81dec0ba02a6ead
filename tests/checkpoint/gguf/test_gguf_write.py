"""GGUF files that moecc writes: read back, verified, and what cannot be written."""

import json
import re

import numpy as np
import pytest
from derived_models import DERIVED, derive

from moecc.errors import InputError, MoeccError, UsageError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.gguf.families import (
    GgufFamily,
    dense_architectures,
    gguf_name,
    hugging_face_name,
    mixture_architectures,
)
from moecc.formats.gguf.header import Key, plan_file, read_gguf_header
from moecc.formats.gguf.reader import open_gguf
from moecc.formats.gguf.rearranged import cut, join
from moecc.formats.gguf.storage import BY_NAME
from moecc.formats.gguf.tokenizer import tokenizer_keys
from moecc.formats.manifest import verify_manifest
from moecc.formats.open import open_checkpoint
from moecc.formats.safetensors import Entry
from moecc.jobs.convert import plan, write
from moecc.rewrite.pipeline import Pipeline
from moecc.translate.gguf import export_gguf
from moecc.types import F64, tensor
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Source
from tests.checkpoint.folders import GOLDEN, WEIGHTS, needs_gguf, opened_model

from .test_gguf_tokenizer import byte_level, sentence_piece

Q8_0 = BY_NAME["Q8_0"]
SAME = [
    ("llama_biases_head_dim", "llama"),
    ("llama_yarn", "llama"),
    ("qwen2_gqa_tied", "qwen2"),
    ("qwen3_head_dim_tied", "qwen3"),
    ("granite_multipliers", "granite"),
    ("olmo2_square_tied", "olmo2"),
    ("gemma_mqa", "gemma"),
    ("ernie4_5_square", "ernie4_5"),
    ("seed_oss_biases", "seed_oss"),
    ("hunyuan_dense_square", "hunyuan-dense"),
    ("exaone4_square", "exaone4"),
    ("glm4_biases", "glm4"),
    ("arcee_square", "arcee"),
    ("smollm3", "smollm3"),
    ("gemma3", "gemma3"),
    ("lfm2_square", "lfm2"),
    ("lfm2_moe", "lfm2moe"),
    ("deepseek_v3", "deepseek2"),
    ("llama4", "llama4"),
    ("gpt_oss", "gpt-oss"),
    ("cohere_square", "command-r"),
    ("nemotron_square", "nemotron"),
    ("stablelm_square", "stablelm"),
    ("olmo_square", "olmo"),
    ("phi_square", "phi2"),
    ("qwen3_next_square", "qwen3next"),
    ("qwen3_5_text_square", "qwen35"),
    ("qwen3_5_moe_text_square", "qwen35moe"),
    ("qwen2_moe_square", "qwen2moe"),
    ("qwen3_moe_norm", "qwen3moe"),
    ("granitemoe_multipliers", "granitemoe"),
    ("glm4_moe_dense_first", "glm4moe"),
    ("ernie4_5_moe_square_v4", "ernie4_5-moe"),
]
"""Golden checkpoints that a file of the architecture holds as they are."""


def convert(source, target, out, passes="", **options):
    with opened_model(source) as model:
        planned = plan(model, Pipeline.parse(passes), target, **options)
        write(planned, out)
    return planned


def refusal(source, target, passes="", **options):
    with opened_model(source) as model, pytest.raises(MoeccError) as raised:
        plan(model, Pipeline.parse(passes), target, **options)
    return str(raised.value)


@pytest.mark.parametrize(("source", "architecture"), SAME)
def test_what_is_read_back_is_what_was_written(source, architecture, tmp_path):
    place = derive(source, tmp_path / "in") if source in DERIVED else GOLDEN / source
    convert(str(place), f"gguf:{architecture}", tmp_path / "m.gguf")
    # The norms of gemma and of models with delta rules are stored as 1 + w, rates as −exp(A_log).
    off = 2e-7 if architecture.startswith(("gemma", "nemotron", "qwen3next", "qwen35")) else 0.0
    with opened_model(tmp_path / "m.gguf") as back, opened_model(place) as model:
        assert back.graph.attrs["family"] == model.graph.attrs["family"]
        theirs, ours = back.params(), model.params()
        for name in theirs:
            bound = off if name.endswith(("norm.weight", "A_log")) else 0.0
            expected = ours[_untied(name, ours)]
            np.testing.assert_allclose(theirs[name], expected, rtol=0, atol=bound, err_msg=name)
        kept = ("rope", "rms_norm_eps", "hidden_size", "num_hidden_layers", "conv_taps", "latent")
        configs = [parse_config(m.graph.attrs["config"]) for m in (back, model)]
        theirs, ours = ({k: getattr(config, k) for k in kept} for config in configs)
        assert theirs == ours


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("deepseek_v3_groups", "deepseek2"),
        ("qwen3_next_delta", "qwen3next"),
        ("qwen3_5_moe_text_delta", "qwen35moe"),
        ("llama4_scout", "llama4"),
        ("gpt_oss_limits", "gpt-oss"),
    ],
)
def test_parts_are_joined_to_what_was_cut(source, architecture):
    with opened_model(source) as model:
        config = parse_config(model.graph.attrs["config"])
        family = mixture_architectures()[architecture]
        tensors = model.checkpoint.tensors
        for whole in family.rearranged():
            info = next(info for name, info in tensors.items() if name.endswith(whole))
            axes = {f"axis{at}": size for at, size in enumerate(info.shape)}
            expr = Source(info.name, tensor(info.dtype, **axes))
            parts = cut(whole, expr, config)
            joined, read = join(whole, parts, config), model.checkpoint.read
            np.testing.assert_array_equal(evaluate(joined, read), read(info.name), whole)
            assert any(not np.array_equal(evaluate(part, read), read(info.name)) for part in parts)


def test_the_first_files_of_qwen3next(tmp_path, monkeypatch):
    """They hold the projections of the delta rule as one matrix, which llama.cpp reads, too."""
    with monkeypatch.context() as patch:
        patch.setattr(GgufFamily, "rearranged", lambda self: {})
        convert("qwen3_next_square", "gguf:qwen3next", tmp_path / "m.gguf")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert "blk.0.ssm_in.weight" in header.tensors
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    with open_checkpoint(GOLDEN / "qwen3_next_square") as source:
        expected = source.read(name)
    with open_gguf(tmp_path / "m.gguf") as file:
        np.testing.assert_array_equal(file.read(name), expected)


def _untied(name, params):
    """Return the embedding for an output matrix that the source does not have."""
    return name if name in params else "model.embed_tokens.weight"


def test_a_mixture_of_a_dense_model(tmp_path):
    passes = "upcycle{experts=6 top-k=2 granularity=2 router-std=1}"
    planned = convert("llama_gqa", "gguf:llama", tmp_path / "m.gguf", passes)
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.metadata["llama.expert_count"] == 6
    assert header.metadata["llama.feed_forward_length"] == 12
    assert header.tensors["blk.0.ffn_down_exps.weight"].shape == (6, 16, 12)
    assert header.metadata["moecc.pipeline"] == planned.pipeline.in_full()
    with opened_model(tmp_path / "m.gguf") as back:
        layer = back.params()["model.layers.0.block_sparse_moe.experts.w2.weight"]
    with opened_model("llama_gqa") as model:
        down = model.params()["model.layers.0.mlp.down_proj.weight"]
    # Slices of a virtual group; the gates of two equal experts are halves.
    np.testing.assert_array_equal(np.concatenate([layer[0], layer[1]], axis=1), 2 * down)


@needs_gguf
def test_q8_0(small_model, tmp_path):
    rng = np.random.default_rng(0)

    def make(name, shape):
        return rng.standard_normal(shape).astype("<f4").tobytes()

    small_model(hidden=32, mlp=48, make=make).write(tmp_path / "x.gguf")
    planned = convert(
        str(tmp_path / "x.gguf"), "gguf:llama", tmp_path / "m.gguf",
        "upcycle{experts=4 top-k=2}", dtype=Q8_0,
    )  # fmt: skip
    stored = {n: t.storage.name for n, t in read_gguf_header(tmp_path / "m.gguf").tensors.items()}
    assert stored["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert stored["blk.0.ffn_down_exps.weight"] == "F16"  # rows of 48 are no whole blocks
    assert stored["blk.0.ffn_gate_inp.weight"] == stored["blk.0.attn_norm.weight"] == "F32"
    (remark,) = [r for r in planned.remarks if "written in f16" in r]
    assert "2 matrices, the first blk.0.ffn_down_exps.weight" in remark
    assert verify_manifest(tmp_path / "m.gguf") == []
    with opened_model(tmp_path / "m.gguf") as back:
        made = back.params()["model.layers.1.block_sparse_moe.experts.w1.weight"]
    with open_checkpoint(tmp_path / "x.gguf") as source:
        gate = source.read("model.layers.1.mlp.gate_proj.weight")
    assert (np.abs(made - gate) <= np.abs(gate).max() / 127).all()
    assert (made == made[0]).all()


def test_the_gate_of_a_shared_expert_is_never_zero(tmp_path):
    """llama.cpp computes silu(x) / x, which is NaN for zero."""
    passes = "upcycle{experts=2 top-k=2 shared=0.5}"
    convert("qwen2_gqa_tied", "gguf:qwen2moe", tmp_path / "m.gguf", passes)
    with open_gguf(tmp_path / "m.gguf") as made:
        gate = made.read("model.layers.0.mlp.shared_expert_gate.weight")
        head = made.read("lm_head.weight")
        np.testing.assert_array_equal(head, made.read("model.embed_tokens.weight"))
    assert gate.shape == (1, 16)
    assert (gate == np.float32(1e-20)).all()


def test_the_file_has_its_manifest_beside_it(tmp_path):
    convert("llama_gqa", "gguf:llama", tmp_path / "a.gguf")
    convert("llama_gqa", "gguf:llama", tmp_path / "b.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.gguf", "a.gguf.moecc.json", "b.gguf", "b.gguf.moecc.json",
    ]  # fmt: skip
    for suffix in ("gguf", "gguf.moecc.json"):
        ours, theirs = (tmp_path / f"{name}.{suffix}" for name in "ab")
        assert ours.read_bytes() == theirs.read_bytes()
    assert verify_manifest(tmp_path / "a.gguf") == []
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[-5] ^= 1
    (tmp_path / "a.gguf").write_bytes(data)
    (problem,) = verify_manifest(tmp_path / "a.gguf")
    assert "the data of the tensor 'output.weight' differ" in problem.message


def test_an_existing_file_is_kept(tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(InputError, match="the output file exists"):
        convert("llama_gqa", "gguf:llama", out)
    assert out.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    with opened_model("llama_gqa") as model:
        write(plan(model, Pipeline.parse(""), "gguf:llama"), out, force=True)
    assert verify_manifest(out) == []


@pytest.mark.parametrize(
    ("source", "target", "passes", "reason"),
    [
        ("llama_gqa", "gguf:qwen3moe", "", "no dense models of the architecture qwen3moe"),
        ("llama_gqa", "gguf:qwen2", "upcycle", "no mixtures of experts of the architecture qwen2"),
        ("llama_gqa", "gguf:qwen3moe", "upcycle", "always has norms of the queries and keys"),
        ("llama_gqa", "gguf:lama", "", "did you mean 'llama'?"),
        ("llama_gelu_mqa", "gguf:llama", "upcycle", "llama.cpp computes SiLU"),
        ("mistral_window", "gguf:llama", "upcycle", "has no sliding window"),
        ("llama_dynamic", "gguf:llama", "upcycle", "no dynamic scaling"),
        ("phi3_long_v4", "gguf:phi3", "", "does not write the factors of longrope"),
        ("llama_yarn_options", "gguf:llama", "upcycle", "attention_factor, truncate of YaRN"),
        ("qwen3_moe_step", "gguf:qwen3moe", "", "refuses a dense layer in a file with experts"),
        ("qwen3_moe_plain", "gguf:qwen3moe", "", "divides the chosen gates by their sum"),
        ("olmoe_norm", "gguf:olmoe", "", "as many key-value heads as query heads"),
        ("lfm2_biases", "gguf:lfm2", "", "no other conv_bias than False"),
        ("nemotron_biases", "gguf:nemotron", "", "heads that together have the model's width"),
        ("stablelm_parallel", "gguf:stablelm", "", "no other use_parallel_residual than False"),
        ("gpt_oss_limits", "gguf:gpt-oss", "", "cannot state truncate of YaRN"),
        ("llama4_scout", "gguf:llama4", "", "no other attention_chunk_size than 8192"),
        ("llama4_square", "gguf:llama4", "", "has chunks in layers with rotary positions"),
        ("qwen3_next_delta", "gguf:qwen3next", "", "heads of one width in gated delta rules"),
        ("deepseek_v2_groups", "gguf:deepseek2", "", "no other topk_method than greedy"),
        ("deepseek_v2_square", "gguf:deepseek2", "", "whether queries have latent vectors"),
        ("deepseek_v3_groups", "gguf:deepseek2", "", "in norms of latent vectors"),
        ("deepseek_v3_square_v4", "gguf:deepseek2", "", "no other rope_interleave than True"),
        ("lfm2_moe_square", "gguf:lfm2moe", "", "upcycle with gates=sigmoid-renormalised"),
        ("gemma4_keys", "gguf:gemma4", "", "reads no biases of attention"),
        ("gemma4_square", "gguf:gemma4", "", "ends where no layer has a window"),
        ("gemma3n_square", "gguf:gemma3n", "", "by a standard deviation over n − 1 of them"),
        ("gemma3n_square", "gguf:gemma3n_text", "", "--to gemma3n_text writes a folder"),
    ],
)
def test_what_llama_cpp_would_not_compute(source, target, passes, reason):
    assert reason in refusal(source, target, passes)


NARROW = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
CONVOLVED = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "keys", "architecture", "reason"),
    [
        ("llama", {"rope_scaling": YARN | {"beta_fast": 2}}, "llama", "beta_fast 32 and beta_slow"),
        ("qwen3", {"rope_scaling": YARN | {"beta_slow": 2}}, "qwen3", "beta_fast 32 and beta_slow"),
        ("olmo2", {"rope_scaling": LINEAR}, "olmo2", "reads no positions of type linear"),
        ("olmo", {"rope_scaling": LLAMA3}, "olmo", "reads no positions of type llama3"),
        ("smollm3", {"rope_scaling": LLAMA3}, "smollm3", "reads no positions of type llama3"),
        ("qwen2", NARROW, "qwen2", "together have the model's width"),
        ("olmo2", NARROW, "olmo2", "together have the model's width"),
        ("olmoe", NARROW, "olmoe", "together have the model's width"),
        ("exaone4", NARROW, "exaone4", "together have the model's width"),
        ("lfm2", NARROW, "lfm2", "together have the model's width"),
        ("lfm2_moe", NARROW | CONVOLVED, "lfm2moe", "together have the model's width"),
    ],
)
def test_positions_and_heads_that_llama_cpp_reads_otherwise(family, keys, architecture, reason):
    config = parse_config({"model_type": family, "num_hidden_layers": 2, **keys})
    with pytest.raises(InputError, match=reason):
        export_gguf(build(config), architecture)


# --- the tokenizer


def folder_of(file, folder):
    """Write the tokenizer files of a GGUF file into a folder that is a checkpoint."""
    for name in ("config.json", WEIGHTS):
        (folder / name).write_bytes((GOLDEN / "llama_gqa" / name).read_bytes())
    with open_gguf(file) as checkpoint:
        for name, data in checkpoint.companions().items():
            (folder / name).write_bytes(data)
    return folder


def written_again(builder, tmp_path, rows):
    """Return tokenizer.json of a file, and that of a file made of it."""
    file = builder.write(tmp_path / "x.gguf")
    tmp_path.joinpath("f").mkdir()
    with open_checkpoint(folder_of(file, tmp_path / "f")) as folder:
        keys, reason = tokenizer_keys(folder, rows)
    assert reason is None, reason
    header = read_gguf_header(file)
    kept = [
        Key(name, value)
        for name, value in header.metadata.items()
        if isinstance(value, int | float | str) and not name.startswith("tokenizer.")
    ]
    entries = [Entry(n, t.storage.dtype, t.shape) for n, t in header.tensors.items()]
    shard = plan_file("y.gguf", entries, [*kept, *keys])
    with (tmp_path / "y.gguf").open("wb") as made:
        made.write(shard.header)
        made.truncate(shard.size_bytes)
    files = []
    for path in (file, tmp_path / "y.gguf"):
        with open_gguf(path) as checkpoint:
            files.append(checkpoint.companions())
    return files[0], files[1]


@pytest.mark.parametrize(
    "pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "qwen35", "deepseek-v3", "tekken"]
)
def test_byte_level_bpe(pre, small_model, tmp_path):
    builder = byte_level(small_model, pre)
    builder.key("tokenizer.ggml.bos_token_id", "u32", 264)
    builder.key("tokenizer.ggml.eos_token_id", "u32", 264)
    builder.key("tokenizer.ggml.add_bos_token", "bool", True)
    builder.key("tokenizer.chat_template", "string", "{{ messages }}")
    assert_same_tokenizer(*written_again(builder, tmp_path, 512))


def test_sentence_piece_bpe(small_model, tmp_path):
    pieces = [("\u2581", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -1.5), ("\u2581ab", -0.5)]
    builder = sentence_piece(small_model, pieces)
    assert_same_tokenizer(*written_again(builder, tmp_path, 264))


def assert_same_tokenizer(first, second):
    assert first.keys() == second.keys()
    for name in first:
        ours, theirs = json.loads(first[name]), json.loads(second[name])
        if name == "tokenizer.json" and ours["model"]["byte_fallback"]:
            # Equal ranks: among the cuts of one piece the order is free.
            for one in (ours, theirs):
                one["model"]["merges"] = {"".join(pair) for pair in one["model"]["merges"]}
        assert ours == theirs, name


def test_keys_of_a_gguf_source_are_kept(small_model, tmp_path):
    builder = byte_level(small_model, "smollm").key("tokenizer.ggml.odd", "i64", -3)
    origin = {"name": "Small 1B", "basename": "Small", "organization": "Makers", "license": "mit"}
    for key, value in origin.items():
        builder.key(f"general.{key}", "string", value)
    builder.write(tmp_path / "x.gguf")
    convert(str(tmp_path / "x.gguf"), "gguf:llama", tmp_path / "m.gguf", "upcycle")
    before, after = (read_gguf_header(tmp_path / f) for f in ("x.gguf", "m.gguf"))
    assert {key: after.metadata[f"general.{key}"] for key in origin} == origin
    names = [name for name in before.metadata if name.startswith("tokenizer.")]
    assert names == [name for name in after.metadata if name.startswith("tokenizer.")]
    for name in names:
        spans = (before.spans[name], after.spans[name])
        raw = [
            (tmp_path / f).read_bytes()[slice(*span)]
            for f, span in zip(("x.gguf", "m.gguf"), spans, strict=True)
        ]
        assert raw[0] == raw[1], name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["model"].update(type="WordPiece"), "only byte-level and SentencePiece"),
        (lambda t: t["pre_tokenizer"].update(pretokenizers=[]), "no name for the way"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "no name for the way"),
    ],
)
def test_a_tokenizer_without_a_form(change, reason, small_model, tmp_path):
    file = byte_level(small_model).write(tmp_path / "x.gguf")
    tmp_path.joinpath("f").mkdir()
    folder = folder_of(file, tmp_path / "f")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with open_checkpoint(folder) as checkpoint:
        keys, found = tokenizer_keys(checkpoint, 512)
    assert [key.value for key in keys] == ["none"]
    assert found is not None
    assert re.search(reason, found)


@needs_gguf
@pytest.mark.parametrize("architecture", [*dense_architectures(), *mixture_architectures()])
def test_names_are_those_of_the_package(architecture):
    import gguf

    for table in (dense_architectures(), mixture_architectures()):
        family = table.get(architecture)
        if family is None:
            continue
        arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture]
        names = gguf.get_tensor_name_map(arch, 3)
        for old, new in family.stems().items():
            full = f"model.layers.2.{new}"
            if not (architecture in ("granitemoe", "lfm2moe") and "_exps" in old):
                # Their converter cuts or renames the experts' matrices before it names them.
                assert names.get_name(full) == f"blk.2.{old}", full
            assert gguf_name(f"{full}.weight", family) == f"blk.2.{old}.weight"
            assert hugging_face_name(f"blk.2.{old}.weight", family) == f"{full}.weight"


def test_types_that_a_file_cannot_have():
    with opened_model("llama_gqa") as model:
        with pytest.raises(UsageError, match="no such element type"):
            plan(model, Pipeline.parse(""), "gguf:llama", dtype=F64)
        with pytest.raises(UsageError, match="only a GGUF file can hold q8_0"):
            plan(model, Pipeline.parse(""), "llama", dtype=Q8_0)


def test_a_folder_with_a_file(tmp_path):
    convert("qwen3_square", "gguf:qwen3moe", tmp_path / "out", "upcycle{experts=2 top-k=2}")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "README.md", "moecc_manifest.json", "moecc_receipt.json"}
    assert verify_manifest(tmp_path / "out") == []
    with opened_model(tmp_path / "out") as back:
        assert back.graph.attrs["family"] == "qwen3_moe"
