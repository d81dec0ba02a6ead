"""Files that nobody vouches for: a message and an exit code, whatever is in them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moecc.formats.manifest import MANIFEST_NAME, load, seal

GOLDEN = Path(__file__).parent.parent / "golden"
UPCYCLE = "upcycle{experts=4 top-k=2}"


def convert(moecc, source, out):
    return moecc("convert", source, out, "-p", UPCYCLE, "--to", "mixtral")


# --- companions in a folder of their own


@pytest.mark.parametrize("name", ["LICENSE\n", "LICENSE\x1b[31m", "NOTICE\\x", "LICENSE\udcff"])
def test_what_a_manifest_cannot_name_is_refused(moecc, dense, tmp_path, name):
    (dense / name).write_text("mine")
    done = convert(moecc, dense, tmp_path / "out")
    assert done.code == 1
    assert "whose name no manifest allows" in done.err
    assert "\x1b" not in done.err
    assert not (tmp_path / "out").exists()


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
def test_hostile_json_is_refused(moecc, tmp_path, command, name, frame, text):
    folder = tmp_path / "model"
    source = "llama_sharded" if name.endswith("index.json") else "llama_gqa"
    shutil.copytree(GOLDEN / source, folder)
    (folder / name).write_bytes(frame(text.encode()))
    done = moecc(command, folder)
    assert done.code == 1, done.err
    assert name in done.err


def test_what_is_only_copied_is_copied_whatever_it_is(moecc, dense, tmp_path):
    text = JSON["half a surrogate"]
    (dense / "generation_config.json").write_text(text)
    assert convert(moecc, dense, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


# --- graphs


def test_locations_of_thousands_of_digits(moecc, tmp_path):
    graph = tmp_path / "graph.moe"
    assert moecc("import", GOLDEN / "mixtral_gqa", "-o", graph).code == 0
    graph.write_text(graph.read_text().replace("layers.1.", f"layers.{LONG}."))
    assert moecc("inspect", graph).code in (0, 1)
    for pipeline in ("roll-layers", "st-moe{experts=4}", "add-losses"):
        assert moecc("opt", graph, "-p", pipeline).code in (0, 1)


# --- what is not UTF-8

ODD = os.fsdecode(b"caf\xe9")
LOCALES = {
    "UTF-8": {},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "output in ASCII": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
}


def in_locale(locale, *args):
    done = subprocess.run(
        [sys.executable, "-m", "moecc", *args],
        env={**os.environ, **LOCALES[locale]},
        capture_output=True,
        timeout=120,
    )
    assert b"Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("locale", "args"),
    [
        ("UTF-8", ("inspect", ODD)),
        ("ASCII", ("opt", "-", "-p", ODD)),
        ("ASCII", ("inspect", "model", f"--{ODD}")),
    ],
)
def test_arguments_that_are_not_utf8_are_refused(locale, args):
    done = in_locale(locale, *args)
    assert done.returncode == 2
    assert b"error: an argument is not UTF-8" in done.stderr
    assert b"caf\\udce9" in done.stderr
    assert done.stdout == b""


def test_artefacts_are_utf8_in_every_locale(tmp_path):
    locale = "output in ASCII"
    source, out = tmp_path / "caf\u00e9", tmp_path / "\u00fc \U0001f600"
    shutil.copytree(GOLDEN / "llama_gqa", source)
    found = in_locale(locale, "inspect", source, "--format", "json")
    assert found.returncode == 0
    assert json.loads(found.stdout.decode())["source"] == str(source)
    graph = in_locale(locale, "import", source)
    assert graph.returncode == 0
    assert graph.stdout.decode() == in_locale("UTF-8", "import", source).stdout.decode()
    done = in_locale(locale, "convert", source, out, "-p", UPCYCLE, "--to", "mixtral")
    assert done.returncode == 0, done.stderr
    assert load(out).source == source.name
    for words in (("--help",), ("passes", "upcycle"), ("inspect", source)):
        assert in_locale(locale, *words).returncode == 0


def test_names_that_utf8_cannot_say_are_written_as_escapes(tmp_path):
    """A name that was read from a file need not be text, either."""
    source = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama_gqa", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "note": "\ud800"}))
    for words in (("inspect", source, "--format", "json"), ("import", source)):
        done = in_locale("UTF-8", *words)
        assert done.returncode == 0, done.stderr
        done.stdout.decode()
