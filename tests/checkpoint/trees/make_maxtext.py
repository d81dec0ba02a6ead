"""Write golden models as the arrays that MaxText's own conversion makes of them.

    python tests/checkpoint/trees/make_maxtext.py MAXTEXT

MAXTEXT is the unpacked wheel of maxtext 0.2.5, of which one module is loaded, with jax: its table
of names and its functions.  Stacking follows ``checkpoint_conversion/to_maxtext.py``: experts along
axis 0, and layers that are scanned along axis 1 (``param_scan_axis``).
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
GOLDEN = HERE.parents[1] / "golden"
MODULE = "maxtext/checkpoint_conversion/utils/param_mapping.py"
CASES = {
    "llama_llama3": ("LLAMA31", True),
    "qwen2_square": ("QWEN", True),
    "qwen3_square": ("QWEN", False),
    "mixtral_bfloat16": ("MIXTRAL", True),
    "qwen3_moe_norm": ("QWEN", False),
}
"""By golden model: MaxText's table, and whether layers are scanned."""


def slice_shape(key: str, config: dict) -> tuple[int, ...] | None:
    """Return the sizes that MaxText's model has for one layer's array; None where they follow."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width, dim = config["hidden_size"], config["head_dim"]
    table = {
        "query-kernel": (width, heads, dim), "key-kernel": (width, kv, dim),
        "value-kernel": (width, kv, dim), "out-kernel": (heads, dim, width),
        "query-bias": (heads, dim), "key-bias": (kv, dim), "value-bias": (kv, dim),
    }  # fmt: skip
    return next((shape for name, shape in table.items() if key.endswith(name)), None)


def convert(name: str, module, table: str, scanned: bool) -> dict[str, np.ndarray]:
    """Return the arrays of a golden model by their MaxText keys."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    config["head_dim"] = config.get("head_dim") or (
        config["hidden_size"] // config["num_attention_heads"]
    )
    tensors = load_file(GOLDEN / name / "model.safetensors")
    experts = config.get("num_local_experts", config.get("num_experts"))
    own = SimpleNamespace(head_dim=config["head_dim"], num_experts=experts)
    arguments = (config, own, scanned)
    mapping = getattr(module, f"{table}_MAXTEXT_TO_HF_PARAM_MAPPING")(*arguments)
    hooks = getattr(module, f"{table}_MAXTEXT_TO_HF_PARAM_HOOK_FN")(*arguments)

    def one(key, source):
        value, functions = tensors[source], hooks.get(key, [])
        shape = slice_shape(key, config) or value.shape[::-1]
        for function in functions if isinstance(functions, list) else [functions]:
            value = np.asarray(function(value, shape if "embedding" not in key else value.shape))
        return np.ascontiguousarray(value)

    made = {}
    for key, sources in mapping.items():
        first = sources if isinstance(sources, str) else sources[0]
        first = first if isinstance(first, str) else first[0]
        if first not in tensors:
            continue  # of other members of the family: biases, norms of queries, a head
        if isinstance(sources, str):
            made[key] = one(key, sources)
        elif isinstance(sources[0], str):
            axis = 1 if scanned else 0
            made[key] = np.stack([one(key, source) for source in sources], axis)
        else:
            made[key] = np.stack([np.stack([one(key, s) for s in row]) for row in sources])
    return made


def main():
    """Write a file for each case."""
    spec = importlib.util.spec_from_file_location("param_mapping", Path(sys.argv[1]) / MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, (table, scanned) in CASES.items():
        file = HERE / f"{name}.safetensors"
        save_file(convert(name, module, table, scanned), file)
        file.chmod(0o644)


if __name__ == "__main__":
    main()
