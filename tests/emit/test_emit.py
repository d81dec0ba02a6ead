"""Models emitted as PyTorch: their text, and what transformers computes with them."""

import ast
import json
import os
import re
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from moecc_backends.torch_source.names import identifier
from moecc_backends.torch_source.operations import OPERATIONS
from moecc_backends.torch_source.text import literal

import moecc
from moecc.backend import emit_program
from moecc.errors import CheckError, InputError, MoeccError
from moecc.formats.folder import open_folder
from moecc.ir.operation import OPS
from moecc.ir.text import parse, print_graph
from moecc.jobs.convert import convert
from moecc.jobs.emit import emit
from moecc.jobs.verify import verify
from tests.emit import fuzz, snapshot
from tests.emit.cells import METHODS, SAMPLE, EmittedCell, graph_of, program_text
from tests.emit.prove import is_proved, prove
from tests.parity.interpreters import in_each_interpreter, interpreters

GOLDEN = Path("tests/golden")
FILE = "modeling_st_moe.py"
UPCYCLE = METHODS["upcycled"]


def imported_packages(text):
    nodes = list(ast.walk(ast.parse(text)))
    modules = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    modules += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return {module.partition(".")[0] for module in modules if module}


def test_text_has_two_imports_and_the_named_classes():
    text = program_text("llama_gqa", UPCYCLE)
    assert imported_packages(text) - set(sys.stdlib_module_names) == {"torch", "transformers"}
    classes = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}
    assert {"Attention", "Router", "Experts", "Layer", "StMoeForCausalLM"} <= classes.keys()
    methods = [n for n in classes["Experts"].body if isinstance(n, ast.FunctionDef)]
    (forward,) = (n for n in methods if n.name == "forward")
    names = [argument.arg for argument in forward.args.args]
    assert names == ["self", "hidden_states", "top_k_index", "top_k_weights"]


@pytest.mark.parametrize(
    ("source", "pipeline", "most"),
    [("llama_gqa", "", 250), ("t5_gated_untied", METHODS["st-moe"], 450), ("vit_square", "", 200)],
)
def test_text_is_short_and_narrow(source, pipeline, most):
    lines = program_text(source, pipeline).splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= 100


def test_depth_adds_no_lines():
    graph = moecc.open("preset:smollm2-135m").graph
    (text,) = emit_program(graph, "torch").files.values()
    most = len(program_text("llama_gqa").splitlines()) + 10  # its names are longer
    assert len(text.splitlines()) <= most


def test_text_is_a_function_of_the_graph():
    assert program_text("llama_gqa", UPCYCLE) == program_text("llama_gqa", UPCYCLE)
    snapshots = json.loads(snapshot.FILE.read_text())
    assert snapshot.digests() == snapshots, "run: python -m tests.emit.snapshot"


def names_in(node, kind):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}


def hidden_by_loops(function):
    """Return the names that a loop gives to other values, though what they were is read later."""
    hidden = set()
    earlier = {argument.arg for argument in function.args.args}
    for at, statement in enumerate(function.body):
        if isinstance(statement, ast.For):
            assigned = names_in(statement.target, ast.Store)
            carried = set()
            for inner in statement.body:
                carried |= names_in(inner, ast.Load) - assigned
                assigned |= names_in(inner, ast.Store)
            read, rebound = set(), set()
            for later in function.body[at + 1 :]:
                read |= names_in(later, ast.Load) - rebound
                rebound |= names_in(later, ast.Store)
            hidden |= (assigned - carried) & earlier & read
        earlier |= names_in(statement, ast.Store)
    return hidden


@pytest.mark.parametrize(
    "source", ["gemma4_inputs", "gemma3_local", "t5_gated_untied", "bart_scaled"]
)
def test_no_loop_over_layers_hides_what_is_read_after_it(source):
    text = program_text(source, METHODS["st-moe in training"])
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert any(isinstance(s, ast.For) for f in functions for s in f.body)
    assert [(f.name, hidden_by_loops(f)) for f in functions if hidden_by_loops(f)] == []


