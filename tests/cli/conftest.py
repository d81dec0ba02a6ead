"""Small checkpoints to break."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Done as Done

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def dense(tmp_path):
    """A copy of a tiny llama checkpoint, to be changed."""
    folder = tmp_path / "dense"
    shutil.copytree(GOLDEN / "llama_gqa", folder)
    return folder


@pytest.fixture
def edit_config(dense):
    """Change keys of the checkpoint's config.json; None removes a key."""

    def edit(**changes):
        path = dense / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                config.pop(key, None)
            else:
                config[key] = value
        path.write_text(json.dumps(config))

    return edit


@pytest.fixture
def edit_tensors(dense):
    """Rewrite the checkpoint's tensors: the function gets and returns a dictionary."""

    def edit(change):
        from safetensors.numpy import load_file, save_file

        path = dense / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit
