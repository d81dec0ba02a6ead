import errno
import os
import stat

import pytest

from moecc.errors import InputError, MachineError
from moecc.formats.files import Disk, injected
from moecc.formats.output import check_output, output_folder


def refused(out, error=InputError, **arguments):
    before = sorted(os.walk(out.parent)) if out.parent.is_dir() else None
    with pytest.raises(error) as caught, output_folder(out, **arguments):
        pytest.fail("the folder was given out")
    assert before is None or sorted(os.walk(out.parent)) == before
    return [str(problem) for problem in caught.value.problems]


def fill(out, name, error=None, meanwhile=lambda: None, **arguments):
    """Write one file into the output folder, let something happen, and perhaps fail."""
    with output_folder(out, **arguments) as folder:
        (folder / name).write_text(name)
        meanwhile()
        if error:
            raise error


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    return folder


def test_the_folder_appears_whole_at_the_end(tmp_path):
    out = tmp_path / "out"
    with output_folder(out) as folder:
        assert folder.parent == tmp_path
        assert folder.name == ".out.moecc-partial"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not out.exists()
    assert (out / "sub" / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_fails_once_the_output_has_its_place(tmp_path, force):
    out = tmp_path / "out"
    if force:
        fill(out, "old")

    class Failing(Disk):
        def sync(self, descriptor):
            if (out / "new").exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    with injected(Failing()), pytest.raises(MachineError, match="the output is complete"):
        fill(out, "new", force=force)
    assert os.listdir(out) == ["new"]
    # As docs/interrupted.md says.
    assert sorted(os.listdir(tmp_path)) == [*([".out.moecc-old"] if force else []), "out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_after_a_failure(tmp_path, error):
    with pytest.raises(error):
        fill(tmp_path / "out", "a", error)
    assert os.listdir(tmp_path) == []


def test_force_replaces_a_folder_only_when_the_new_one_is_complete(tmp_path):
    out = tmp_path / "out"
    fill(out, "old")
    with pytest.raises(RuntimeError):
        fill(out, "new", RuntimeError, force=True)
    assert os.listdir(out) == ["old"]
    with output_folder(out, force=True) as folder:
        (folder / "new").write_text("new")
        assert os.listdir(out) == ["old"]
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_follows_no_links(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("a")
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path / "precious")
    with output_folder(out, force=True):
        pass
    assert os.listdir(tmp_path / "precious") == ["a"]
    assert os.listdir(out) == []


def test_a_link_as_output_stays_a_link(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "old").write_text("old")
    (tmp_path / "out").symlink_to("disk/real")
    with output_folder(tmp_path / "out", force=True) as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "new").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk" / "real") == ["new"]
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_put_in_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, "old")
    rename = os.rename

    def fail(source, target):
        if ".moecc-partial" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(MachineError, match="Input/output"):
        fill(out, "new", force=True)
    assert os.listdir(out) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_filled_in_the_meantime_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def interfere():
        out.mkdir()
        (out / "other").write_text("other")

    with pytest.raises(InputError, match="in the meantime"):
        fill(out, "new", meanwhile=interfere)
    assert os.listdir(out) == ["other"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("source", "the output is the input"),
        ("source/../source", "the output is the input"),
        ("source/out", "the output is inside the input"),
        ("source/deep/out", "the output is inside the input"),
        ("link", "the output is the input"),
        ("link/out", "the output is inside the input"),
        ("", "the input is inside the output"),
    ],
)
def test_output_and_input_stay_apart(tmp_path, source, name, what, force):
    (source / "deep").mkdir()
    (tmp_path / "link").symlink_to("source")
    (problem,) = refused(tmp_path / name, inputs=[source], force=force)
    assert what in problem


def test_the_working_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "sub")
    for name in (".", ".."):
        with pytest.raises(InputError, match="the working folder or holds it"):
            check_output(type(tmp_path)(name), force=True)


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    assert "a mount point" in refused(tmp_path / "out")[0]
