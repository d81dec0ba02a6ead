"""Outputs in stores: uploads, their interruptions, and two writers of one output."""

import shutil

import pytest
from stores import GOLDEN, SECRETS, UPCYCLE, hub, said, store

from moecc.errors import InputError, MachineError
from moecc.formats.manifest import verify_manifest
from moecc.formats.store import CLAIM_NAME, mirror
from moecc.formats.upload import StoreOutput
from tests.support.commands import files_of

__all__ = ["hub", "store"]  # fixtures
SOURCE = str(GOLDEN / "llama_gqa")
SHARDS = ("--max-shard-bytes", "20000")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder where outputs are staged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted folder of several shards."""
    from moecc.cli.main import main

    folder = tmp_path_factory.mktemp("converted") / "moe"
    assert main(["convert", SOURCE, str(folder), *UPCYCLE, *SHARDS]) == 0
    return folder


def contents(store, path):
    """Return the files of a folder in a store."""
    store.invalidate_cache()
    return {name.removeprefix(f"{path}/"): store.cat_file(name) for name in store.find(path)}


def test_a_conversion_is_written_to_a_store(store, converted, cache, capsys):
    command = ("convert", "s3://bucket/tiny", "s3://bucket/out", *UPCYCLE, *SHARDS)
    assert said(capsys, *command, "--dry-run")[0] == 0
    assert not store.exists("bucket/out")
    assert said(capsys, *command)[0] == 0
    files = contents(store, "bucket/out")
    assert files.keys() == files_of(converted).keys()
    weights = [name for name in files if name.endswith(".safetensors")]
    assert len(weights) > 2
    assert all(files[name] == (converted / name).read_bytes() for name in weights)
    assert not any(
        secret.encode() in data for data in files.values() for secret in SECRETS.values()
    )
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert said(capsys, "verify", "s3://bucket/out")[0] == 0
    code, text = said(capsys, *command)
    assert code == 1
    assert "s3://bucket/out: the output folder is not empty" in text
    assert said(capsys, *command[:3], *UPCYCLE, "--force")[0] == 0
    assert "model.safetensors" in contents(store, "bucket/out")
    assert verify_manifest(mirror("s3://bucket/out")) == []


class Killed(BaseException):
    """The process ends."""


def ending_at(system, number, error):
    """Let the `number`-th call that changes the store fail; return what counts the calls."""
    count = 0

    def wrapped(call):
        def run(*words, **options):
            nonlocal count
            count += 1
            if count == number:
                raise error
            return call(*words, **options)

        return run

    for name in ("pipe_file", "put_file", "rm_file"):
        setattr(system, name, wrapped(getattr(system, name)))
    return lambda: count


@pytest.fixture
def folder_store(tmp_path, monkeypatch):
    """A store that is a folder of this machine, for a test of many uploads."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    def system(*address):
        local = LocalFileSystem(auto_mkdir=True, skip_instance_cache=True)
        return DirFileSystem(str(tmp_path), local, skip_instance_cache=True)

    for module in ("store", "upload"):
        monkeypatch.setattr(f"moecc.formats.{module}.file_system", system)
    return system


@pytest.mark.parametrize("replaces", [False, True])
def test_an_upload_that_is_killed_anywhere_is_continued(folder_store, converted, replaces):
    """Absent, incomplete and unreadable, the old one, or complete: then the same bytes."""
    expected, number, calls, store = files_of(converted), 0, 1, folder_store()
    while number < calls:
        number += 1
        if store.exists("bucket/kill"):
            store.rm("bucket/kill", recursive=True)
        if replaces:
            store.put(SOURCE, "bucket/kill", recursive=True)
        old = contents(store, "bucket/kill")
        output = StoreOutput("s3://bucket/kill", force=replaces)
        count = ending_at(output._system, number, Killed())
        try:
            output.put(converted)
        except Killed:
            calls = number + 1
        else:
            assert count() == calls - 1
        state = contents(store, "bucket/kill")
        if CLAIM_NAME not in state:
            assert state in (old, expected)
            continue
        with pytest.raises(InputError, match="the upload of this folder is not complete"):
            mirror("s3://bucket/kill")
        with pytest.raises(InputError, match="is writing this output, or was interrupted"):
            StoreOutput("s3://bucket/kill").put(converted)
        StoreOutput("s3://bucket/kill", resume=True).put(converted)
        assert contents(store, "bucket/kill") == expected
    assert calls > len(expected) + 2


