"""Names: where parameters are in a tree of modules, and what may stand in a Python text.

A checkpoint keeps the names of its source.  What a pass added lies beside it, in modules of its
own: ``model.layers.3.router.weight``.  Only names that Python or a module cannot have are changed.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections import defaultdict
from collections.abc import Iterable

from moecc.ir.graph import Graph, Value
from moecc.types import Extent

_LAYER = re.compile(r"((?:[^.]+\.)*layers)\.(\d+)(?:\.(.*))?\Z")

ADDED = {"extra": "extra_ffn", "shared": "shared_expert"}
"""The modules of what passes name after the tensor that it was copied from."""

MEMBERS = frozenset(
    (
        "add_module", "apply", "bfloat16", "bind", "buffers", "call_super_init", "children",
        "compile", "config", "cpu", "cuda", "device", "double", "dtype", "dump_patches",
        "eval", "extra_repr", "float", "forward", "get_buffer", "get_extra_state",
        "get_parameter", "get_submodule", "half", "ipu", "items", "keys", "load_state_dict",
        "modules", "mtia", "named_buffers", "named_children", "named_modules",
        "named_parameters", "parameters", "pop", "register_buffer", "register_forward_hook",
        "register_module", "register_parameter", "requires_grad_", "set_extra_state",
        "set_submodule", "share_memory", "state_dict", "to", "to_empty", "train",
        "training", "type", "update", "values", "xpu", "zero_grad", "generate",
        "base_model", "framework", "dummy_inputs", "layer_idx", "is_sparse", "is_decoder",
        "T_destination",
    )
)  # fmt: skip
"""Names that members of a module or a model have."""

RESERVED = frozenset(
    (
        *keyword.kwlist, *keyword.softkwlist, *dir(builtins),
        "rows", "capacity", "self", "torch", "nn", "F", "functional", "transformers", "math",
        "config", "layer",
    )
)  # fmt: skip
"""Names that a local variable must not have, besides those of helpers."""


def identifier(text: str) -> str:
    """Return a name that Python accepts: letters, digits and underscores of `text`."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_") or "value"
    name = re.sub("__+", "_", name)
    return f"_{name}" if name[0].isdigit() else name


def variable(text: str) -> str:
    """Return a name for a local variable."""
    name = identifier(text)
    return f"{name}_" if name in RESERVED else name


def layer_of(loc: str) -> tuple[str, int] | None:
    """Return the stack and the number of the layer that a location is in, if it is in one."""
    match = _LAYER.match(loc)
    return (match[1], int(match[2])) if match is not None else None


def scope_of(loc: str) -> str:
    """Return the part of a location after its layer: ``attention``, ``ffn``."""
    match = _LAYER.match(loc)
    return (match[3] or "") if match is not None else loc


def common(names: Iterable[str]) -> str:
    """Return the longest path that all names are under."""
    paths = [name.split(".") for name in names]
    if not paths:
        return ""
    first, last = min(paths), max(paths)
    size = min(len(first), len(last), *(len(p) - 1 for p in paths))
    count = next((i for i in range(size) if first[i] != last[i]), size)
    return ".".join(first[:count])


def is_under(name: str, path: str) -> bool:
    """Whether `name` is below `path`."""
    return not path or name.startswith(f"{path}.")


def layer_prefixes(graph: Graph) -> dict[tuple[str, int], str]:
    """Return the path that the parameters of each layer of a graph are under."""
    modules, sharing = _shared_modules(graph)
    locs = {name: layer_of(value.loc) for name, value in graph.params.items()}
    unshared = [name for name in locs if _module_of(name, modules) == ""]
    has_own = any(locs[name] in sharing for name in unshared)
    layers: dict[tuple[str, int], list[list[str]]] = defaultdict(list)
    for name in unshared if has_own else locs:
        layer = locs[name]
        if layer is not None and not _is_foreign(name, graph.params[name].loc):
            layers[layer].append(name.split("."))
    prefixes: dict[tuple[str, int], str] = {}
    for (stack, index), paths in layers.items():
        length = min(map(len, paths)) - 1
        at = next(
            (i for i in range(length) if paths[0][i].isdigit() and len({p[i] for p in paths}) == 1),
            None,
        )
        is_shared = at is None or len({tuple(p[: at + 1]) for p in paths}) > 1
        prefix = f"{stack}.{index}" if is_shared else ".".join(paths[0][: (at or 0) + 1])
        prefixes[stack, index] = prefix
    all_prefixes = list(prefixes.values())
    if any(all_prefixes.count(prefix) > 1 for prefix in all_prefixes):
        prefixes = _inner_prefixes(layers) or prefixes
        all_prefixes = list(prefixes.values())
    prefixes = {
        layer: prefix if all_prefixes.count(prefix) == 1 else f"{layer[0]}.{layer[1]}"
        for layer, prefix in prefixes.items()
    }
    for stack, index in sorted(sharing) if has_own else []:  # some read what they share alone
        paths_of_stack = [path for layer, path in prefixes.items() if layer[0] == stack]
        if paths_of_stack:
            path = f"{paths_of_stack[0].rpartition('.')[0]}.{index}"
            prefixes.setdefault((stack, index), path)
    return prefixes


