"""Checkpoints built by hand, so that each can be wrong in one place."""

import pytest

from .folders import INDEX, WEIGHTS, index_of, write_json, write_tensors


@pytest.fixture
def make_folder(tmp_path):
    """Make a folder with config, shards and an index that fits them unless one is given."""

    def make(shards, index=None):
        folder = tmp_path / "model"
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": "llama"})
        for file, lengths in shards.items():
            write_tensors(folder / file, lengths)
        if index is None and list(shards) != [WEIGHTS]:
            total = 4 * sum(n for lengths in shards.values() for n in lengths.values())
            index = index_of({t: file for file, lengths in shards.items() for t in lengths}, total)
        if index:
            write_json(folder / INDEX, index)
        return folder

    return make
