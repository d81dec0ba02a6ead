"""Write a small tree as flax's msgpack, with arrays of several types, one of them in chunks."""

from pathlib import Path

import ml_dtypes
import numpy as np
from flax import serialization

HERE = Path(__file__).parent


def tree() -> dict:
    """Return the tree."""
    rng = np.random.default_rng(0)
    return {
        "version": 3,
        "optimizer": {
            "target": {
                "half": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
                "large": rng.standard_normal((3, 7)).astype(np.float32),
                "stored": {
                    "driver": "zarr", "kvstore": {"driver": "file", "path": "/etc"}, "metadata": {},
                },
            },
            "state": {"step": np.int32(7), "nothing": {}},
        },
    }  # fmt: skip


def main():
    """Write ``flax.msgpack``, and the arrays as NumPy has them."""
    serialization.MAX_CHUNK_SIZE = 32
    (HERE / "flax.msgpack").write_bytes(serialization.msgpack_serialize(tree()))
    target = tree()["optimizer"]["target"]
    np.savez(HERE / "flax.npz", half=target["half"].astype(np.float32), large=target["large"])


if __name__ == "__main__":
    main()
