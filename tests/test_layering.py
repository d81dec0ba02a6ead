"""Imports run one way: from passes and backends to the core, and within each without a circle."""

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import networkx as nx
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


def imported(path):
    """Return the top-level names that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package):
    # Helpers of emitted programs are text that is copied, and never imported.
    # The chapters of modules of PyTorch are loaded by `moecc.torch` alone.
    skipped = ("helpers", "torch_export")
    files = sorted(f for f in PACKAGES[package].rglob("*.py") if f.parent.name not in skipped)
    assert files
    wrong = {
        str(f.relative_to(ROOT)): sorted(imported(f) & FORBIDDEN[package])
        for f in files
        if imported(f) & FORBIDDEN[package]
    }
    assert wrong == {}


@pytest.mark.parametrize("module", ["moecc", "moecc.ir", "moecc.rewrite", "moecc.families"])
def test_the_core_starts_without_jax(module):
    code = f"import sys, {module}; print([m for m in ('jax', 'torch', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [["opt", "{graph}", "-p", "canonicalize"], ["inspect", str(ROOT / "tests/golden/llama_gqa")]],
)
def test_commands_on_texts_start_without_arrays(words, tmp_path):
    graph = tmp_path / "model.moe"
    graph.write_text(
        "moecc 1\ngraph g {\n  input %x : f32[embed=4]\n"
        '  param %w : f32[embed=4] = source("w" : f32[embed=4])\n'
        "  %y = mul %x, %w : f32[embed=4]\n  output y = %y\n}\n"
    )
    words = [word.format(graph=graph) for word in words]
    code = (
        f"import sys\nfrom moecc.cli.main import main\nassert main({words!r}) == 0\n"
        "print([m for m in ('jax', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


COMMAND_LINE = "moecc.cli"
MAY_CALL_THE_COMMAND_LINE = {"moecc.__main__"}


def modules():
    """Return the files of the three packages by the names of their modules."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def arrows(module, file, known):
    """Return the modules among `known` that a file imports anywhere, for types alone included."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                names.add(inner if inner in known else base)
    return names & known.keys()


@pytest.fixture(scope="module")
def graph():
    """Every module of the three packages, and an arrow to each that it imports."""
    known = modules()
    graph = nx.DiGraph()
    for module, file in known.items():
        graph.add_node(module)
        graph.add_edges_from((module, other) for other in arrows(module, file, known))
    return graph


def circles(graph):
    """Return the modules of each circle: an import of a module by itself is one, too."""
    groups = nx.strongly_connected_components(graph)
    return [sorted(g) for g in groups if len(g) > 1 or any(graph.has_edge(m, m) for m in g)]


def test_no_circle_of_modules(graph):
    assert len(graph) > 300
    assert circles(graph) == []


def test_a_circle_closed_by_a_local_or_a_type_only_import_is_found(tmp_path):
    texts = {
        "room.a": "def f():\n    from room import b\n",
        "room.b": "if TYPE_CHECKING:\n    from .c import C\n",
        "room.c": "import room.a\n",
        "room.d": "from room.a import f\n",
    }
    known = {}
    for name, text in texts.items():
        known[name] = tmp_path / f"{name}.py"
        known[name].write_text(text)
    graph = nx.DiGraph()
    for name, file in known.items():
        graph.add_edges_from((name, other) for other in arrows(name, file, known))
    assert circles(graph) == [["room.a", "room.b", "room.c"]]


def test_nobody_imports_the_command_line(graph):
    inside = [m for m in graph if m == COMMAND_LINE or m.startswith(f"{COMMAND_LINE}.")]
    assert len(inside) > 3
    importing = {a for a, _ in graph.in_edges(inside)} - set(inside)
    assert importing == MAY_CALL_THE_COMMAND_LINE


def test_nobody_imports_the_front_door(graph):
    assert {a for a, _ in graph.in_edges("moecc")} == set()


def room(module):
    """Return the room of a module: a folder of the core, or another package as a whole."""
    package, *rest = module.split(".")
    return f"{package}.{rest[0]}" if package == "moecc" and rest else package


def test_no_circle_of_rooms(graph):
    rooms = nx.DiGraph()
    rooms.add_edges_from((room(a), room(b)) for a, b in graph.edges if room(a) != room(b))
    assert len(rooms) > 20
    assert circles(rooms) == []
