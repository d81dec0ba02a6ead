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
    cli, dense, out, monkeypatch, change, name
):
    (dense / "tokenizer.json").write_text("{}")
    (dense / "LICENSE").write_text("of its own")

    def at_the_end(bar, done, total):
        if done == total:
            change(dense)

    monkeypatch.setattr(Bar, "__call__", at_the_end)
    cli.convert(dense, out, code=1, says=f"{name}: ")
    assert not out.exists()


def test_a_model_that_no_pass_reads_is_rejected(cli, dense, out):
    """It would be named as a source of what it has no part in."""
    more = ("--experts", f"b={dense}")
    cli.convert(dense, out, *more, code=2, says="--experts b: no pass reads this model")
    assert not out.exists()
    cli.convert(dense, out, *more, pipeline="upcycle{experts=2 sources=base,b}")