def test_an_interrupted_upload_names_how_it_goes_on(
    store, converted, cache, monkeypatch,
    capsys,
):  # fmt: skip
    import fsspec

    system, names = fsspec.filesystem("s3"), list[str]()
    put = system.put_file

    def failing(path, target, **options):
        if len(names) == 3:
            raise ConnectionError(f"reset; {SECRETS['AWS_SECRET_ACCESS_KEY']}")
        names.append(target)
        put(path, target, **options)

    monkeypatch.setattr(system, "put_file", failing)
    target = "s3://bucket/cut"
    code, text = said(capsys, "convert", SOURCE, target, *UPCYCLE, *SHARDS)
    assert code == 4
    assert text.count("error:") == 1
    stage = cache / "moecc" / "uploads" / "s3" / "bucket" / "cut"
    assert f"moecc push {stage} {target} --resume" in text
    code, text = said(capsys, "convert", SOURCE, target, *UPCYCLE, *SHARDS)
    assert code == 1
    assert f"moecc push {stage} {target} --resume continues the upload" in text
    monkeypatch.setattr(system, "put_file", put)
    assert said(capsys, "push", stage, target, "--resume")[0] == 0
    assert verify_manifest(mirror(target)) == []
    assert not stage.exists()
    # The same conversion goes on, too: here, and on a machine without the staged files.
    for moves in (False, True):
        system.rm("bucket/cut", recursive=True)
        names.clear()
        monkeypatch.setattr(system, "put_file", failing)
        code, text = said(capsys, "convert", SOURCE, target, *UPCYCLE, *SHARDS)
        assert code == 4, text
        monkeypatch.setattr(system, "put_file", put)
        if moves:
            shutil.rmtree(cache)
        code, text = said(capsys, "convert", SOURCE, target, *UPCYCLE, "--resume")
        assert code == 1, "other shards are another conversion"
        code, text = said(capsys, "convert", SOURCE, target, *UPCYCLE, *SHARDS, "--resume")
        assert (code, "continued: the upload" in text) == (0, not moves), text
        assert contents(store, "bucket/cut") == files_of(converted)
        assert not stage.exists()
    # Given up instead.
    monkeypatch.setattr(system, "put_file", failing)
    assert said(capsys, "convert", SOURCE, target, *UPCYCLE, "--force")[0] == 4
    assert said(capsys, "clean", target)[0] == 0
    assert contents(store, "bucket/cut") == {}
    assert not stage.exists()


def test_a_second_writer_of_an_output_is_refused(store, converted, capsys):
    first = StoreOutput("s3://bucket/two")
    with first.claimed("first"):
        with pytest.raises(InputError, match="another conversion is writing this output"):
            StoreOutput("s3://bucket/two").check("second")
        with pytest.raises(InputError, match="another conversion is writing this output"):
            StoreOutput("s3://bucket/two", resume=True).put(converted)
        code, text = said(capsys, "push", converted, "s3://bucket/two")
        assert code == 1
        assert "--force takes its place" in text
        StoreOutput("s3://bucket/two", force=True).put(converted)
    with pytest.raises(InputError, match="another writer took this output over"):
        first._require_held()
    failing = StoreOutput("s3://bucket/failed")
    with pytest.raises(MachineError, match="disk"), failing.claimed("x"):
        raise MachineError("the disk is full")
    assert contents(store, "bucket/failed") == {}


