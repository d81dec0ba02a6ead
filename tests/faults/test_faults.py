"""The 83 faults of a catalogue of bad inputs: each with what it ends with, and in which words.

A row has a number, a title, the exit code, words of the message, and cases, which all end so.  Rows
with one number are parts of one fault.  What takes processes, a training or another library is
shown by a test elsewhere, and few are not for moecc at all: `ELSEWHERE` and `NOT_OURS` say why.
"""

# ruff: noqa: E501

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moecc.errors import MoeccError
from moecc.types.dtypes import F16

from .place import (
    DOWN,
    GOLDEN,
    ONE,
    SHARDS,
    UPCYCLE,
    Act,
    Allowed,
    Spoilt,
    advised,
    config,
    config_text,
    entry,
    failing,
    folder,
    framed,
    gguf,
    header,
    header_text,
    index,
    index_text,
    make_model,
    mixture,
    named,
    names,
    other_file,
    patched,
    pipeline,
    reader,
    recipe,
    sharded,
    tensors,
    tensors_converted,
    warned,
    weights,
)
from .spoil import (
    aside_and_linked,
    bad_dimensions,
    bare_names,
    by_template,
    fewer_descriptors,
    flipped,
    in_odd_places,
    into_input,
    into_itself,
    large_recipe,
    locked_output,
    missing_extra,
    next_number,
    of_every_type,
    overlapping,
    read_back,
    sparse_index,
    tensor_entry,
    twice,
    with_umask,
)


@dataclass(frozen=True)
class Row:
    """A fault: its number in the catalogue, a title, the exit code, words, and the cases."""

    number: int
    title: str
    code: int
    words: str
    cases: tuple[Act, ...]


def row(number: int, title: str, code: int, words: str, *cases: Act) -> Row:
    """Return a row; `words` are a pattern."""
    return Row(number, title, code, words, cases)


KPROJ = "model.layers.0.self_attn.k_proj.weight"

