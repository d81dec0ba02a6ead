"""A source that changes while it is converted is noticed, whenever and however it changes."""

import os

import pytest

from moecc.support.console import Bar


def flip_a_byte_and_hide_it(dense):
    file = dense / "model.safetensors"
    status = os.stat(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_the_config(dense):
    with (dense / "config.json").open("a") as opened:
        opened.write("\n")


def swap_the_tokenizer_for_a_link(dense):
    secret = dense.parent / "secret"
    secret.write_text("secret")
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer.json").symlink_to(secret)


def remove_the_licence(dense):
    (dense / "LICENSE").unlink()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (flip_a_byte_and_hide_it, "model.safetensors"),
        (edit_the_config, "config.json"),
        (swap_the_tokenizer_for_a_link, "tokenizer.json"),
        (remove_the_licence, "LICENSE"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_change_after_the_last_weight_was_read_is_noticed(
    moecc,
    dense,
    tmp_path,
    monkeypatch,
    change,
    name,
):
    (dense / "tokenizer.json").write_text("{}")
    (dense / "LICENSE").write_text("of its own")

    def at_the_end(bar, done, total):
        if done == total:
            change(dense)

    monkeypatch.setattr(Bar, "__call__", at_the_end)
    done = moecc("convert", dense, tmp_path / "out", "-p", "upcycle", "--to", "mixtral")
    assert done.code == 1, done.err
    assert f"{name}: " in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_pass_reads_is_rejected(moecc, dense, tmp_path):
    """It would be named as a source of what it has no part in."""
    how = ("--experts", f"b={dense}", "--to", "mixtral")
    done = moecc("convert", dense, tmp_path / "out", "-p", "upcycle{experts=2}", *how)
    assert done.code == 2
    assert "--experts b: no pass reads this model" in done.err
    assert not (tmp_path / "out").exists()
    read = "upcycle{experts=2 sources=base,b}"
    assert moecc("convert", dense, tmp_path / "out", "-p", read, *how).code == 0
