"""Machines that users describe in a file: what is read, what is rejected, who takes them."""

import json
from pathlib import Path

import pytest

from moecc.cli.main import main
from moecc.errors import InputError
from moecc.plan.machines import find_machine, parse_machine, sizes_of_kind
from moecc.plan.networks import Switch, Torus

MODEL = str(Path(__file__).parents[1] / "golden" / "llama_gqa")

WHOLE = """
kind = "gpu"
devices = 32
devices_per_node = 4
memory = "36 GB"
memory_bytes_per_second = 1.5e12
link_bytes_per_second = 200e9
node_bytes_per_second = 25e9
source = "a data sheet"
[peak_flops]
f32 = 20e12
bf16 = 300e12
"""


def written(folder, text):
    path = folder / "ours.toml"
    path.write_text(text)
    return str(path)


def test_a_machine_like_one_of_the_table(tmp_path):
    path = written(tmp_path, 'like = "h100x16"\nmemory = "70 GB"\nnode_bytes_per_second = 1e11\n')
    found, base = find_machine(path), parse_machine("gpu:h100:16")
    assert (found.name, found.compiled_as, found.kind) == (path, "gpu:h100:16", "gpu")
    assert (found.devices, found.usable_bytes) == (16, 70_000_000_000)
    assert found.peak_flops == base.peak_flops
    assert found.network == Switch(8, 16, 450e9, 1e11)
    assert found.sources[0] == path
    assert (
        find_machine(written(tmp_path, 'like = "a100"\nmemory = "40GiB"\n')).usable_bytes
        == 40 << 30
    )


def test_links_of_a_torus(tmp_path):
    found = find_machine(written(tmp_path, 'like = "v4-32"\nlink_bytes_per_second = 1e9\n'))
    base = parse_machine("v4-32").network
    assert isinstance(found.network, Torus)
    assert isinstance(base, Torus)
    assert [dim.link_bytes_per_second for dim in found.network.dims[:3]] == [1e9] * 3
    assert found.network.dims[3] == base.dims[3]


def test_commands_take_the_file(tmp_path, capsys):
    path = written(tmp_path, 'like = "cpu:8"\nmemory = "1 GB"\n')
    plan = str(tmp_path / "plan.json")
    command = ["plan", MODEL, "--machine", path, "--sequence", "64", "--format", "json"]
    assert main([*command, "--save", plan]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert (machine["name"], machine["devices"]) == (path, 8)
    assert machine["usable_bytes"] == 1_000_000_000
    assert main(["plan", MODEL, "--machine", written(tmp_path, WHOLE), "--sequence", "64"]) == 0


WRONG = {
    "an unknown key": ('like = "cpu"\nmemry = "1 GB"\n', "ours.toml:2: memry", "did you mean"),
    "an unknown type": ('like = "cpu"\n[peak_flops]\nbf17 = 1.0\n', ":3: peak_flops.bf17", "bf16"),
    "no bytes": ('like = "cpu"\nmemory = "much"\n', "ours.toml:2: memory", '"72 GB"'),
    "below nothing": (WHOLE.replace("20e12", "-1.0"), ":11: peak_flops.f32", "more than 0"),
    "no peak by name": ('like = "cpu"\n[peak_flops]\nbf16 = 0.0\n', ": peak_flops", "more than 0"),
    "no such machine": ('like = "h1000x8"\n', "ours.toml:1: like", "unknown machine"),
    "said twice": ('like = "h100x8"\nkind = "cpu"\n', "ours.toml:2: kind", "is a gpu"),
    "a topology": ('like = "v5e-16"\ndevices = 8\n', "ours.toml:2: devices", "tpu:v5e:4x4"),
    "half a node": (WHOLE.replace("= 32", "= 31"), "ours.toml:3: devices", "a multiple of 4"),
    "too many": (WHOLE.replace("= 32", "= 400000"), "ours.toml:3: devices", "at most 131,072"),
    "no TOML": ("like = \n", "ours.toml", "not TOML"),
    "nothing": ("", "ours.toml: kind", "gpu | cpu"),
    "no peaks": (WHOLE[: WHOLE.index("[")], "ours.toml: peak_flops", "f32 at least"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_reported_with_its_line(tmp_path, case):
    text, *words = WRONG[case]
    with pytest.raises(InputError) as caught:
        find_machine(written(tmp_path, text))
    assert [word for word in words if word not in str(caught.value)] == []


def test_larger_ones_have_more_nodes(tmp_path):
    own, larger, *_ = sizes_of_kind(find_machine(written(tmp_path, WHOLE)))
    assert (own.devices, larger.devices) == (32, 64)
    assert larger.name.endswith("ours.toml with devices = 64")
    assert larger.network == Switch(4, 64, 200e9, 25e9)
