"""Models emitted as JAX: their text, and what it computes."""

import ast
import sys

import jax
import numpy as np
import pytest
from moecc_backends.jax_source.source import JAX_OPERATIONS, translated, translated_helper
from moecc_backends.torch_source.operations import OPERATIONS

import moecc
from moecc.errors import CheckError, InputError
from moecc.jobs.emit import emit
from moecc.jobs.verify import verify
from tests.emit.cells import METHODS, EmittedCell, program_text
from tests.emit.jax_cells import FILE, flat, judge, program_of
from tests.emit.prove import BOUNDS, is_right
from tests.proof.cells import GOLDEN


@pytest.mark.parametrize(
    ("source", "method"),
    [
        ("llama_gqa", "st-moe in training"), ("whisper_square", "upcycled"),
        ("albert_shared", "st-moe"),  # of which some layers have no parameters of their own
        ("bart_scaled", "dense"),  # whose encoder ends with a layer
        ("gemma4_inputs", "dense"),  # whose last layers read keys of earlier ones
        ("gemma4_experts", "dense"),
        ("gpt_oss_limits", "dense"),  # whose heads have a score that no value belongs to
        ("qwen3_5_text_delta", "dense"),  # whose states go from token to token
        ("gemma3n_streams", "dense"),  # which are one value
        ("modernbert_windows", "dense"),  # whose padding sees nothing
    ],
)  # fmt: skip
def test_program_computes_the_graph(tmp_path, source, method):
    folder = tmp_path / "model"
    EmittedCell(source, method).write(folder, "jax")
    # Every cell is judged in both types by `tests.emit.jax_cells`; compiling is what costs here.
    kinds = tuple(BOUNDS) if source == "llama_gqa" else ("float64",)
    has_gradients = source in ("llama_gqa", "modernbert_windows")
    errors = judge(folder, gradients=has_gradients, kinds=kinds)
    assert is_right(errors), errors
    program = program_of(folder)
    drawn, held = (
        flat(p) for p in (jax.eval_shape(program.init, jax.random.key(0)), program.load(folder))
    )
    assert {n: x.shape for n, x in drawn.items()} == {n: x.shape for n, x in held.items()}
    (folder / "adapter_model.safetensors").write_bytes(b"of another program")
    program.save(jax.tree.map(lambda x: x + 1, program.load(folder)), folder)
    again = flat(program.load(folder))
    assert again.keys() == held.keys()
    assert all(np.array_equal(again[name], x + 1) for name, x in held.items())
    (folder / "adapter_model.safetensors").unlink()
    saved = moecc.open(folder).params()
    assert all(np.array_equal(saved[name], x) for name, x in again.items())
    ends = {kind for name, *_, kind in program.PARAMETERS if name == "model.norm.weight"}
    assert ends <= {"zeros" if "qwen3_5" in source else "ones"}  # its scales are stored less one


def test_text_has_no_torch_and_few_lines():
    text = program_text("llama_gqa", METHODS["upcycled"], "jax")
    imports = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {ast.unparse(n).split()[1].partition(".")[0] for n in imports}
    assert names - set(sys.stdlib_module_names) == {"jax", "numpy"}
    assert "torch" not in text
    assert len(text.splitlines()) <= 320
    assert max(map(len, text.splitlines())) <= 100


def test_noise_is_drawn_in_training_alone():
    pipeline = (
        f"{METHODS['upcycled']},specialize{{mode=train jitter=0.1 dropout=0.1 policy=random}}"
    )
    text = program_text("llama_gqa", pipeline, "jax")
    namespace = {}
    exec(compile(text, "program", "exec"), namespace)
    params = namespace["init"](jax.random.key(0), std=0.5)
    assert set(np.unique(params["model"]["norm"]["weight"])) == {1}
    tokens = np.arange(12).reshape(2, 6)

    @jax.jit
    def logits(key):
        keys = namespace["TrainingKeys"](key)
        return namespace["apply"](params, tokens, training=keys)["logits"]

    first, again, third = (np.asarray(logits(jax.random.key(seed))) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, third)


def test_groups_that_do_not_divide_the_tokens_are_one():
    bounded = METHODS["upcycled"].replace("{", "{slots=capacity groups=2 ")
    plain, losses = (
        program_text("llama_gqa", f"{passes},add-losses", "jax")
        for passes in (METHODS["upcycled"], bounded)
    )
    outputs = []
    for text in (plain, losses):
        namespace = {}
        exec(compile(text, "program", "exec"), namespace)
        params = namespace["init"](jax.random.key(0), std=0.5)
        outputs.append(jax.jit(namespace["apply"])(params, np.arange(3)[None]))
    assert outputs[0]["aux_loss"] == pytest.approx(outputs[1]["aux_loss"])


def test_folder_is_a_source_and_verified(tmp_path):
    model = moecc.open(GOLDEN / "llama_gqa").apply(METHODS["upcycled"])
    written = model.emit("jax", tmp_path / "a")
    assert np.array_equal(written.run()["logits"], model.run()["logits"])
    assert "jax_st_moe.load(" in (tmp_path / "a" / "README.md").read_text()
    (tmp_path / "a" / "moecc_manifest.json").unlink()
    assert verify(str(tmp_path / "a")).data["passed"]
    with (tmp_path / "a" / FILE).open("a") as file:
        file.write("# edited\n")
    with pytest.raises(CheckError, match="not that of the graph"):
        verify(str(tmp_path / "a"))


def test_saved_parameters_take_the_place_of_shards(tmp_path):
    folder = tmp_path / "a"
    emit("jax", str(GOLDEN / "llama_gqa"), output=str(folder), max_shard_bytes="9000")
    shards = list(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    program = program_of(folder)
    params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), program.load(folder))
    program.save(params, folder)
    assert not any(path.exists() for path in (*shards, folder / "model.safetensors.index.json"))
    assert jax.tree.all(jax.tree.map(np.array_equal, program.load(folder), params))
    (folder / "moecc_manifest.json").unlink()
    assert verify(str(folder)).data["passed"]
    head = moecc.open(folder).params()["lm_head.weight"]
    assert np.array_equal(head, np.float32(params["lm_head"]["weight"]))


@pytest.mark.parametrize(("language", "table"), [("torch", OPERATIONS), ("jax", JAX_OPERATIONS)])
def test_operations_without_a_text_are_named(monkeypatch, language, table):
    monkeypatch.delitem(table, "silu")
    with pytest.raises(InputError, match="silu cannot be written as a program") as refusal:
        program_text("llama_gqa", language=language)
    assert refusal.value.problems[0].where == "layers.0.ffn"


def test_words_without_a_translation_are_rejected():
    with pytest.raises(InputError, match=r"torch\.fft\.fft cannot be written in JAX"):
        translated("y = torch.fft.fft(x)")
    with pytest.raises(InputError, match="unfold cannot be written in JAX"):
        translated("y = x.unfold(0, 2, 1)")


def test_statements_without_torch_keep_their_text():
    lines = ["def f(x):", "    # Twice.", "    y = 2 * x  # doubled", "    return y.detach()"]
    text = "\n".join(lines)
    assert translated_helper(text) == text.replace("y.detach()", "jax.lax.stop_gradient(y)")