ROWS = [
    # --- the container
    row(
        1,
        "a file of 0 or 7 bytes",
        1,
        r"too small to have a header[^~]*found: [07] bytes",
        weights(b""),
        weights(b"\1" * 7),
    ),
    row(
        2,
        "a header length that cannot be",
        1,
        "the header is (too long|longer than the file)",
        *(weights(framed(b"{}", length=n)) for n in (2**63, 10**8 + 1, 10**6)),
    ),
    row(
        3,
        "a header that is not plain JSON text",
        1,
        "not UTF-8|not a JSON object|not JSON",
        *(weights(framed(h)) for h in (b'{"\xff":1}', b"\xef\xbb\xbf{}", b"{}\0\0", b" {}")),
    ),
    row(
        4,
        "a header that is no object, too deep or too long",
        1,
        "not a JSON object|not JSON|nested more than|lists too many tensors",
        *(
            weights(framed(h))
            for h in (b"[]", b"{}x", b'{"a":' * 100_000, b"{" + b'"data_offsets"' * (1 << 19))
        ),
    ),
    row(
        5,
        "a tensor twice",
        1,
        f"the key '{DOWN}' appears twice",
        header_text(lambda t: twice(t, DOWN)),
    ),
    row(
        6,
        "a key twice inside an entry",
        1,
        "the key '(dtype|format)' appears twice",
        header_text(lambda t: re.sub('"dtype"', '"dtype": "F32", "dtype"', t, count=1)),
        header_text(lambda t: re.sub('"format"', '"format": "x", "format"', t, count=1)),
    ),
    row(
        7,
        "data that overlap, leave a hole, or trail",
        1,
        "overlap|a hole between|belong to no",
        header(overlapping),
        header(lambda h, d: h.pop(DOWN)),
        header(lambda h, d: d.extend(b"x")),
    ),
    row(
        8,
        "a file that is cut short",
        1,
        r"cut short[^~]*expected: a file of[^~]*fetch the file",
        header(lambda h, d: d.__delitem__(slice(-9, None))),
    ),
    row(
        9,
        "a shape of another size than the data",
        1,
        "contradict each other|too many elements",
        *(entry(shape=s) for s in ([16, 23], [2**62, 2**62], [0, 2**62, 2**62])),
    ),
    row(
        10,
        "sizes and offsets that are no sizes",
        1,
        "not usable|not finite",
        *(entry(shape=[v, 2]) for v in (-1, 1.5, True, "3")),
        entry(data_offsets=[0, 1.0]),
        header_text(lambda t: t.replace("16", "1e400", 1)),
    ),
    row(
        11,
        "an element type that is not read",
        1,
        r"F64, F32, F16, BF16[^~]*(F6_X|F4|F8_E8M0)",
        entry(dtype="F6_X"),
        entry(dtype="F4"),
        entry(dtype="F8_E8M0"),
    ),
    row(12, "element types that are read, bit by bit", 0, "", of_every_type),
    row(
        13,
        "a hostile name of a tensor",
        1,
        "name is empty|65,536 characters|control or invisible|no such tensor|is not a string",
        *(named(n) for n in ("", "a" * 65536, "\x1b[31m", "\u202ex", "../..", "__metadata__")),
    ),
    row(14, "a boolean that is 2", 1, "bytes other than 0 and 1", by_template("BOOL")),
    row(
        15,
        "another kind of file",
        1,
        "a Python pickle|a zip|an HDF5|an HTML page|a Git LFS",
        *(
            weights(b)
            for b in (
                b"\x80\x02}q\0.",
                b"PK\3\4" + bytes(40),
                b"\x89HDF\r\n\x1a\n" + bytes(20),
                b"<!DOCTYPE html><html>404",
                b"version https://git-lfs.github.com/spec/v1\noid",
            )
        ),
    ),
    row(
        16,
        "a file that changes while it is read",
        1,
        "changed while|ends in the middle",
        reader(lambda c, p: os.truncate(p.model / ONE, 100)),
        reader(lambda c, p: os.replace(shutil.copy(p.model / ONE, p.root / "x"), p.model / ONE)),
    ),
    row(17, "a flipped bit in the data", 3, "differ from what moecc wrote", flipped),
    row(
        18,
        "what is no regular file of the folder",
        1,
        "not a regular file|leaves its folder",
        folder(lambda f: ((f / ONE).unlink(), (f / ONE).mkdir())),
        folder(lambda f: ((f / ONE).unlink(), os.mkfifo(f / ONE))),
        folder(lambda f: ((f / ONE).unlink(), (f / ONE).symlink_to("/dev/zero"))),
        folder(aside_and_linked),
    ),
    row(
        19,
        "a file that the system does not read",
        4,
        "cannot read the file",
        patched("os.preadv", failing(OSError(5, "Input/output error")), Spoilt.open),
        patched("os.open", failing(PermissionError(13, "Permission denied")), Spoilt.open),
    ),
    # --- the index and the folder
    row(
        20,
        "an index that leaves the folder",
        1,
        "absolute path|climbs out|is not usable",
        *(
            index(lambda i, w=w: i["weight_map"].update({DOWN: w}))
            for w in (
                "../x.safetensors",
                "/etc/x.safetensors",
                "C:\\x.safetensors",
                "\\\\s\\x.safetensors",
                "a/../b.safetensors",
                "x\0.safetensors",
            )
        ),
    ),
    row(
        21,
        "an index of another kind of file",
        1,
        r"does not end in \.safetensors",
        index(lambda i: i["weight_map"].update({DOWN: "x.bin"})),
        index(lambda i: i["weight_map"].update({DOWN: "x.SafeTensors"})),
    ),
    row(
        22,
        "an index and shards that differ",
        1,
        "is missing|into a shard that lacks it|is in two shards|is not in the index",
        sharded(lambda p: (p.model / SHARDS[1]).unlink()),
        index(lambda i: i["weight_map"].update({DOWN: SHARDS[1]})),
        index(lambda i: i["weight_map"].pop(DOWN)),
        sharded(lambda p: shutil.copy(p.model / SHARDS[0], p.model / SHARDS[1])),
    ),
    row(23, "an index without a total", 0, "", index(lambda i: i.pop("metadata"))),
    row(
        23,
        "an index with a wrong total",
        1,
        "another total size",
        index(lambda i: i["metadata"].update(total_size=7)),
    ),
    row(
        24,
        "an index that is no index",
        1,
        "too large|not JSON|appears twice|is not a string",
        sparse_index,
        index_text("{"),
        index_text('{"weight_map": {"a": 1, "a": 2}}'),
        index(lambda i: i["weight_map"].update({DOWN: 3})),
    ),
    row(
        25,
        "more than one set of weights",
        1,
        "more than one set|Mistral's own layout|only variants|shards that the index does not name",
        other_file(SHARDS[0], ""),
        names("consolidated.safetensors"),
        names("model.fp16.safetensors"),
        sharded(lambda p: p.save({"a": np.zeros(1, "f")}, "model-00003-of-00003.safetensors")),
    ),
    row(26, "pickles alone", 1, "moecc never opens pickles", names("pytorch_model.bin")),
    row(
        27,
        "no checkpoint there",
        1,
        "is empty|not a checkpoint|did you mean 'model'|from the hub",
        folder(lambda f: (shutil.rmtree(f), f.mkdir())),
        lambda p: (p.root / "x").write_text("hello") and p.open(p.root / "x"),
        lambda p: p.open(p.root / "modle"),
        lambda p: p.open(Path("HuggingFaceTB/SmolLM2-135M")),
    ),
    row(
        27,
        "a preset that is mistyped",
        2,
        "did you mean 'smollm2-135m'",
        lambda p: p.open("preset:smolm2-135m"),
    ),
    # --- the config
    row(
        28,
        "a config that is none",
        1,
        "no config.json|not JSON|NaN is not|not a usable size",
        folder(lambda f: (f / "config.json").unlink()),
        config_text("{"),
        config_text('{"model_type": "llama", "rms_norm_eps": NaN}'),
        *(config(hidden_size=v) for v in (-4, "16", 16.5, True)),
        config(num_hidden_layers=10**9),
    ),
    row(
        29,
        "a config of another model",
        1,
        "another shape than config.json says|no tensor of the",
        config(hidden_size=32),
        config(vocab_size=40),
        config(num_hidden_layers=2),
        config(num_key_value_heads=1),
        config(intermediate_size=32),
    ),
    row(
        30,
        "two values for one thing",
        1,
        "is stated twice and differs",
        mixture(lambda t, c: c.update(num_experts=c["num_local_experts"] + 1)),
        config(rope_theta=1e4),
    ),
    row(
        31,
        "a head that is tied and is not",
        1,
        "the two differ|there is no output matrix",
        config(tie_word_embeddings=True),
        tensors(lambda t: t.pop("lm_head.weight")),
    ),
    row(
        32,
        "an unknown family, code, quantised weights",
        1,
        "did you mean 'llama'|its own Python code|said to be quantised",
        config(model_type="lama"),
        config(auto_map={"AutoModel": "x.Y"}),
        *(config(quantization_config={"quant_method": q}) for q in ("gptq", "awq", "fp8")),
    ),
    row(
        33,
        "a source that is sparse already",
        1,
        "it is sparse already",
        pipeline(UPCYCLE, source=GOLDEN / "mixtral_gqa"),
    ),
    row(
        34,
        "a recipe that is none",
        1,
        "did you mean 'source'|Cannot overwrite|another type|nested too deeply|UTF-8|too large",
        recipe('[model]\nsorce = "x"\n'),
        recipe("a = 1\na = 2\n"),
        recipe('[optimizer]\nrate = "1e-3"\n'),
        recipe("a = " + "[" * 9000),
        recipe(b"a = '\xff'"),
        recipe("a = " + "1" * 5000 + "\n" + "b" * 2**20),
        large_recipe,
    ),
    row(
        35,
        "options that contradict each other",
        2,
        "top-k does not suit|whole virtual groups",
        pipeline("upcycle{experts=2 top-k=3}"),
        pipeline("upcycle{experts=4 granularity=5}"),
    ),
    row(
        35,
        "options that do not suit the model",
        1,
        "no feed-forward block to convert in layer 7|no shared expert|does not divide over the mesh",
        pipeline("upcycle{layers=7}"),
        pipeline("upcycle{experts=2 shared=0.5}"),
        pipeline("upcycle{experts=4},annotate-sharding{mesh=expert:3 rules=expert-parallel}"),
    ),
    row(
        36,
        "options that are rarely meant",
        0,
        "router gets no gradient|power of two|no loss|always chosen",
        *(
            advised(t)
            for t in (
                "upcycle{top-k=1}",
                "upcycle{experts=6}",
                "upcycle{router-init=zero}",
                "add-losses{balance-coef=0.0}",
            )
        ),
    ),
    row(
        37,
        "token ids that the model has not",
        0,
        "has no row in the embedding|is no token of",
        warned("tokenizer.json", {"model": {"vocab": {"a": 40}}}),
        warned("generation_config.json", {"eos_token_id": 99}),
    ),
    row(38, "a licence of the source", 0, r"license: other\n[^~]*my-own|LICENSE", read_back),
    # --- the weights
    row(
        39,
        "a weight that is not finite",
        1,
        rf"{DOWN}[^~]*(nan|inf) at \[1, 2\]",
        *(
            tensors_converted(lambda t, v=v: t[DOWN].__setitem__((1, 2), v))
            for v in (np.nan, np.inf)
        ),
    ),
    row(
        40,
        "a value that the type to write has not",
        1,
        r"values overflow f16[^~]*bf16 or f32",
        tensors_converted(lambda t: t[DOWN].__setitem__((1, 2), 1e30), dtype=F16),
    ),
    row(
        40,
        "weights that are zero, equal or tiny",
        0,
        "",
        tensors_converted(lambda t: t[DOWN].fill(0.0)),
        tensors_converted(lambda t: t[DOWN].fill(1e-40)),
    ),
    row(
        41,
        "tensors that are missing, strange and misnamed",
        1,
        r"is missing[^~]*no such tensor|names lack 'model.'|no tensor of the layers 0",
        tensors(lambda t: (t.pop(KPROJ), t.update(extra=np.zeros(3, "f")))),
        tensors(bare_names),
        tensors(lambda t: bare_names(t, "model.language_model.")),
    ),
    row(42, "several types in one model", 0, "", in_odd_places),
    row(
        44,
        "8-bit weights without scales",
        0,
        "8-bit weights without scales",
        by_template("F8_E4M3"),
    ),
    row(
        45,
        "experts that are not all there",
        1,
        r"experts\.\d\.w\d\.weight: this tensor is missing",
        mixture(lambda t, c: t.pop("model.layers.0.block_sparse_moe.experts.3.w3.weight")),
        mixture(lambda t, c: c.update(num_local_experts=5)),
        mixture(next_number),
    ),
    # --- other formats
    row(
        46,
        "a GGUF file that claims what it has not",
        1,
        "ends in the middle|too many (metadata keys|tensors)|wrong number of axes|shape is not usable"
        "|unknown type of a value|beyond the end of the file|overlap|two tensors have this name"
        "|the key appears twice|alignment of the data is not usable|arrays of arrays|not UTF-8"
        "|version of GGUF is not read|is big-endian",
        gguf(
            lambda b: b.raw_key("x", 9, (4).to_bytes(4, "little") + (2**63).to_bytes(8, "little"))
        ),
        gguf(lambda b: b.raw_key("x", 8, (2**63).to_bytes(8, "little"))),
        gguf(lambda b: None, key_count=2**63),
        gguf(lambda b: None, tensor_count=2**63),
        gguf(bad_dimensions),
        gguf(lambda b: tensor_entry(b, (2**62, 2**62))),
        gguf(lambda b: b.raw_key("x", 99, b"")),
        gguf(lambda b: b.tensor("x", (4,), offset=2**40)),
        gguf(lambda b: b.tensor("x", (4,), offset=0)),
        gguf(lambda b: b.tensor("output_norm.weight", (16,))),
        gguf(lambda b: b.key("general.architecture", "string", "llama")),
        *(gguf(lambda b, a=a: b.key("general.alignment", "u32", a)) for a in (0, 3, 2**30)),
        gguf(lambda b: b.raw_key("x", 9, b"\x09\0\0\0\1\0\0\0\0\0\0\0" * 2000)),
        gguf(lambda b: b.key(b"\xff", "u32", 1)),
        *(gguf(lambda b: None, version=v) for v in (1, 99, 3 << 24)),
    ),
    row(
        47,
        "one part of a split GGUF file",
        1,
        r"one of 3 parts[^~]*--merge",
        gguf(lambda b: b.key("split.count", "u16", 3)),
    ),
    row(
        48,
        "blocks that are not read, or not whole",
        1,
        "storage type[^~]*IQ2_XXS|not whole blocks",
        gguf(lambda b: b.tensor("x", (4, 256), 16)),
        gguf(lambda b: b.tensor("x", (4, 33), "Q8_0", bytes(200))),
    ),
    row(
        49,
        "a folder of Orbax",
        1,
        "an Orbax checkpoint|not the metadata of a tree",
        names("0.orbax-checkpoint-tmp/x"),
        names("_METADATA", "d/x"),
        names("manifest.ocdbt"),
        names("_CHECKPOINT_METADATA"),
    ),
    row(
        51,
        "a folder of T5X whose spec is none",
        1,
        "not a msgpack file of T5X",
        names("checkpoint", "target.encoder.wi/.zarray"),
    ),
    row(52, "a file of msgpack", 1, r"flax_model\.msgpack", names("flax_model.msgpack")),
    # --- the process and its surroundings
    row(
        55,
        "a disk that is full before and in the middle",
        4,
        "disk is too small|No space left",
        patched("shutil.disk_usage", lambda p: shutil._ntuple_diskusage(9, 8, 1), Spoilt.convert),
        patched("os.pwrite", failing(OSError(28, "No space left on device")), Spoilt.convert),
    ),
    row(
        56,
        "an output that the system does not take",
        4,
        "Read-only|no right to write",
        patched("os.mkdir", failing(OSError(30, "Read-only file system")), Spoilt.convert),
        patched("os.access", lambda *a: False, Spoilt.convert),
    ),
    row(
        56, "a name that is too long", 1, "too long", lambda p: p.convert(out=p.root / ("a" * 300))
    ),
    row(
        57,
        "too little memory",
        4,
        "not enough memory",
        patched(
            "moecc.weights.evaluate.Evaluator.block",
            failing(MemoryError()),
            lambda p: p.main(
                "convert", p.model, p.root / "out", "-p", UPCYCLE, "--to", "mixtral", "--no-check"
            ),
        ),
    ),
    row(58, "fewer descriptors than shards", 0, "", fewer_descriptors),
    row(
        59,
        "two that write one output",
        1,
        "another conversion is writing this output",
        locked_output,
    ),
    row(
        63,
        "an output that is the input",
        1,
        "the output is (inside )?the input|not empty",
        into_itself,
        into_input,
    ),
    row(64, "files follow the umask", 0, "0o6[04]0", with_umask),
    row(66, "an extra that is not installed", 4, r"pip install '?(moecc|gguf)", missing_extra),
    row(
        68,
        "a name of the Hub that is none",
        2,
        "hf:ORG/NAME@REVISION",
        lambda p: p.open("hf://HuggingFaceTB/SmolLM2-135M@main"),
    ),
]

