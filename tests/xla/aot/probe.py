"""Compile a small program for a machine, and print what the census says; run as a script.

The program has what a rolled sparse layer has: a loop, products, an exchange between token groups
and experts under the double constraint, and sums over a model axis.
"""

from __future__ import annotations

import json
import sys

from moecc_backends.xla.aot.topology import devices, prepare

from moecc.plan.machines import parse_machine

LAYERS, BATCH, SEQ, EMBED, MLP = 5, 64, 128, 512, 1024
DATA, MODEL = 4, 2


def main(machine: str) -> None:
    target = parse_machine(machine)
    prepare(target)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from moecc_backends.xla.aot.census import census
    from moecc_backends.xla.aot.compiler import compile_program as compile_ahead

    mesh = Mesh(np.array(devices(target)[: DATA * MODEL]).reshape(DATA, MODEL), ("data", "model"))

    def on(*spec: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*spec))

    def exchanged(x: jax.Array) -> jax.Array:
        groups = jax.lax.with_sharding_constraint(x.reshape(DATA, -1, EMBED), on("data"))
        rows = jax.lax.with_sharding_constraint(groups, on(None, "data"))
        back = jax.lax.with_sharding_constraint(jnp.tanh(rows), on("data"))
        return back.reshape(x.shape)

    def layer(x: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden = jnp.einsum("bse,em->bsm", x, weights[0])
        return exchanged(jnp.einsum("bsm,em->bse", jnp.sin(hidden), weights[1])), None

    def loss(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jax.lax.scan(layer, x, weights)[0]).astype(jnp.float32))

    shape = (LAYERS, EMBED, MLP)
    weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=on(None, None, "model"))
    tokens = jax.ShapeDtypeStruct((BATCH, SEQ, EMBED), jnp.bfloat16, sharding=on("data"))
    compiled = compile_ahead(jax.jit(jax.grad(loss)), ((weight, weight), tokens), target)
    found = census(compiled.hlo)
    report = {
        "flops": found.flops,
        "collectives": found.by_kind(),
        "group_sizes": sorted({(c.kind, c.group_size) for c in found.collectives}),
        "unknown_loops": found.unknown_loops,
        "memory": compiled.memory.to_json(),
        "host_peak_bytes": compiled.host_peak_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
