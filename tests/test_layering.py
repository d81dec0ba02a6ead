"""Imports run one way: passes and backends use the core, and neither uses the other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "moecc": ROOT / "moecc",
    "moecc_passes": ROOT / "passes" / "moecc_passes",
    "moecc_backends": ROOT / "backends" / "moecc_backends",
}
FORBIDDEN = {
    "moecc": {"moecc_passes", "moecc_backends", "jax", "torch", "transformers"},
    "moecc_passes": {"moecc_backends", "jax", "torch", "transformers"},
    "moecc_backends": {"moecc_passes", "torch", "transformers"},
}


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = {
        str(f.relative_to(ROOT)): sorted(imported(f) & FORBIDDEN[package])
        for f in files
        if imported(f) & FORBIDDEN[package]
    }
    assert wrong == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_too_long(package: str) -> None:
    lengths = {
        str(f.relative_to(ROOT)): len(f.read_text().splitlines())
        for f in PACKAGES[package].rglob("*.py")
    }
    assert {f: n for f, n in lengths.items() if n > 600} == {}


@pytest.mark.parametrize("module", ["moecc", "moecc.ir", "moecc.pipeline", "moecc.families"])
def test_the_core_starts_without_jax(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('jax', 'torch', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