ELSEWHERE = {
    43: "tests/families/test_graphs.py::test_the_imported_graph_gives_the_golden_logits",
    50: "tests/train/test_state.py::test_what_is_stored_of_a_rolled_program_restores_it",
    53: "tests/kill/test_kills.py::test_every_point",
    54: "tests/cli/test_trust_output.py::test_06_a_signal_leaves_nothing",
    60: "tests/cli/test_resume.py::test_another_conversion_is_not_continued",
    61: "tests/cli/test_resume.py::test_what_was_tampered_with_is_written_again",
    62: "tests/cli/test_hostile.py::test_artefacts_are_utf8_in_every_locale",
    65: "tests/cli/test_commands.py::test_a_closed_pipe_is_quiet",
    67: "tests/cli/test_defects_processes.py::test_21_a_libtpu_that_does_not_fit_jax_is_named",
    69: "tests/launch/test_processes.py::test_killing_one_ends_the_others_within_five_seconds",
    70: "tests/launch/test_processes.py::test_one_that_stops_is_told_and_ends_all",
    71: "tests/launch/test_rendezvous.py::test_a_run_ends_with_a_message_when_the_other_never_comes",
    72: "tests/launch/test_processes.py::test_a_process_with_another_configuration_is_named",
    74: "tests/xla/train/test_step.py::test_a_spike_and_what_is_not_finite_change_nothing_but_counters",
    75: "tests/xla/train/test_micro_batches.py::test_parts_and_meshes_change_no_loss_and_no_gradient",
    76: "tests/train/test_train_command.py::test_a_resumed_run_is_the_run_that_was_not_killed",
    78: "tests/sharding/test_expert_parallel.py::test_devices_compute_what_one_does",
    79: "tests/parity/test_upcycled.py::test_every_source_as_every_target_that_fits",
    80: "tests/families/test_graphs.py::test_fused_experts_are_the_same_model",
    81: "tests/families/test_export.py::test_what_exports_reads_back_and_computes_the_same",
    83: "tests/faults/test_flips.py::test_flipped_bits_are_found",
}
"""Faults that take processes, a training or another library, and the tests that show them."""

