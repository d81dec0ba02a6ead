"""Everything here needs jax."""

import pytest


def pytest_pycollect_makemodule():
    pytest.importorskip("jax")