def test_emitted_folder_is_a_source(tmp_path):
    folder, again = tmp_path / "a", tmp_path / "b"
    convert(str(GOLDEN / "llama_gqa"), str(folder), pipeline=UPCYCLE, to="st_moe", emit="torch")
    emit("torch", str(folder), output=str(again))
    assert (folder / FILE).read_bytes() == (again / FILE).read_bytes()
    expected = moecc.open(GOLDEN / "llama_gqa").apply(UPCYCLE).run()["logits"]
    assert np.array_equal(moecc.open(folder).run()["logits"], expected)
    (folder / "moecc_manifest.json").unlink()
    report = verify(str(folder))
    assert report.data["passed"]
    assert "not checked: their values" in report.text()
    assert f"verify {folder} --against SOURCE" in report.text()
    with (folder / FILE).open("a") as file:
        file.write("# edited\n")
    with pytest.raises(CheckError, match="not that of the graph"):
        verify(str(folder))


def test_verify_compares_the_classes_that_are_mapped(tmp_path):
    emit("torch", str(GOLDEN / "llama_gqa"), output=str(tmp_path / "a"))
    (tmp_path / "a" / "moecc_manifest.json").unlink()
    path = tmp_path / "a" / "config.json"
    path.write_text(
        path.read_text().replace(
            '"modeling_st_moe.StMoeModel"', '"configuration_st_moe.StMoeModel"'
        )
    )
    with pytest.raises(CheckError, match="auto_map"):
        verify(str(tmp_path / "a"))


def test_verify_rejects_other_code_beside_the_program(tmp_path):
    emit("torch", str(GOLDEN / "llama_gqa"), output=str(tmp_path / "a"))
    (tmp_path / "a" / "moecc_manifest.json").unlink()  # which names all files
    (tmp_path / "a" / "tokenization.py").write_text("import os\n")
    with pytest.raises(CheckError, match="no part of the program"):
        verify(str(tmp_path / "a"))


def test_card_says_what_loading_runs(tmp_path):
    emit("torch", str(GOLDEN / "t5_gated_untied"), output=str(tmp_path / "a"))
    card = (tmp_path / "a" / "README.md").read_text()
    assert 'AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto", trust_remote_code' in card
    assert "`trust_remote_code=True` runs `modeling_st_moe.py`" in card
    assert "No engine" not in card
    assert "okenizer" not in card, "there is none"