def _inner_prefixes(
    layers: dict[tuple[str, int], list[list[str]]],
) -> dict[tuple[str, int], str]:
    """Return the longest numbered path of each layer, in stages of layers, or none."""
    prefixes = {}
    for layer, paths in layers.items():
        path = common(".".join(p) for p in paths).split(".")
        while path and not path[-1].isdigit():
            path.pop()
        prefixes[layer] = ".".join(path)
    is_distinct = all(prefixes.values()) and len({*prefixes.values()}) == len(prefixes)
    return prefixes if is_distinct else {}


def _shared_modules(graph: Graph) -> tuple[set[str], set[tuple[str, int]]]:
    """Return the numbered modules of which several layers read parameters, and these layers."""
    modules: set[str] = set()
    sharing: set[tuple[str, int]] = set()
    for name, value in graph.params.items():
        layers = {layer for user in value.users if (layer := layer_of(user.loc)) is not None}
        if len(layers) > 1 and (module := numbered_module(name)):
            modules.add(module)
            sharing |= layers
    return modules, sharing


def numbered_module(name: str) -> str:
    """Return the path of a parameter up to its first number; empty: it has none."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), -1)
    return ".".join(parts[: at + 1])


def _module_of(name: str, modules: set[str]) -> str:
    return next((module for module in modules if is_under(name, module)), "")


def _is_foreign(name: str, loc: str) -> bool:
    """Whether a parameter is named after its location, as what passes add is."""
    return bool(loc) and is_under(name, loc)


def renamed_params(graph: Graph) -> dict[str, str]:
    """Return for each parameter of an unrolled graph its name in the emitted checkpoint."""
    homes = _homes(graph)
    experts = _expert_paths(graph, homes)
    names: dict[str, str] = {}
    used: set[str] = set()
    for name, value in graph.params.items():
        home = homes.get(name)
        path = name
        if home is not None:
            path = _placed(graph, name, value, home, experts.get(home, ("", home)))
        path = module_path(path)
        names[name] = unused_path(path, used)
    return names


def unused_path(path: str, used: set[str]) -> str:
    """Return a path that no other is or lies under, with a number after its module if need be.

    Args:
      path: the path that a parameter should have.
      used: the paths that others have, and those of the modules around them; is added to.
    """
    module, _, last = path.rpartition(".")
    unique, number = path, 2
    while unique in used:
        unique = f"{module}_{number}.{last}" if module else f"{last}_{number}"
        number += 1
    parts = unique.split(".")
    used.update(".".join(parts[:size]) for size in range(1, len(parts) + 1))
    return unique


def module_path(path: str) -> str:
    """Return a path whose parts modules and parameters can be called."""
    return ".".join(map(module_component, path.split(".")))


def module_component(text: str) -> str:
    """Return a part of a path that a module can have: a number, or a name of its own."""
    if text.isdigit() and text == str(int(text)):
        return text
    name = identifier(text).strip("_") or "value"
    name = f"n{name}" if name[0].isdigit() else name
    return f"{name}_" if name in MEMBERS or keyword.iskeyword(name) else name


def _homes(graph: Graph) -> dict[str, str]:
    """Return for each parameter of a layer the path that it is put under."""
    prefixes, (modules, sharing) = layer_prefixes(graph), _shared_modules(graph)
    homes: dict[str, str] = {}
    for name, value in graph.params.items():
        layer = layer_of(value.loc)
        if layer is not None and (module := _module_of(name, modules)):
            homes[name] = module
        elif layer is not None and (layer in prefixes or layer in sharing):
            homes[name] = prefixes.get(layer, f"{layer[0]}.{layer[1]}")
    return homes


def _placed(graph: Graph, name: str, value: Value, prefix: str, experts: tuple[str, str]) -> str:
    """Return the path of a parameter under `prefix`; `experts` are paths, the old and the new."""
    old, new = experts
    if _is_foreign(name, value.loc):
        relative = name.removeprefix(f"{value.loc}.")
        return f"{new if is_of_experts(value) else prefix}.{relative}"
    base, _, word = name.rpartition(".")
    if base in graph.params and base != name:
        parts = base.removeprefix(f"{prefix}.").split(".")
        relative = ".".join(part for part in parts if not part.isdigit())
        return f"{prefix}.{ADDED.get(word, word)}.{relative}"
    if not is_under(name, prefix):
        return f"{prefix}.{name}"
    if is_of_experts(value) and old != new:
        return f"{new}.{name.removeprefix(f'{old}.')}"
    return name


def is_of_experts(value: Value) -> bool:
    """Whether a parameter meets the rows of experts."""
    return "expert" in value.type and any(
        isinstance(axis.size, Extent) and axis.name == "slot"
        for user in value.users
        for operand in (*user.operands, *user.results)
        for axis in operand.type.axes
    )


def _expert_paths(graph: Graph, homes: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return for each path of a layer that of its experts' weights, and their new one."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, value in graph.params.items():
        home = homes.get(name)
        if home is not None and is_of_experts(value) and is_under(name, home):
            groups[home].append(name)
    paths: dict[str, tuple[str, str]] = {}
    for home, names in groups.items():
        old = common(names)
        others = [
            name
            for name in graph.params
            if name not in names and is_under(name, old) and homes.get(name) == home
            and name.rpartition(".")[0] not in names
        ]  # fmt: skip
        paths[home] = (old, f"{home}.experts" if old == home or others else old)
    return paths