NOT_OURS = {
    73: "runs are saved by one process into one folder; a store without a shared disk is Orbax's",
    77: "moecc speaks to no tracker: metrics are lines of a file that others may read",
    82: "moecc writes no HTML; what it writes of hostile names is Markdown (tests/checkpoint)",
}
"""Faults that moecc cannot have, and why."""

IDS = [f"{r.number}-{i}-{r.title.replace(' ', '-')}" for r in ROWS for i in range(len(r.cases))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("whole") / "model"
    make_model(made)
    return made


def ended(act: Act, place: Spoilt, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return exit code and message of a case, as the command line has them."""
    try:
        act(place)
    except MoeccError as error:
        return error.exit_code, str(error)
    except Allowed as said:
        return 0, str(said)
    except SystemExit as error:
        return int(error.code or 0), capsys.readouterr().err
    return 0, ""


@pytest.mark.parametrize(("found", "act"), [(r, act) for r in ROWS for act in r.cases], ids=IDS)
def test_faults(
    found: Row, act: Act, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "model")
    code, text = ended(act, Spoilt(tmp_path), capsys)
    assert (code, bool(re.search(found.words, text))) == (found.code, True), text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    left = {p.name for p in tmp_path.iterdir() if "moecc" in p.name or p.name == "out"}
    assert not left or found.code in (0, 3)


def test_every_fault_has_a_row() -> None:
    numbers = {r.number for r in ROWS} | set(ELSEWHERE) | set(NOT_OURS)
    assert numbers == set(range(1, 84))
    assert len(NOT_OURS) <= 6
    counts = Counter([*{r.number for r in ROWS}, *ELSEWHERE, *NOT_OURS])
    assert max(counts.values()) == 1


@pytest.mark.parametrize("name", ELSEWHERE.values())
def test_what_is_shown_elsewhere_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    text = (Path(__file__).parents[2] / file).read_text("utf-8")
    assert re.search(rf"^def {function}\(", text, re.MULTILINE)