def test_config_has_the_longest_text(tmp_path):
    emit("torch", str(GOLDEN / "llama_gqa"), output=str(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert moecc.open(tmp_path / "a").run()["logits"].ndim == 3


@pytest.mark.parametrize("language", ["torch", "jax"])
def test_what_nothing_reads_is_not_written(language):
    text = program_text("llama_gqa", f"{UPCYCLE},add-losses", language)
    assert "assign_slots" not in text
    assert "def each" not in text
    assert "def each" in program_text("gpt_oss_limits", language=language)  # experts have biases


def test_config_has_the_token_that_a_decoder_begins_with(tmp_path):
    emit("torch", str(GOLDEN / "umt5_square_untied"), output=str(tmp_path / "a"))
    source, emitted = (
        json.loads((folder / "config.json").read_text())["decoder_start_token_id"]
        for folder in (GOLDEN / "umt5_square_untied", tmp_path / "a")
    )
    assert emitted == source


def test_other_targets_have_no_program(tmp_path):
    with pytest.raises(MoeccError, match="a program is written for st_moe"):
        convert(str(GOLDEN / "llama_gqa"), str(tmp_path / "a"), to="llama", emit="torch")
    with pytest.raises(MoeccError, match="no program is written in 'fortran'"):
        emit("fortran", str(GOLDEN / "llama_gqa"), output=str(tmp_path / "a"))


def test_every_operation_is_written_or_named():
    # The table itself rejects a function that takes other attributes than its operation.
    missing = {name for name, op in OPS.items() if name not in OPERATIONS and not op.collective}
    drawn = {"random_uniform", "random_normal", "fold_key"}
    assert missing == drawn | {"index", "jax", "scan", "within_buffer", "update_slice"}


def test_losses_of_routers_are_added_to_that_of_the_head():
    text = program_text("llama_gqa", f"{UPCYCLE},add-losses{{output-z-coef=0.01}}")
    head = text[text.index("class StMoeForCausalLM") :]
    assert "output_z_loss = torch.square(logits.logsumexp(-1)).mean()" in head
    assert re.search(r"aux_loss = .* \+ output_z_loss \* 0\.01\n", head)
    assert "loss = loss + aux_loss * batch_share(labels, **kwargs)" in head
    encoder = program_text("bert_square", f"{UPCYCLE},add-losses")
    heads = encoder[encoder.index("class StMoeForSequenceClassification") :]
    assert heads.count("accepts_loss_kwargs = False") == heads.count("class ")


def test_padding_is_rejected_where_scores_are_read():
    text = program_text("llama_gqa", f"{UPCYCLE},add-losses{{attention-z-coef=0.01}}")
    assert 'raise ValueError("this model has no padding mask")' in text


def test_the_vocabulary_is_that_of_the_config():
    text = program_text("gemma4_inputs")  # with a table of tokens for each layer, which stays
    assert re.findall(r"nn\.Embedding\((.*), 16\)", text) == ["config.vocab_size"]
    assert "nn.Linear(16, config.vocab_size, bias=False)" in program_text("llama_gqa")


def test_numbers_in_formulas_of_tensors_are_tensors():
    text = program_text("apertus_biases")
    assert "torch.logaddexp(alpha_p, torch.full_like(alpha_p, 0.0))" in text
    assert text.count("class FeedForward") == 1  # names of layers are no names of values


def test_a_decoder_reads_the_padding_of_its_encoder():
    graph = graph_of("bart_scaled")  # with a mask that both read
    (text,) = emit_program(graph, "torch").files.values()
    assert text.count("attention_mask[:, None, None]") == 2
    # A flag for one query would have it see the first key alone, in transformers 4.
    assert "is_causal=self.is_causal and query.shape[2] > 1" in text


def test_noise_is_written_or_rejected():
    noise = "specialize{mode=train jitter=0.01 dropout=0.1 policy=random}"
    text = program_text("llama_gqa", f"{UPCYCLE},{noise}")
    assert "jitter(" in text
    assert "F.dropout(" in text
    assert "keep_random(top_k_weights, 0.2) if self.training else None" in text


# Names and numbers of a graph are data: whatever they are, the text has the same shape.

HOSTILE = [
    "a.__class__.b", "import os", 'x"""', "x'; import os; '", "\\", "\n", "self", "class", "None",
    "forward", "{0}", "%s", "weight", "é", "a" * 200, "__import__", "0", "-1", "training",
]  # fmt: skip


def test_identifiers_are_identifiers():
    rng = np.random.default_rng(0)
    drawn = ["".join(rng.choice(list(string.printable), 12)) for _ in range(2000)]
    for text in (*HOSTILE, *drawn):
        assert re.fullmatch(r"[A-Za-z_]\w*", identifier(text), re.ASCII)


def test_literals_are_what_they_say():
    rng = np.random.default_rng(0)
    values = [0.1, -1e300, 3, True, None, (1,), (1, 2.5), *HOSTILE]
    values += [float(x) for x in rng.standard_normal(200)]
    for value in values:
        assert ast.literal_eval(literal(value)) == value
    with pytest.raises(InputError):
        literal([1])


def test_hostile_graphs_have_the_tree_of_the_plain_one():
    written, faults = fuzz.run(40)
    assert written >= 30
    assert faults == []


def test_long_names_are_cut():
    graph = moecc.open(str(GOLDEN / "llama_gqa")).upcycle(experts=4, top_k=2).graph
    for node in list(graph):
        for number, value in enumerate(node.results):
            value.name = f"{'a' * 150}_{number}_{id(value)}"
    (program,) = emit_program(graph, "torch").files.values()
    assert max(map(len, program.splitlines())) <= 100


@pytest.mark.parametrize("language", ["torch", "jax"])
def test_no_value_has_the_name_of_a_function(language):
    graph = moecc.open(str(GOLDEN / "llama_gqa")).upcycle(experts=4, top_k=2).graph
    for value in [value for node in graph for value in node.results]:
        name = "top_k_experts" if "expert" in value.type else "rotary_tables"
        value.name = f"{name}.{id(value)}"
    (program,) = emit_program(graph, language).files.values()
    tree = ast.parse(program)
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    nodes = ast.walk(tree)
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert functions & stored == set()


@pytest.mark.parametrize(
    "line", ["eval('1')", "import os", "x = print", "torch.load('x')", "def eval(x): pass", "y: 0"]
)
def test_fuzzing_sees_what_is_added(line):
    plain = fuzz.emitted(fuzz.PLAIN)
    assert fuzz.shape(f"{plain}{line}\n") != fuzz.shape(plain)
    inside = plain.replace("        n = ", f"        {line}\n        n = ")
    assert fuzz.shape(inside) != fuzz.shape(plain)


@pytest.mark.parametrize("code", ["eval", "a.b", "torch", "é"])
def test_fuzzing_sees_what_is_no_variable(code):
    plain = fuzz.emitted(fuzz.PLAIN)
    hostile = re.sub(r"\bu\b", code, plain)
    try:
        assert fuzz.shape(hostile) != fuzz.shape(plain)
    except ValueError as error:
        assert "no name" in str(error)  # noqa: PT017


@pytest.mark.parity
@pytest.mark.skipif(not interpreters(), reason="MOECC_PARITY_PYTHON names no transformers")
def test_cells_are_right(tmp_path):
    rows = list(prove((EmittedCell(*cell) for cell in SAMPLE), tmp_path, {}))
    assert [row for row in rows if "refused" in row or not is_proved(row)] == []


@pytest.mark.parity
@pytest.mark.parametrize(
    ("source", "task", "shape"),
    [
        ("bert_square", "SequenceClassification", [2, 3]),
        ("bert_square", "TokenClassification", [2, 6, 3]),
        ("vit_square", "ImageClassification", [2, 3]),
    ],
)
@in_each_interpreter
def test_a_new_head_is_trained_and_its_encoder_read_back(python, tmp_path, source, task, shape):
    folder, out = tmp_path / "a", tmp_path / "b"
    passes = f"{UPCYCLE},add-losses"
    convert(str(GOLDEN / source), str(folder), pipeline=passes, to="st_moe", emit="torch")
    pixels = [a.size for a in next(iter(moecc.open(folder).graph.inputs.values())).type.axes[1:]]
    script = str(Path(__file__).parent / "train_head.py")
    done = subprocess.run(
        [python, "-W", "ignore", script, str(folder), task, str(out)], text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": "", "PIXELS": str(pixels)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert verdict["losses"][-1] < verdict["losses"][0]
    assert verdict["shape"] == shape
    assert verdict["aux_loss"] > 0
    assert verdict["base"] == "StMoeModel"
    trained = moecc.open(out)
    assert "hidden" in trained.run()
    before = moecc.open(folder).params()
    assert any(not np.array_equal(x, before[name]) for name, x in trained.params().items())
    with open_folder(out) as checkpoint:
        assert checkpoint.moments.count == 3
        names = {name for name in checkpoint.tensors if ".pooler." not in name}  # no task reads it
        assert {*checkpoint.moments.of["m"]} == names


HEADS = [
    "BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "MPNetForMaskedLM",
    "BertForSequenceClassification", "RobertaForSequenceClassification",
    "DistilBertForSequenceClassification", "XLMRobertaForTokenClassification", "BertModel",
    "ElectraForMaskedLM", "ElectraForSequenceClassification", "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification", "DebertaV2ForMaskedLM",
    "DebertaV2ForSequenceClassification", "DebertaV2ForTokenClassification",
    "ViTForImageClassification", "Dinov2ForImageClassification", "SwinForImageClassification",
    "WhisperForAudioClassification", "Wav2Vec2ForCTC", "HubertForCTC",
    "Wav2Vec2ForSequenceClassification",
]  # fmt: skip


@pytest.mark.parity
@in_each_interpreter
def test_heads_of_checkpoints_are_kept(python, tmp_path):
    script = str(Path(__file__).parent / "kept_head.py")

    def asked(*words):
        command = [python, "-W", "ignore", script, *words, str(tmp_path), *HEADS]
        done = subprocess.run(
            command, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    asked("write")
    for name in HEADS:
        emit("torch", str(tmp_path / name), output=str(tmp_path / f"{name}.program"))
    verdicts = list(map(json.loads, asked("compare").splitlines()))
    assert len(verdicts) == len(HEADS)
    for verdict in verdicts:
        assert verdict.pop("keys") == [], verdict
        assert len(verdict) == (3 if verdict["name"] == "BertModel" else 5)
        del verdict["name"]
        assert all(x < (1e-5 if "32" in key else 1e-10) for key, x in verdict.items()), verdict


@pytest.mark.parametrize("source", ["lfm2_biases", "qwen3_5_text_delta"])
def test_short_convolutions_keep_nothing_and_take_no_padding(source):
    text = program_text(source)
    assert "use_cache=False" in text
    assert 'raise ValueError("this model has no padding mask")' in text
    assert "DynamicCache" not in text


def test_layers_read_what_they_share_and_have_routers_of_their_own():
    text = program_text("albert_shared", UPCYCLE)
    assert (
        "for layer in self.layers:\n            hidden_states = layer(hidden_states, shared)"
        in text
    )
    assert len(re.findall(r"= Router\(config\)", text)) == 1
    assert "shared.experts(attention_output, top_k_index, top_k_weights)" in text


@pytest.mark.parametrize("word", ["scope", "st_moe_model", "expert_rows"])
def test_no_class_has_the_name_of_another(word):
    graph = moecc.open(str(GOLDEN / "llama_gqa")).upcycle(experts=4, top_k=2).graph
    text = print_graph(graph).replace(".attention", f".{word}")
    (program,) = emit_program(parse(text), "torch").files.values()
    names = re.findall(r"^class (\w+)", program, re.MULTILINE)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("is_tied", [False, True])
def test_names_without_a_shared_path_are_those_of_the_file(is_tied):
    text = print_graph(moecc.open(str(GOLDEN / "llama_gqa")).graph).replace("%model.", "%")
    if is_tied:  # a head that reads the table of the model without its head
        text = re.sub(r"\n  param %lm_head\.weight [^\n]*", "", text)
        text = text.replace("%lm_head.weight", "%embed_tokens.weight")
    (program,) = emit_program(parse(text), "torch").files.values()
    assert "class StMoeForCausalLM(StMoeModel, GenerationMixin)" in program
    assert 'base_model_prefix = ""' in program
    assert "self.model" not in program
    assert program.count("nn.Embedding(") == 1
    assert ("self.lm_head = " in program) != is_tied


def test_layers_of_other_paths_are_other_loops():
    text = print_graph(moecc.open(str(GOLDEN / "llama_gqa")).graph)
    text = text.replace("%model.layers.0.input_layernorm.weight", "%first")
    (program,) = emit_program(parse(text), "torch").files.values()
    assert re.findall("for layer in (.*):", program) == ["self.layers", "self.model.layers"]


def test_a_table_that_is_no_module_is_told():
    text = print_graph(moecc.open(str(GOLDEN / "llama_gqa")).graph)
    text = text.replace("%model.embed_tokens.weight", "%table")
    with pytest.raises(InputError, match=r"ends in \.weight"):
        emit_program(parse(text), "torch")


def test_a_graph_by_hand_is_written_if_its_names_are_those_of_modules():
    text = Path("examples/squid.moe").read_text()
    (program,) = emit_program(parse(text), "torch").files.values()
    assert "logits = F.linear(hidden_states, self.wte.weight)" in program
    with pytest.raises(InputError, match=r"as layers\.0\.up"):
        emit_program(parse(text.replace("%layers.0.up", "%up")), "torch")
