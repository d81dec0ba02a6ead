"""What only looks like a file of the folder: pipes, devices, links out of it, broken disks."""

import errno
import os
from unittest.mock import Mock

import numpy as np
import pytest

from moecc.errors import MachineError
from moecc.formats.open import open_checkpoint

from .folders import INDEX, ONE, TWO, WEIGHTS, problem, problems


@pytest.mark.parametrize("name", ["config.json", INDEX, TWO, "tokenizer.json"])
def test_a_fifo_in_any_place_never_blocks(make_folder, name):
    folder = make_folder({ONE: {"a": 3}, TWO: {"b": 3}})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: this is not a regular file" in problems(folder)[0]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(make_folder, tmp_path, name):
    folder = make_folder({WEIGHTS: {"a": 3}})
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).symlink_to((folder / name).rename(tmp_path / "elsewhere"))
    assert "a symbolic link that leaves its folder" in problem(folder)


def in_cache(make_folder, tmp_path, target):
    """A snapshot whose weights are a link to `target`, which is moved there."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123abcd"
    os.renames(make_folder({WEIGHTS: {"a": 3}}), snapshot)
    os.renames(snapshot / WEIGHTS, target)
    (snapshot / WEIGHTS).symlink_to(os.path.relpath(target, snapshot))
    return snapshot


def test_a_snapshot_of_the_hub_cache_links_to_its_own_blobs(make_folder, tmp_path):
    blob = tmp_path / "models--me--tiny" / "blobs" / "53aa"
    snapshot = in_cache(make_folder, tmp_path, blob)
    with open_checkpoint(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), [0, 1, 2])
    alias = tmp_path / "alias"
    alias.symlink_to(snapshot)
    with open_checkpoint(alias) as checkpoint:
        assert len(checkpoint.read("a")) == 3


@pytest.mark.parametrize("place", ["models--you--other/blobs", "blobs", "models--me--tiny/refs"])
def test_a_snapshot_may_not_link_elsewhere(make_folder, tmp_path, place):
    snapshot = in_cache(make_folder, tmp_path, tmp_path / place / "53aa")
    assert "leaves its folder" in problem(snapshot)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("open", errno.EACCES), ("preadv", errno.EIO), ("stat", errno.ESTALE),
        ("listdir", errno.EMFILE),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_the_machines_fault(make_folder, monkeypatch, call, code):
    folder = make_folder({WEIGHTS: {"a": 3}})
    refuse = Mock(side_effect=OSError(code, os.strerror(code)))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(MachineError) as caught:
            open_checkpoint(folder)
    assert os.strerror(code) in str(caught.value)
    assert str(folder) in str(caught.value)
