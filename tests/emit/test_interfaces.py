"""What servers, trainers and several devices ask of an emitted model."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.emit.cells import METHODS, EmittedCell, program_text
from tests.parity.interpreters import in_each_interpreter, interpreters


def asked(command):
    """Return what a script prints as JSON, in an environment without moecc."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("source", "is_plain"),
    [("llama_gqa", True), ("gemma2_caps", False), ("mistral_window", False),
     ("t5_gated_untied", False)],
)  # fmt: skip
def test_kernels_are_offered_where_they_see_all_of_attention(source, is_plain):
    text = program_text(source)
    assert ("_supports_flash_attn = True\n" in text) == is_plain
    assert ("_supports_attention_backend = True\n" in text) == is_plain
    # vLLM reads in the source which function the module looks up, and its scale.
    look_up = (
        r"(\w+) = ALL_ATTENTION_FUNCTIONS\[.*\n.* = \1\(self, .*scaling=([\d.]+|self\.\w+)[,)]"
    )
    assert bool(re.search(look_up, text)) >= is_plain


def plan_of(text):
    return dict(re.findall(r'"(layers\.\*[\w.]+|embed_tokens)": "(\w+)"', text))


def ep_plan_of(text):
    return plan_of(text[text.index("base_model_ep_plan") :])


def test_plans_follow_the_axes():
    text = program_text("qwen3_square", METHODS["upcycled"])
    plan = plan_of(text[: text.index("base_model_ep_plan")])
    assert plan["layers.*.self_attn.q_proj"] == "colwise"
    assert plan["layers.*.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert plan["layers.*.mlp.down_proj.weight"] == "rowwise"
    assert plan["layers.*.mlp"] == "moe_tp_experts"
    plan = ep_plan_of(text)
    assert plan["layers.*.mlp.down_proj.weight"] == "grouped_gemm"
    assert list(plan.items())[-1] == ("layers.*.mlp", "ep_dispatch_experts")  # parameters first
    assert plan_of(program_text("granite_square_tied"))["embed_tokens"] == "replicate"


@pytest.mark.parametrize("source", ["olmo2_gqa", "t5_gated_untied"])
def test_there_is_no_plan_where_a_part_of_the_heads_does_not_do(source):
    assert "base_model_tp_plan" not in program_text(source)


@pytest.mark.parity
@pytest.mark.parametrize(
    "cell",
    [("qwen3_square", "upcycled"), ("t5_gated_untied", "st-moe"), ("gemma2_caps", "shared")],
)
@in_each_interpreter
def test_caches_graphs_and_losses_are_as_transformers_has_them(tmp_path, python, cell):
    EmittedCell(*cell).write(tmp_path / "model")
    script = Path(__file__).parent / "interface.py"
    verdict = asked([python, str(script), str(tmp_path / "model")])
    assert set(verdict.values()) == {True}, verdict


LOSSES = """
import json, sys, torch, transformers
name = sys.argv[2]
load = getattr(transformers, f"AutoModelFor{name}").from_pretrained
model = load(sys.argv[1], trust_remote_code=True, dtype=torch.float64).train()
tokens, mask = torch.arange(24).reshape(2, 12) % 16, torch.ones(2, 12, dtype=torch.long)
mask[0, 7:] = 0
def run(tokens, mask, **options):
    if name != "CausalLM":
        return model(tokens, decoder_input_ids=tokens, decoder_attention_mask=mask,
                     attention_mask=mask, labels=tokens)
    return model(tokens, attention_mask=mask, labels=tokens, **options)
other = torch.where(mask == 1, tokens, 5)
verdict = {"padding": torch.allclose(run(tokens, mask).aux_loss, run(other, mask).aux_loss),
           "tokens": not torch.allclose(run(tokens, None).aux_loss, run(other, None).aux_loss)}
if name == "CausalLM":  # Trainer states the labels of all accumulated batches
    half = run(tokens, mask, num_items_in_batch=torch.tensor(44)).loss
    verdict["share"] = torch.allclose(2 * half, run(tokens, mask).loss)
print(json.dumps(verdict))
"""


@pytest.mark.parity
@pytest.mark.parametrize(
    ("source", "task"), [("llama_gqa", "CausalLM"), ("t5_gated_untied", "Seq2SeqLM")]
)
@in_each_interpreter
def test_losses_of_routers_count_no_padding_and_are_shares(tmp_path, python, source, task):
    passes = f"{METHODS['upcycled']},add-losses,specialize{{mode=train padding-mask=true}}"
    EmittedCell(source, "padding", passes).write(tmp_path / "model")
    verdict = asked([python, "-W", "ignore", "-c", LOSSES, str(tmp_path / "model"), task])
    assert set(verdict.values()) == {True}, verdict


@pytest.mark.parametrize(
    ("source", "argument"),
    [("llama_gqa", "attention_mask"), ("t5_gated_untied", "decoder_attention_mask")],
)
def test_routers_of_a_decoder_read_the_padding_of_its_tokens(source, argument):
    text = program_text(source, f"{METHODS['upcycled']},specialize{{padding-mask=true}}")
    assert f"token_mask = mask_of_tokens(inputs_embeds, {argument})" in text
    assert "decoder_mask)" not in text[text.index("class StMoeConfig") :]


@pytest.mark.parity
@pytest.mark.skipif(not interpreters(), reason="MOECC_PARITY_PYTHON names no transformers")
@pytest.mark.parametrize(
    ("source", "method", "shared"),
    [
        ("qwen3_square", "upcycled", "neurons"), ("granite_square_tied", "dense", "neurons"),
        ("qwen3_square", "upcycled", "experts"),
    ],
)  # fmt: skip
def test_two_processes_compute_the_same(tmp_path, source, method, shared):
    EmittedCell(source, method).write(tmp_path / "model")
    python = next(p for p in interpreters() if asked([p, "-c", VERSION])["major"] >= 5)
    script = Path(__file__).parent / "parallel.py"
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    verdict = asked([*launch, str(script), str(tmp_path / "model"), shared])
    assert verdict["sharded"] > 10
    assert max(verdict["logits"], verdict["gradient"]) < 1e-12


VERSION = (
    "import json, transformers; print(json.dumps({'major': int(transformers.__version__[0])}))"
)
