"""``docs/cli.md`` has the JSON keys that there are, no others."""

import json
import re
import shutil
from pathlib import Path

import pytest

from moecc.cli.main import main
from moecc.rewrite.pipeline import installed

from .pages import ROOT

PAGE = (ROOT / "docs" / "cli.md").read_text("utf-8")
GOLDEN = ROOT / "tests" / "golden"
SECTIONS = {
    match.group(1): match.group(2)
    for match in re.finditer(r"^## moecc (\w+)[^\n]*\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
_CODE = re.compile(r"`([^`]+)`")


def tables(section):
    """Yield the first header cell of each table, and what its first column has in backticks."""
    for table in re.findall(r"(?:^\|[^\n]*\n)+", section, re.M):
        first = [re.split(r"(?<!\\)\|", line)[1].strip() for line in table.splitlines()]
        yield first[0], [code for cell in first[2:] for code in _CODE.findall(cell)]


def keys(value, path=""):
    """Yield the paths to the leaves of a JSON value; an empty list or object is a leaf."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from keys(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from keys(inner, f"{path}[]")
    else:
        yield path


def documented(name, title):
    return next(codes for heading, codes in tables(SECTIONS[name]) if heading == title)


def covers(listed, path):
    """Whether a documented key stands for a path; an empty list covers what would be in it."""
    cuts = [m.start() for m in re.finditer(r"\[\]|\.", listed)]
    patterns = (re.escape(listed[:cut]).replace(r"\*", r"[^.\[]+") for cut in [*cuts, None])
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def compare(documented, objects):
    found = {path for value in objects for path in keys(value)}
    assert {p for p in found if not any(covers(d, p) for d in documented)} == set()
    # Whatever is documented stands in one of the objects.
    assert [d for d in documented if not any(covers(d, p) for p in found)] == []


@pytest.fixture
def report(capsys):
    def run(*command):
        assert main([*command, "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_inspect(report):
    sources = [str(GOLDEN / "llama_gqa"), str(GOLDEN / "qwen3_moe_plain"), "preset:smollm2-135m"]
    compare(documented("inspect", "key"), [report("inspect", s) for s in sources])


def test_convert_and_verify(report, tmp_path):
    source, out = str(GOLDEN / "llama_gqa"), str(tmp_path / "out")
    made = report(
        "convert", source, out, "-p", "upcycle{experts=4}", "--to", "mixtral", "--dtype", "bf16"
    )
    compare(documented("convert", "key"), [made])
    compare(documented("verify", "key, alone"), [report("verify", out)])
    verdict = report("verify", out, "--against", source)
    compare(documented("verify", "key, with `--against`"), [verdict])
    assert verdict["rounding"] is not None
    shutil.rmtree(out)
    again = report("convert", source, out, "-p", "upcycle", "--to", "mixtral", "--dry-run")
    compare(documented("convert", "key"), [again])
    assert not Path(out).exists()


def test_prove(report):
    source = str(GOLDEN / "llama_gqa")
    compare(documented("prove", "key"), [report("prove", source, source)])


def test_forecast(report):
    none = report("forecast", str(GOLDEN / "llama_gqa"), "--tokens", "1e6")
    listed = documented("forecast", "key")
    of_pilot = ("pilot.", "crossing.")
    compare([name for name in listed if not name.startswith(of_pilot)], [none])


def test_passes(report):
    listed = documented("passes", "key, with NAME")
    for name in installed().names():
        compare(
            [d for d in listed if "options" not in d], [without_options(report("passes", name))]
        )
    compare(listed, [report("passes", "upcycle")])
    every = report("passes")
    compare(listed, [{"schema": every["schema"], **one} for one in every["passes"]])


def without_options(value):
    return {name: inner for name, inner in value.items() if name != "options"}


def test_clean_and_run(report, tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.moecc-partial").mkdir()
    found = report("clean", str(out), str(tmp_path / "other"))
    assert set(found["outputs"]) == {str(out), str(tmp_path / "other")}
    assert len(found["outputs"][str(out)]) == 1
    compare(documented("clean", "key"), [found])
    options = ["--outputs", str(tmp_path / "x.npy"), "--backend", "reference"]
    made = report("run", str(GOLDEN / "llama_gqa"), *options)
    compare(documented("run", "key"), [made])
