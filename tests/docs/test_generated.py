"""Generated files, and generated parts of pages, are current."""

import pytest

from .generate import FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_generated_file_is_current(file):
    assert FILES[file]() == file.read_text("utf-8"), "run: make docs"