def test_a_claim_holds_on_a_server_that_ignores_conditions(folder_store, converted):
    def output():
        output = StoreOutput("gs://bucket/two")
        write = output._system.pipe_file
        output._system.pipe_file = lambda path, data, mode="": write(path, data)
        return output

    first = output()
    with first.claimed("first"), pytest.raises(InputError, match="another conversion is writ"):
        output().put(converted)
    first.put(converted)
    assert contents(folder_store(), "bucket/two").keys() == files_of(converted).keys()


CARDS = {"README.md", "moecc_manifest.json"}


def test_a_push_to_the_hub_is_one_commit(hub, converted, tmp_path, capsys):
    folder = tmp_path / "moe"
    shutil.copytree(converted, folder)
    assert said(capsys, "push", folder, "hf://org/moe", "--private")[0] == 0
    pushed = hub.root / "org" / "moe" / "main"
    assert verify_manifest(pushed) == []
    assert {n for n, c in files_of(pushed).items() if c != (folder / n).read_bytes()} == CARDS
    assert 'folder = "org/moe"\n' in (pushed / "README.md").read_text()
    assert sum(path.endswith("/commit/main") for _, path, _ in hub.requests) == 1
    assert not any(secret in body for _, _, body in hub.requests for secret in SECRETS.values())
    code, text = said(capsys, "push", folder, "hf://org/moe")
    assert code == 1
    assert "the repository is not empty" in text
    assert said(capsys, "push", folder, "hf://org/tiny@v3")[0] == 0
    assert files_of(hub.root / "org" / "tiny" / "v3") == files_of(folder)
    assert said(capsys, "push", folder, "hf://org/tiny", "--force")[0] == 0
    assert files_of(hub.root / "org" / "tiny" / "main").keys() == files_of(folder).keys()
    hub.gated.add("org/moe")
    code, text = said(capsys, "push", folder, "hf://org/moe", "--force")
    assert code == 4
    assert "hf://org/moe: the store denies access" in text
    (folder / "config.json").write_text("{}")
    hub.requests.clear()
    code, text = said(capsys, "push", folder, "hf://org/new")
    assert code == 3
    assert "config.json: the file differs" in text
    assert not hub.requests


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (("convert", SOURCE, "hf://org/x"), 2, "moecc push FOLDER hf://org/x"),
        (("convert", SOURCE, "s3://bucket"), 2, "not a folder in a store"),
        (("convert", SOURCE, "gs://bucket/a?b"), 2, "not an address"),
        (("push", SOURCE, "elsewhere"), 2, "not an address in a store"),
        (("convert", SOURCE, "az://bucket/a"), 2, "found: az:/"),
        (("inspect", "S3:/bucket/a"), 2, "found: S3:/"),
        (("push", SOURCE, "s3://bucket/x"), 1, "no moecc_manifest.json"),
        (("push", "nowhere", "s3://bucket/x"), 1, "there is no such file or folder"),
    ],
)
def test_a_wrong_request_is_one_message(words, code, problem, store, capsys):
    actual, text = said(capsys, *words)
    assert actual == code, text
    assert problem in text
    assert text.count("error:") == 1


@pytest.mark.parametrize("step", ["", "@best"])
def test_a_run_and_a_file_are_pushed_as_converted_folders(step, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("graph.moe", "lineage.json"):
        (run / name).touch()
    for source, way_out in ((f"{run}{step}", "--to auto"), (str(run / "graph.moe"), "model.gguf")):
        code, text = said(capsys, "push", source, "hf://org/new")
        assert (code, way_out in text) == (1, True), text


def test_an_edited_card_is_stated_in_the_manifest(folder_store, converted, tmp_path, capsys):
    folder = shutil.copytree(converted, tmp_path / "edited")
    with (folder / "README.md").open("a") as card:
        card.write("mine\n")
    push = ("push", folder, "s3://bucket/edited")
    assert said(capsys, *push)[0] == 3
    assert said(capsys, *push, "--allow-edited-card")[0] == 0
    assert verify_manifest(folder) == []
    uploaded = folder_store().cat("bucket/edited/moecc_manifest.json")
    assert uploaded == (folder / "moecc_manifest.json").read_bytes()
