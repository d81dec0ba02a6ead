import os
import socket
import subprocess
import sys

import pytest

from .folders import problem


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", ["one file of it", "give '"]),
        ("config.json", b"{}", ["one file of it"]),
        ("x.safetensors", b"\x80\x04\x95" + bytes(9), ["not a checkpoint", "a Python pickle"]),
        ("x.bin", b"\x80\x02}q\0.", ["a Python pickle", "unpickling runs code"]),
        ("x.pt", b"PK\x03\x04", ["a zip archive", "convert the model to safetensors"]),
        ("x.h5", b"\x89HDF\r\n\x1a\n", ["an HDF5 file"]),
        ("x.gguf", b"<html><body>404 Not Found", ["not a GGUF file", "an HTML page"]),
        ("x.gguf", b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer"]),
        ("x.gguf", b"", ["not a GGUF file", "does not begin with the letters GGUF"]),
        ("x.tar.gz", b"\x1f\x8b\x08", ["a gzip archive", "unpack it first"]),
        ("x", b"hello", ["not a checkpoint", "does not know"]),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    message = problem(tmp_path / name)
    assert [part for part in parts if part not in message] == []


def test_odd_paths_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    assert "a symbolic link to nothing" in problem(tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in problem(tmp_path / "loop")
    assert "not usable" in problem(f"{tmp_path}/a\0b")
    assert "File name too long" in problem(tmp_path / ("x" * 5000))
    (tmp_path / "file").touch()
    assert "Not a directory" in problem(tmp_path / "file" / "below")


def test_fifos_devices_and_sockets_never_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.gguf")
    assert "found: a FIFO" in problem(tmp_path / "x.gguf")
    assert "found: a device" in problem("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 characters at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        assert "found: a socket" in problem(tmp_path / "s")


def test_refusing_pickles_imports_no_torch_and_opening_no_jax(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    code = (
        "import sys\n"
        "from moecc.formats.open import open_checkpoint\n"
        "from moecc.errors import InputError\n"
        f"try: open_checkpoint({str(tmp_path)!r})\n"
        "except InputError as error: assert 'pickle' in str(error)\n"
        "print({'torch', 'pickle5', 'jax', 'gguf', 'safetensors'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
