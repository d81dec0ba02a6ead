"""What mlx-lm computes of folders: run by an interpreter that has it (``mlx-cpu`` on Linux).

Reads a JSON list of {"folder": …, "tokens": …} from standard input; writes the logits as
``FOLDER/mlx.npy``, in float32, and to standard output why the engine refused a folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def answer(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["folder"])
    try:
        model, _ = load_model(folder)
        tokens = mx.array(np.load(job["tokens"]))
        np.save(folder / "mlx.npy", np.array(model(tokens).astype(mx.float32)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return {"refused": f"{type(error).__name__}: {error}"[:300]}
    return {}


def main():
    mx.set_default_device(mx.cpu)
    print(json.dumps({"reports": [answer(job) for job in json.load(sys.stdin)]}))


if __name__ == "__main__":
    main()
