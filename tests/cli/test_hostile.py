"""Files that nobody vouches for: a message and an exit code, whatever is in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moecc.checkpoint.manifest import MANIFEST_NAME, load, seal

GOLDEN = Path(__file__).parent.parent / "golden"
UPCYCLE = "upcycle{experts=4 top-k=2}"


def convert(moecc: Callable, source: Path, out: Path):
    return moecc("convert", source, out, "-p", UPCYCLE, "--to", "mixtral")


# --- companions in a folder of their own


def test_additional_chat_templates_are_copied_and_recorded(
    moecc: Callable, dense: Path, tmp_path: Path
) -> None:
    templates = dense / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "notes.txt").write_text("no template")
    out = tmp_path / "out"
    assert convert(moecc, dense, out).code == 0
    name = "additional_chat_templates/tool_use.jinja"
    assert (out / name).read_text() == "{{ tools }}"
    assert sorted(p.name for p in (out / name).parent.iterdir()) == ["tool_use.jinja"]
    assert name in load(out).files
    assert moecc("verify", out).code == 0
    (out / name).write_text("{{ other }}")
    changed = moecc("verify", out)
    assert changed.code == 3
    assert name in changed.err


# --- JSON

LONG = "1" * 5000
JSON = {
    "a long integer before bad syntax": f'{{"a": {LONG} ]]]',
    "closing brackets": "]]]",
    "deep nesting": '{"a":' * 200_000,
    "a long integer": f'{{"model_type": {LONG}}}',
    "half a surrogate": '{"model_type": "\\ud800", "architectures": ["\\udfff"]}',
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_hostile_json_is_refused(moecc: Callable, tmp_path: Path, name: str, text: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama_sharded", folder)
    (folder / name).write_text(text)
    done = moecc("inspect", folder)
    assert done.code == 1, done.err
    assert name in done.err


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_hostile_headers_are_refused(moecc: Callable, dense: Path, text: str) -> None:
    data = text.encode()
    path = dense / "model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    done = moecc("inspect", dense)
    assert done.code == 1, done.err
    assert "model.safetensors" in done.err


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_hostile_manifests_are_refused(moecc: Callable, dense: Path, text: str) -> None:
    (dense / MANIFEST_NAME).write_bytes(seal(text.encode()))
    done = moecc("verify", dense)
    assert done.code == 1, done.err
    assert MANIFEST_NAME in done.err


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_what_is_only_copied_is_copied_whatever_it_is(
    moecc: Callable, dense: Path, tmp_path: Path, text: str
) -> None:
    (dense / "generation_config.json").write_text(text)
    assert convert(moecc, dense, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
