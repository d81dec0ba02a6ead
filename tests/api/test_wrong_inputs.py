"""Wrong inputs of the Python API and of the command line, one a row: moecc's own error, always.

A row has what is called, the class of the error or the exit code, and words of the message.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from moecc_passes.upcycle.upcycle import UpcyclePass

import moecc
from moecc.cli.main import main
from moecc.errors import InputError, MoeccError, UnknownName, UnmatchedError, UsageError
from moecc.ir import clone, print_graph

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE = GOLDEN / "llama_gqa"
H100 = "gpu:h100:8"


class NoPath:
    """Says that it is a path, and is none."""

    def __fspath__(self):
        return 3


class NoText:
    """Has no text that could be shown."""

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.fixture(scope="module")
def dense():
    return moecc.open(DENSE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder of a row, with files that are not what they are taken for."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.moe").write_text("moecc 1\ngraph")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPYxx")
    (tmp_path / "bad.toml").write_text("= 3")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.rules").write_text("%%%")
    (tmp_path / "imports.py").write_text("import nowhere_at_all\n")
    (tmp_path / "syntax.py").write_text("def (\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "dense").symlink_to(DENSE)
    graph = clone(moecc.open(DENSE).graph)
    graph.attrs["checkpoint"] = "nowhere"
    (tmp_path / "lost.moe").write_text(print_graph(graph))
    (tmp_path / "classifier").mkdir()
    config = json.loads((DENSE / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(config))
    shutil.copy(DENSE / "model.safetensors", tmp_path / "classifier")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return tmp_path


def closed():
    model = moecc.open(DENSE)
    model.close()
    return model


def preset():
    return moecc.open("preset:smollm2-135m")


def tokens(value):
    return {"tokens": value}


API = {
    "a number to open": (lambda m: moecc.open(3), UsageError, "the source cannot be used"),
    "a path that is a number": (lambda m: moecc.open(NoPath()), UsageError, "the source cannot"),
    "what has no text to open": (lambda m: moecc.open(NoText()), UsageError, "found: NoText"),
    "a name too long to open": (lambda m: moecc.open("a" * 5000), InputError, "too long"),
    "a step that is missing": (lambda m: moecc.load_step("nowhere.bin"), InputError, "nowhere.bin"),
    "a preset that is missing": (lambda m: moecc.open("preset:smolm"), UsageError, "unknown pre"),
    "half a name of the hub": (lambda m: moecc.open("hf:x"), UsageError, "hf://ORG/NAME"),
    "a query for a revision": (lambda m: moecc.open("hf:a/b?c=d"), UsageError, "NAME@REVISION"),
    "a step of what is no run": (lambda m: moecc.open("dense@best"), InputError, "no such file"),
    "weights of a folder": (
        lambda m: moecc.open(DENSE, weights=DENSE), UsageError, "goes with a .moe file",
    ),
    "a negative seed": (lambda m: moecc.open(DENSE, seed=-1), UsageError, "the seed is no whole"),
    "a text as padding": (lambda m: moecc.open(DENSE, padding="no"), UsageError, "True or False"),
    "experts that are no mapping": (
        lambda m: moecc.open(DENSE, experts=["a"]), UsageError, "the experts cannot be used",
    ),
    "experts by a name with =": (
        lambda m: moecc.open(DENSE, experts={"a=b": DENSE}), UsageError, "names of the experts",
    ),
    "experts of a reserved name": (
        lambda m: moecc.open(DENSE, experts={"base": DENSE}), UsageError, "the name of SOURCE",
    ),
    "experts of another family": (
        lambda m: moecc.open(DENSE, experts={"a": GOLDEN / "qwen2_square"}), InputError,
        "different families",
    ),
    "statistics that are missing": (
        lambda m: moecc.open(DENSE, capture="nowhere"), InputError, "not a folder of statistics",
    ),
    "statistics that are needed": (
        lambda m: m.upcycle(experts=4, split="activation"), InputError, "needs statistics",
    ),
    "an option that is misspelt": (lambda m: m.upcycle(expert=4), UsageError, "mean 'experts'"),
    "an option that is no name": (lambda m: m.upcycle(**{"x}": 1}), UsageError, "no option 'x'"),
    "an option of another type": (lambda m: m.upcycle(experts="x"), UsageError, "another type"),
    "no experts": (lambda m: m.upcycle(experts=0), UsageError, "at least two experts"),
    "layers of none": (lambda m: m.upcycle(experts=4, layers=[99]), UnmatchedError, "in layer"),
    "options that contradict": (lambda m: m.upcycle(experts=4, top_k=5), UsageError, "not suit"),
    "a number as pipeline": (lambda m: m.apply(4), UsageError, "the pipeline cannot be used"),
    "a class as pass": (lambda m: m.apply([int]), UsageError, "the pipeline cannot be used"),
    "parentheses": (lambda m: m.apply("upcycle(experts=8)"), UsageError, "options are in braces"),
    "commas": (lambda m: m.apply("upcycle{experts=8,top-k=2}"), UsageError, "by blanks"),
    "braces left open": (lambda m: m.apply("upcycle{experts=8"), UsageError, "end of the text"),
    "a pass that is missing": (lambda m: m.apply("upcicle"), UsageError, "did you mean 'upcycle'"),
    "a text as truth": (lambda m: m.apply("dce", allow_unmatched="no"), UsageError, "allow"),
    "sparse already": (
        lambda m: m.upcycle(experts=4).upcycle(experts=4), UnmatchedError, "it is sparse already",
    ),
    "a type that is missing": (lambda m: m.params(dtype="f31"), UsageError, "did you mean 'f32'"),
    "a type without a text": (lambda m: m.params(dtype=NoText()), UsageError, "unknown element"),
    "a type of files alone": (lambda m: m.function(dtype="q8_0"), UsageError, "unknown element"),
    "a parameter that is missing": (lambda m: m.params()["lm_heat"], UnknownName, "'lm_heat'"),
    "a parameter by number": (lambda m: m.params()[3], UnknownName, "no parameter 3"),
    "parameters of a preset": (lambda m: preset().params(), InputError, "has no weights"),
    "parameters of a closed model": (
        lambda m: dict(closed().params()), InputError, "the checkpoint is closed",
    ),
    "inputs that are no mapping": (lambda m: m.run(3), UsageError, "inputs are arrays by name"),
    "an input by number": (lambda m: m.run({3: 1}), UsageError, "the name of an input"),
    "an input that is misspelt": (lambda m: m.run({"token": [[1]]}), InputError, "did you mean"),
    "lists of other lengths": (lambda m: m.run(tokens([[1, 2], [3]])), UsageError, "equal lengths"),
    "a text as tokens": (lambda m: m.run(tokens("abc")), InputError, "not token ids"),
    "tokens of no word": (lambda m: m.run(tokens([[999]])), InputError, "outside the vocabulary"),
    "a backend that is missing": (lambda m: m.run(backend="tpu"), UsageError, "unknown backend"),
    "a run of a closed model": (lambda m: closed().run(), InputError, "the checkpoint is closed"),
    "texts without a tokenizer": (lambda m: m.generate("a"), InputError, "no tokenizer.json"),
    "an encoder that speaks": (
        lambda m: moecc.open(GOLDEN / "bert_square").generate("a"), InputError, "continues no text",
    ),
    "a machine that is missing": (lambda m: m.plan("gpu:h1000:8"), UsageError, "did you mean"),
    "a number as machine": (lambda m: m.plan(8), UsageError, "a machine is text"),
    "an option of plan misspelt": (lambda m: m.plan(H100, meshh="a=8"), UsageError, "mean 'mesh'"),
    "an option of plan of another type": (
        lambda m: m.plan(H100, batch_tokens="many"), UsageError, "batch_tokens has another type",
    ),
    "a mesh of other devices": (lambda m: m.plan(H100, mesh="data=3"), InputError, "numbers of"),
    "a target that is missing": (lambda m: m.prepare("mixtrall"), UsageError, "unknown target"),
    "a number as target": (lambda m: m.prepare(3), UsageError, "a family is text"),
    "a target that cannot hold it": (
        lambda m: m.upcycle(experts=4, layers="every:2").prepare("mixtral", check=False),
        InputError, "mixtral has an expert layer at every depth",
    ),
    "a number to save to": (lambda m: m.save(3), UsageError, "the folder cannot be used"),
    "a preset to save": (lambda m: preset().save("x"), InputError, "has no weights"),
    "a closed model to save": (lambda m: closed().save("x", to="llama"), InputError, "is closed"),
    "a text that would replace": (
        lambda m: m.save("full", to="llama", force="no"), UsageError, "the option force cannot",
    ),
    "a tolerance of nothing": (lambda m: m.verify(DENSE, tolerance=0), UsageError, "above 0"),
    "another vocabulary": (lambda m: m.verify(GOLDEN / "qwen2_square"), InputError, "different"),
    "nothing to write": (lambda m: moecc.write_params(m, None, "x"), UsageError, "arrays by name"),
    "parameters that are missing": (
        lambda m: moecc.write_params(m, {}, "x"), InputError, "no array is given",
    ),
}  # fmt: skip

UPCYCLE = "upcycle{experts=4}"
SMALL = "plan preset:smollm2-135m --machine gpu:h100:8"

COMMANDS = {
    "inspct dense": (2, "did you mean 'inspect'"),
    "nope": (2, "no such command 'nope'; commands: inspect"),
    "diff a.moe b.moe": (2, "no such command 'diff'; moecc prove A B compares two models"),
    "emit cobol dense -o out": (2, "'cobol' is not one of 'torch', 'jax', 'maxtext'"),
    "--verison": (2, "--version"),
    "inspect": (2, "missing argument 'SOURCE'"),
    "inspect dense --format xml": (2, "'xml' is not one of 'human', 'json'"),
    "inspect dense --json": (2, "--format json"),
    "inspect nowhere": (1, "there is no such file or folder"),
    "inspect file": (1, "this is not a checkpoint"),
    "import dense -o /proc/a.moe": (4, "/proc/a.moe: cannot write the file"),
    "import empty": (1, "the folder has no config.json"),
    "import dense --padding-mask": (1, "a decoder alone takes no mask"),
    "opt dense -p dce": (1, "is a folder, not a graph"),
    "opt lost.moe -p dce --dump-dir file": (1, "is a file, not a folder"),
    "inspect lost.moe": (1, "lost.moe names it in `attr checkpoint`"),
    "opt loost.moe": (1, "did you mean 'lost.moe'?"),
    "opt preset:smollm2-135m": (1, "moecc import MODEL prints the graph"),
    "opt dense/config.json": (1, "moecc import MODEL prints the graph"),
    "opt bad.npy": (1, "moecc import MODEL prints the graph"),
    "opt lost.moe dce": (2, "passes are given by -p"),
    "opt lost.moe -p 'dce;cse'": (2, "passes are separated by commas"),
    "opt lost.moe -p 'dce cse'": (2, "passes are separated by commas"),
    "opt bad.moe -p dce": (1, "expected the name of the graph"),
    "convert dense": (2, "missing argument 'OUT'"),
    "convert dense out -p upcycle{experts=99999999999999999999}": (2, "too large a number"),
    f"convert dense 'a b/c' -p {UPCYCLE}": (1, "a b'"),
    f"convert classifier out -p {UPCYCLE}": (1, "--via torch reads any class of transformers"),
    "convert dense out -p upcycle --seed -1": (2, "not in the range"),
    "convert dense out -p 'upcycle{experts=4 granularity=2 split=index}'": (2, "1, or split=none"),
    "convert dense out --via torch": (2, "needs passes"),
    "generate dense --prompt a --top-p inf": (2, "not a finite number"),
    f"convert dense out -p {UPCYCLE} --to mixtrall": (2, "unknown target"),
    f"convert dense out -p {UPCYCLE} --to gguf:mistral": (2, "mistral is gguf:llama there"),
    f"convert dense out.gguf -p {UPCYCLE} --to mixtral": (2, "--to gguf:llama\n"),
    "convert dense out.gguf -p 'upcycle{experts=4 layers=every:2}'": (1, "the nearest is llama\n"),
    "convert dense out.gguf -p 'upcycle{layers=0}' --to qwen2_moe": (2, "--to gguf:ARCH\n"),
    "convert dense out.gguf -p '' --to llama": (2, "--to gguf:llama\n"),
    "plan dense --machine bad.toml": (1, "not TOML"),
    f"convert dense out -p {UPCYCLE} --to mixtral --dtype f31": (2, "did you mean 'f32'"),
    f"convert dense out -p {UPCYCLE} --to mixtral --max-shard-bytes huge": (2, "number of bytes"),
    f"convert dense file -p {UPCYCLE} --to mixtral": (1, "the output is a file"),
    f"convert dense dense -p {UPCYCLE} --to mixtral": (1, "the output is the input"),
    f"convert dense out -p {UPCYCLE} --to mixtral --load imports.py": (2, "nowhere_at_all"),
    f"convert dense out -p {UPCYCLE} --to mixtral --load syntax.py": (2, "syntax.py"),
    f"convert dense out -p {UPCYCLE} --to mixtral --experts a": (2, "NAME=DIR"),
    f"convert preset:smollm2-135m out -p {UPCYCLE} --to mixtral": (1, "has no weights"),
    "verify dense": (1, "there is no moecc_manifest.json"),
    "verify dense --against dense --tolerance -1": (2, "not in the range"),
    "verify dense --against dense --inputs bad.npy": (1, "not a .npy file"),
    "run dense --outputs out.npz --backend tpu": (2, "unknown backend"),
    "plan preset:smollm2-135m": (2, "missing option '--machine'"),
    f"{SMALL} --mesh data=x": (2, "not a mesh"),
    f"{SMALL} --batch-tokens many": (2, "not a whole number"),
    f"{SMALL} --batch-tokens 7": (1, "not whole sequences"),
    f"{SMALL} --sequence 1,2,3": (1, "another number of sequence lengths"),
    f"{SMALL} --rules bad.rules": (1, "not TOML"),
    f"{SMALL} --save file": (1, "the file exists"),
    "compile preset:smollm2-135m": (2, "no machine is named"),
    "compile preset:smollm2-135m --plan nowhere.json": (1, "no such file"),
    "compile preset:smollm2-135m --plan list.json": (1, "not a JSON object"),
    "train": (2, "not what moecc train takes"),
    "train bad.toml --out out": (1, "not TOML"),
    "train recipe:finetune --out out": (2, "did you mean 'st-moe-finetune'"),
    "train --resume empty": (1, "not the folder of a run"),
    "tokens latin1.txt --tokenizer bytes --out out": (1, "not UTF-8"),
    "tokens file --tokenizer bytes --out out --hold-out 10%": (2, "not a valid number"),
    "evaluate dense --data empty": (1, "not a token folder"),
    "report empty --html out.html": (1, "not the folder of a run"),
    "launch -n 0 -- true": (2, "not in the range"),
    "launch template slurm -- moecc train x": (2, "leave the word moecc out"),
    f"{SMALL} --batch-tokens 99999999999999999999999": (1, "100000000000000000000000 would be"),
    "launch template nope": (2, "not a command of moecc"),
    "forecast dense --tokens 1e9 --pilot dense": (1, "not the folder of a run"),
    "tokens empty full file bad.npy --tokenizer bytes --out out": (1, "--include '*.txt'"),
    "lint nowhere": (2, "neither a pass nor a model"),
    "push dense s3://b/x": (2, "a bucket has two or more"),
    "passes upcicle": (2, "did you mean 'upcycle'"),
    "replay file": (1, "not a reproducer"),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("case", API)
def test_a_wrong_argument_is_moeccs_own_error(dense, case):
    call, kind, words = API[case]
    with pytest.raises(MoeccError) as caught:
        call(dense)
    assert type(caught.value) is kind
    assert words in str(caught.value)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_command_has_an_exit_code_and_a_message(line, place, capsys):
    code, words = COMMANDS[line]
    before = sorted(os.listdir(place))
    assert main(shlex.split(line)) == code
    printed = capsys.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert printed.err.startswith("error: ")
    assert printed.out == ""
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "no array is given"),
        ({"tokens": [[1, 2]]}, "this is no array"),
        ({"tokens": np.arange(8)}, "the array has another number of axes"),
    ],
)
def test_inputs_of_a_function(inputs, words):
    model = moecc.open(DENSE)
    with pytest.raises(InputError, match=words):
        model.function()(dict(model.params()), inputs)


def test_a_model_is_read_from_another_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    sparse = moecc.open("llama_gqa").upcycle(experts=4)
    monkeypatch.chdir(tmp_path)
    assert sparse.opened.name == "llama_gqa"
    assert set(sparse.run()) == {"logits"}
    sparse.save("out", to="mixtral")
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize("experts", [4.0, "4", None])
def test_an_option_of_a_pass_of_another_type(experts):
    with pytest.raises(UsageError, match="an option of upcycle has another type"):
        moecc.open(DENSE).apply(UpcyclePass(experts=experts))
