"""Files that nobody vouches for: a message and an exit code, whatever is in them."""

import json
import os
import shutil

import pytest

from moecc.formats.manifest import MANIFEST_NAME, load, seal

from .conftest import GOLDEN, LLAMA, MOECC, UPCYCLE, edit_json, run_process

# --- companions in a folder of their own


@pytest.mark.parametrize("name", ["LICENSE\n", "LICENSE\x1b[31m", "NOTICE\\x", "LICENSE\udcff"])
def test_what_a_manifest_cannot_name_is_refused(cli, dense, out, name):
    (dense / name).write_text("mine")
    done = cli.convert(dense, out, code=1, says="whose name no manifest allows")
    assert "\x1b" not in done.err
    assert not out.exists()


# --- JSON

LONG = "1" * 5000
JSON = {
    "deep nesting": '{"a":' * 200_000,
    "a long integer": f'{{"model_type": {LONG}}}',
    "half a surrogate": '{"model_type": "\\ud800", "architectures": ["\\udfff"]}',
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
@pytest.mark.parametrize(
    ("command", "name", "frame"),
    [
        ("inspect", "config.json", bytes),
        ("inspect", "model.safetensors.index.json", bytes),
        ("inspect", "model.safetensors", lambda data: len(data).to_bytes(8, "little") + data),
        ("verify", MANIFEST_NAME, seal),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_json_is_refused(cli, tmp_path, command, name, frame, text):
    source = "llama_sharded" if name.endswith("index.json") else "llama_gqa"
    folder = shutil.copytree(GOLDEN / source, tmp_path / "model")
    (folder / name).write_bytes(frame(text.encode()))
    cli(command, folder, code=1, says=name)


def test_what_is_only_copied_is_copied_whatever_it_is(cli, dense, out):
    text = JSON["half a surrogate"]
    (dense / "generation_config.json").write_text(text)
    cli.convert(dense, out)
    assert (out / "generation_config.json").read_text() == text


# --- graphs


def test_locations_of_thousands_of_digits(cli, tmp_path):
    graph = tmp_path / "graph.moe"
    cli("import", GOLDEN / "mixtral_gqa", "-o", graph)
    graph.write_text(graph.read_text().replace("layers.1.", f"layers.{LONG}."))
    cli("inspect", graph, code=(0, 1))
    for pipeline in ("roll-layers", "st-moe{experts=4}", "add-losses"):
        cli("opt", graph, "-p", pipeline, code=(0, 1))


# --- what is not UTF-8

ODD = os.fsdecode(b"caf\xe9")
LOCALES = {
    "UTF-8": {},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "output in ASCII": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
}


def in_locale(locale, *args, code=0):
    return run_process(*MOECC, *args, code=code, **LOCALES[locale])


@pytest.mark.parametrize(
    ("locale", "args"),
    [
        ("UTF-8", ("inspect", ODD)),
        ("ASCII", ("opt", "-", "-p", ODD)),
        ("ASCII", ("inspect", "model", f"--{ODD}")),
    ],
)
def test_arguments_that_are_not_utf8_are_refused(locale, args):
    done = in_locale(locale, *args, code=2)
    assert "error: an argument is not UTF-8" in done.stderr
    assert "caf\\udce9" in done.stderr
    assert done.stdout == ""


def test_artefacts_are_utf8_in_every_locale(tmp_path):
    locale = "output in ASCII"
    out = tmp_path / "\u00fc \U0001f600"
    source = shutil.copytree(LLAMA, tmp_path / "caf\u00e9")
    report = in_locale(locale, "inspect", source, "--format", "json").stdout
    assert json.loads(report)["source"] == str(source)
    graph = in_locale(locale, "import", source).stdout
    assert graph == in_locale("UTF-8", "import", source).stdout
    in_locale(locale, "convert", source, out, "-p", UPCYCLE, "--to", "mixtral")
    assert load(out).source == source.name
    for words in (("--help",), ("passes", "upcycle"), ("inspect", source)):
        in_locale(locale, *words)


def test_names_that_utf8_cannot_say_are_written_as_escapes(dense):
    """A name that was read from a file need not be text, either."""
    edit_json(dense / "config.json", note="\ud800")
    for words in (("inspect", dense, "--format", "json"), ("import", dense)):
        in_locale("UTF-8", *words)
