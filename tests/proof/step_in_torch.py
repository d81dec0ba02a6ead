"""The side of torch in `step.py`: the same steps, written by hand in float64.

Run by an interpreter with torch, with the folders of cases as arguments; it imports nothing of
moecc.  It prints a line of JSON for each: how far losses and parameters are from moecc's.
"""

from __future__ import annotations

import json
import sys
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate pairs (i, i + half) of heads ``[batch, head, seq, head_dim]`` by their positions."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * theta ** (
        -torch.arange(half, dtype=x.dtype) / half
    )
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def attention(x: torch.Tensor, p: Tensors, prefix: str, c: dict[str, Any]) -> torch.Tensor:
    batch, seq, _ = x.shape
    q, k, v = (
        (x @ p[f"{prefix}.{name}_proj.weight"].T)
        .view(batch, seq, -1, c["head_dim"])
        .transpose(1, 2)
        for name in "qkv"
    )
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, 1) for part in (rotated(k, c["theta"]), v))
    scores = rotated(q, c["theta"]) @ k.transpose(-1, -2) / sqrt(c["head_dim"])
    later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    return mixed.transpose(1, 2).reshape(batch, seq, -1) @ p[f"{prefix}.o_proj.weight"].T


def block(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(
    x: torch.Tensor, matrices: list[torch.Tensor], router: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mixture, the balance loss with a sequence as a group, and the router z-loss."""
    logits = x @ router.T
    best, chosen = logits.topk(top_k, -1)
    gates = best.softmax(-1)
    every = torch.stack([block(x, *(m[e] for m in matrices)) for e in range(len(router))], -2)
    picked = every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
    mixture = (picked * gates[..., None]).sum(-2)
    share = F.one_hot(chosen[..., 0], len(router)).to(x.dtype).mean(1)
    balance = len(router) * (share * logits.softmax(-1).mean(1)).sum(-1).mean()
    return mixture, balance, logits.logsumexp(-1).square().mean()


def loss_of(p: Tensors, batch: Tensors, c: dict[str, Any]) -> torch.Tensor:
    x = p["model.embed_tokens.weight"][batch["tokens"]]
    auxiliary = torch.zeros((), dtype=x.dtype)
    for layer in range(c["layers"]):
        at = f"model.layers.{layer}"
        normed = rms_norm(x, p[f"{at}.input_layernorm.weight"], c["eps"])
        x = x + attention(normed, p, f"{at}.self_attn", c)
        normed = rms_norm(x, p[f"{at}.post_attention_layernorm.weight"], c["eps"])
        matrices = [p[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        if c["top_k"]:
            router = p[f"layers.{layer}.ffn.router.weight"]
            added, balance, z = experts(normed, matrices, router, c["top_k"])
            auxiliary = auxiliary + c["balance"] * balance + c["z"] * z
        else:
            added = block(normed, *matrices)
        x = x + added
    logits = rms_norm(x, p["model.norm.weight"], c["eps"]) @ p["lm_head.weight"].T
    entropy = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-1)
    return entropy + auxiliary


class AdamW:
    """Adam with bias correction (Kingma and Ba 2015); decay is the loop's."""

    def __init__(self, c: dict[str, Any]):
        self.c, self.m, self.v, self.count = c, {}, {}, 0

    def __call__(self, slopes: Tensors, params: Tensors) -> Tensors:
        b1, b2 = self.c["b1"], self.c["b2"]
        self.count += 1
        directions = {}
        for name, slope in slopes.items():
            self.m[name] = b1 * self.m.get(name, 0) + (1 - b1) * slope
            self.v[name] = b2 * self.v.get(name, 0) + (1 - b2) * slope.square()
            first = self.m[name] / (1 - b1**self.count)
            second = self.v[name] / (1 - b2**self.count)
            directions[name] = first / (second.sqrt() + self.c["adam_eps"])
        return directions


class Adafactor:
    """Adafactor without momentum (Shazeer and Stern 2018), of vectors and matrices."""

    def __init__(self, c: dict[str, Any]):
        self.rows, self.columns, self.whole, self.count = {}, {}, {}, 0

    def __call__(self, slopes: Tensors, params: Tensors) -> Tensors:
        self.count += 1
        keep = 1 - self.count**-0.8
        directions = {}
        for name, slope in slopes.items():
            square = slope.square() + 1e-30
            if slope.ndim == 2 and min(slope.shape) >= 128:
                row, column = square.mean(1), square.mean(0)
                self.rows[name] = keep * self.rows.get(name, 0) + (1 - keep) * row
                self.columns[name] = keep * self.columns.get(name, 0) + (1 - keep) * column
                row, column = self.rows[name], self.columns[name]
                second = row[:, None] * column[None] / row.mean()
            else:
                self.whole[name] = keep * self.whole.get(name, 0) + (1 - keep) * square
                second = self.whole[name]
            update = slope / second.sqrt()
            update = update / update.square().mean().sqrt().clamp(min=1.0)
            directions[name] = update * params[name].square().mean().sqrt().clamp(min=1e-3)
        return directions


def train(folder: Path) -> dict[str, Any]:
    c = json.loads((folder / "case.json").read_text())
    arrays = np.load(folder / "arrays.npz")
    params = {n.partition(":")[2]: torch.tensor(arrays[n]).double() for n in arrays
              if n.startswith("before:")}  # fmt: skip
    started = {n: p.clone() for n, p in params.items()}
    optimizer = {"adamw": AdamW, "adafactor": Adafactor}[c["optimizer"]](c)
    trained = [n for n in params if not any(word in n for word in c["frozen"])]
    losses = []
    for step, rate in enumerate(c["rates"]):
        batch = {n: torch.tensor(arrays[n][step]).long() for n in ("tokens", "targets")}
        leaves = {n: p.clone().requires_grad_(n in trained) for n, p in params.items()}
        loss = loss_of(leaves, batch, c)
        loss.backward()
        slopes = {n: leaves[n].grad for n in trained}
        norm = torch.sqrt(sum(g.square().sum() for g in slopes.values()))
        factor = c["clip"] / max(float(norm), c["clip"])
        slopes = {n: g * factor for n, g in slopes.items()}
        losses.append(float(loss.detach()))
        for name, direction in optimizer(slopes, params).items():
            decays = params[name].ndim > 1 and name != "model.embed_tokens.weight"
            decay = c["decay"] * params[name] if decays else 0
            factor = c["norm_rate"] if "norm" in name else 1.0
            params[name] = params[name] - rate * factor * (direction + decay)
    moved = sqrt(sum(float((p - started[n]).square().sum()) for n, p in params.items()))
    apart = sqrt(sum(float((p - torch.tensor(arrays[f"after:{n}"]).double()).square().sum())
                     for n, p in params.items()))  # fmt: skip
    still = [n for n in params if n not in trained]
    return {
        "steps": len(losses), "first loss": losses[0], "last loss": losses[-1],
        "largest difference of losses": float(np.abs(np.array(losses) - arrays["losses"]).max()),
        "parameters apart, of the distance moved": apart / moved,
        "frozen parameters": len(still),
        "frozen parameters that moved": sum(
            not np.array_equal(arrays[f"after:{n}"], arrays[f"before:{n}"]) for n in still
        ),
    }  # fmt: skip


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(json.dumps(train(Path(folder))))
