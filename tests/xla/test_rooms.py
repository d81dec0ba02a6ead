"""The rooms of the xla backend: arrows between them run one way, and the framework is below all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

XLA = Path(__file__).parents[2] / "backends" / "moecc_backends" / "xla"
PACKAGE = "moecc_backends.xla"

ROOMS = ("trace", "kernels", "mesh", "dispatch", "lower", "run", "train", "aot")
"""From the ground up: a room imports from those before it."""

MOST_FILES = 8


def _modules() -> dict[str, Path]:
    files = {".".join(p.relative_to(XLA).with_suffix("").parts): p for p in XLA.rglob("*.py")}
    return {name: path for name, path in files.items() if path.name != "__init__.py"}


def _imported(path: Path) -> set[str]:
    """Return the modules of the backend that a file imports, locally or for types alone, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            base = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            found.update(f"{base}.{a.name}".removeprefix(".") for a in node.names)
            found.add(base)
    return found & _modules().keys()


ARROWS = {name: _imported(path) for name, path in _modules().items()}


def test_few_files_stand_outside_the_rooms() -> None:
    assert len([*XLA.glob("*.py")]) <= MOST_FILES
    assert {p.name for p in XLA.iterdir() if p.is_dir() and p.name[0] != "_"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_below_it(room: str) -> None:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = {
        f"{name} imports {other}"
        for name, others in ARROWS.items()
        for other in others
        if name.startswith(f"{room}.") and other.partition(".")[0] not in allowed
        if other != "import_jax"  # it imports nothing of the backend: the ground of all rooms
    }
    assert wrong == set()


def test_every_module_is_reached() -> None:
    """What nothing imports is not part of the backend: the façade leads to all of it."""
    doors = {"backend", "import_jax", "mesh.load_params"}
    imported = {other for others in ARROWS.values() for other in others}
    assert ARROWS.keys() - imported <= doors
