"""What does not fit names what would: every option that is named fits when it is asked for."""

import re

import pytest

from moecc.cli.main import main
from tests.support.tiers import few

LLAMA = "preset:llama-3.1-8b --machine"
SMOL = "preset:smollm2-135m --machine"
BOTH = "--optimizer adafactor --weight-dtype bf16"

CASES = {
    f"{LLAMA} gpu:h100:1": ["--optimizer adafactor", "--weight-dtype bf16"],
    f"{LLAMA} tpu:v5e:2x2 --batch-tokens 65536": [BOTH],
    f"{SMOL} gpu:h100:8 --batch-tokens 2097152 --remat none": ["--remat full", "--micro-batches 2"],
    f"{LLAMA} gpu:h100:8 --mesh data=8 --dense-weights whole": ["--dense-weights split"],
}  # fmt: skip


def hint_of(capsys, line):
    assert main(["plan", *line.split()]) == 1
    (hint,) = re.findall(r"^  hint: (.*)$", capsys.readouterr().err, re.MULTILINE)
    return str(hint)


def options_of(hint):
    alone, _, _ = hint.rpartition(" would; ")
    return alone.split(" or ") if alone else []


@pytest.mark.parametrize("line", few(CASES, quick=1))
def test_every_option_that_is_named_fits(line, capsys):
    hint = hint_of(capsys, line)
    found = options_of(hint)
    assert set(CASES[line]) <= set(found)
    for options in found:
        assert main(["plan", *line.split(), *options.split()]) == 0, options
    (machine,) = re.findall(r"(\S+) is the smallest that would", hint)
    words = re.sub(r" --mesh \S+", "", line).split()
    assert main(["plan", *words, "--machine", machine]) == 0
