"""A decoder of no family, in NumPy: attention beside squared ReLU, and learned positions.

Writes its weights and what it computes to ``out/squid``; docs/jobs.md has its graph.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[np.float32]
rng, E, H, D, M = np.random.default_rng(0), 32, 4, 8, 48
shapes = {"wte": (40, E), "wpe": (64, E), "norm": (E,), "q": (E, E), "k": (E, E), "v": (E, E),
          "o": (E, E), "up": (M, E), "down": (E, M), "last": (E,)}  # fmt: skip
w = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
tokens = rng.integers(0, 40, (2, 12)).astype(np.int32)


def norm(x: Array, scale: Array) -> Array:
    size: Array = np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x / size * scale


def heads(x: Array) -> Array:
    return x.reshape(2, 12, H, D).transpose(0, 2, 1, 3)


h = w["wte"][tokens] + w["wpe"][:12]
x = norm(h, w["norm"])
q, k, v = (heads(x @ w[name].T) for name in "qkv")
seen = np.exp(q @ k.swapaxes(2, 3) / D**0.5 + np.triu(np.full((12, 12), -np.inf), 1))
mixed = (seen / seen.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(2, 12, E)
h = h + mixed @ w["o"].T + np.maximum(x @ w["up"].T, 0) ** 2 @ w["down"].T
Path("out/squid").mkdir(parents=True, exist_ok=True)
save_file(w, "out/squid/model.safetensors")
np.savez("out/squid/known.npz", tokens=tokens, logits=norm(h, w["last"]) @ w["wte"].T)
