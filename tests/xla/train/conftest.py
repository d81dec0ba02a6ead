"""Training steps need optax, too."""

import pytest


def pytest_pycollect_makemodule():
    pytest.importorskip("optax")
