"""What tests of pages and of hints share."""

import pytest

from .stands import make_stands


@pytest.fixture(scope="session")
def stands(tmp_path_factory):
    """Return a folder with what the pages take for granted."""
    pytest.importorskip("tokenizers")
    return make_stands(tmp_path_factory.mktemp("stands"))
