"""Make the golden auxiliary losses with Hugging Face transformers.

Run from anywhere, with an interpreter that has torch and transformers:

    python tests/golden/make_losses.py write      # under transformers 5.24.0
    python tests/golden/make_losses.py compare    # under any other; adds how far it agrees

`losses.npz` holds router logits at random, a padding mask, and the gradients of the losses with
respect to the logits.  `losses.json` holds the losses of those logits.  Everything is computed in
float64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_golden import VERSION, DoublePrecision, _generator
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.switch_transformers import modeling_switch_transformers as switch

HERE = Path(__file__).resolve().parent
VALUES, ARRAYS = HERE / "losses.json", HERE / "losses.npz"
LAYERS, BATCH, SEQ, EXPERTS = 3, 2, 9, 5
TOP_K = (1, 2, 3)
Losses = dict[str, Any]


def drawn() -> dict[str, np.ndarray[Any, Any]]:
    """Return router logits ``[layer, batch, seq, expert]`` and a mask ``[batch, seq]``."""
    logits = 1.5 * _generator("losses", "logits").standard_normal((LAYERS, BATCH, SEQ, EXPERTS))
    return {"logits": logits, "mask": np.arange(SEQ) < np.array([[SEQ], [SEQ - 4]])}


def of_logits(arrays: dict[str, Any]) -> tuple[Losses, dict[str, np.ndarray[Any, Any]]]:
    """Return the losses of the drawn logits, and the gradients of those of the first layer."""
    logits = torch.from_numpy(arrays["logits"])
    mask = torch.from_numpy(arrays["mask"]).double()
    layers = tuple(logits.flatten(1, 2))
    values = {}
    for k in TOP_K:
        name = f"mixtral.top-{k}"
        values[name] = [_balance(mixtral, (x,), k) for x in layers]
        values[f"{name}.joint"] = _balance(mixtral, layers, k)
        values[f"{name}.masked"] = [_balance(mixtral, (x,), k, mask) for x in layers]
    values["qwen2_moe.top-2.joint"] = _balance(qwen2_moe, layers, 2)
    values["switch.balance"] = [_switch_balance(x) for x in logits]
    values["switch.z"] = [switch.router_z_loss_func(x) for x in logits]
    joint = torch.cat(tuple(logits), dim=1)
    values["switch.balance.joint"] = _switch_balance(joint)
    values["switch.z.joint"] = switch.router_z_loss_func(joint)
    gradients = {
        "mixtral.top-2.gradient": _gradient(
            lambda x: _balance(mixtral, (x.flatten(0, 1),), 2), logits[0]
        ),
        "switch.balance.gradient": _gradient(_switch_balance, logits[0]),
        "switch.z.gradient": _gradient(switch.router_z_loss_func, logits[0]),
    }
    return values, gradients


def _balance(module, layers: tuple[Any, ...], top_k: int, mask=None):
    return module.load_balancing_loss_func(layers, layers[0].shape[-1], top_k, mask)


def _switch_balance(logits):
    return switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))


def _gradient(loss, logits) -> np.ndarray[Any, Any]:
    x = logits.clone().requires_grad_()
    loss(x).backward()
    return x.grad.numpy()


def _plain(values):
    """Return numbers for tensors, in dictionaries and lists."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return float(values)


def _numbers(values) -> list[float]:
    if isinstance(values, dict):
        return [n for key in sorted(values) for n in _numbers(values[key])]
    return [n for v in values for n in _numbers(v)] if isinstance(values, list) else [values]


def made() -> tuple[Losses, dict[str, np.ndarray[Any, Any]]]:
    """Return all losses and arrays, as this version of transformers makes them."""
    arrays = drawn()
    with DoublePrecision():
        values, gradients = of_logits(arrays)
    return _plain({"logits": values}), {**arrays, **gradients}


def main():
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Make or compare golden auxiliary losses.")
    parser.add_argument("action", choices=["write", "compare"])
    action = parser.parse_args().action
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    values, arrays = made()
    if action == "write":
        np.savez(ARRAYS, **arrays)
        values = {"written_by": VERSION, "differences": {}, **values}
    else:
        golden = json.loads(VALUES.read_text())
        pairs = zip(_numbers(values), _numbers({k: golden[k] for k in values}), strict=True)
        worst = max(abs(a - b) / abs(b) for a, b in pairs)
        saved = np.load(ARRAYS)
        off = max(float(np.abs(arrays[k] - saved[k]).max()) for k in saved if k != "mask")
        golden["differences"][VERSION] = {"values": f"{worst:.1e}", "gradients": f"{off:.1e}"}
        values = golden
    VALUES.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
