"""Random architectures in jnp: depth, widths, activation, biases, gating, layout, loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from .mixtures import mixture

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "squared relu": lambda h: jnp.square(jax.nn.relu(h)),
    "mish": jax.nn.mish,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "elu": lambda h: jnp.where(h > 0, h, jnp.expm1(jnp.minimum(h, 0.0))),
    "leaky": lambda h: jnp.where(h > 0, h, 0.1 * h),
}


@dataclass(frozen=True)
class Architecture:
    """What a model is.

    Attributes:
      depth: layers.
      embed, mlp: widths.
      activation: a name of `ACTIVATIONS`.
      bias: whether products have biases.
      gating: ``none``, ``two`` matrices, or ``fused``: one that is cut in two.
      layout: ``plain`` products, ``transposed`` weights, ``flat`` tokens, a ``vector`` at a time.
      loop: ``unrolled``, ``scan``, or ``remat``: a scan of checkpoints.
      parallel: whether attention and block read the same value.
      experts, top_k: of the mixture.
    """

    depth: int
    embed: int
    mlp: int
    activation: str
    bias: bool
    gating: str
    layout: str
    loop: str
    parallel: bool
    experts: int
    top_k: int

    @property
    def pipeline(self) -> str:
        return f"upcycle{{experts={self.experts} top-k={self.top_k}}}"

    def init(self, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> Any:
            return jnp.asarray(rng.normal(0, max(shape) ** -0.5, shape), jnp.float32)

        def layer() -> Any:
            widths = self.mlp * (2 if self.gating == "fused" else 1)
            up = (widths, self.embed) if self.layout == "transposed" else (self.embed, widths)
            down = (self.embed, self.mlp) if self.layout == "transposed" else (self.mlp, self.embed)
            p = {"up": draw(*up), "down": draw(*down)}
            if self.gating == "two":
                p["gate"] = draw(*up)
            if self.bias:
                p |= {"up_bias": draw(widths), "down_bias": draw(self.embed)}
            mixing = {"in": draw(self.embed, self.embed), "out": draw(self.embed, self.embed)}
            return {"mlp": p, "mixing": mixing}

        layers = [layer() for _ in range(self.depth)]
        if self.loop != "unrolled":
            return {"layers": jax.tree.map(lambda *each: jnp.stack(each), *layers)}
        return {"layers": layers}

    def ffn(self, p: Any, x: Any) -> Any:
        """The block: ``[…, embed]`` to ``[…, embed]``."""
        if self.layout == "flat":
            return self.block(p, x.reshape(-1, self.embed)).reshape(x.shape)
        if self.layout == "vector":
            every = partial(self.block, p)
            for _ in x.shape[:-1]:
                every = jax.vmap(every)
            return every(x)
        return self.block(p, x)

    def block(self, p: Any, x: Any) -> Any:
        transposed = self.layout == "transposed"
        up, down = (p[n].T if transposed else p[n] for n in ("up", "down"))
        h = x @ up + (p["up_bias"] if self.bias else 0.0)
        act = ACTIVATIONS[self.activation]
        if self.gating == "fused":
            gate, value = jnp.split(h, 2, -1)
            hidden = act(gate) * value
        elif self.gating == "two":
            hidden = act(x @ (p["gate"].T if transposed else p["gate"])) * h
        else:
            hidden = act(h)
        return hidden @ down + (p["down_bias"] if self.bias else 0.0)

    def layer(self, p: Any, x: Any, router: Any = None) -> Any:
        def ffn(x: Any) -> Any:
            return self.ffn(p["mlp"], x) if router is None else self.routed(p["mlp"], router, x)

        mixed = jnp.cumsum(x @ p["mixing"]["in"], axis=1) / 8.0 @ p["mixing"]["out"]
        if self.parallel:
            return x + mixed + ffn(x)
        x = x + mixed
        return x + ffn(jnp.tanh(x))

    def routed(self, experts: Any, router: Any, x: Any) -> Any:
        return mixture(self.block, experts, router, x, self.top_k)

    def model(self, params: Any, x: Any, routers: Any = None) -> Any:
        """The model; with `routers`, its mixtures by hand."""
        if self.loop == "unrolled":
            for i, p in enumerate(params["layers"]):
                x = self.layer(p, x, None if routers is None else routers[i])
            return x

        def step(x: Any, each: Any) -> Any:
            return self.layer(each[0], x, each[1]), None

        body = jax.checkpoint(step) if self.loop == "remat" else step
        return jax.lax.scan(body, x, (params["layers"], routers))[0]

    def by_hand(self, params: Any, x: Any) -> Any:
        """The model on converted parameters, where no leaf is in parts."""
        routers = [a for n, a in params["moe"].items() if n.endswith("router.weight")]
        stacked = self.loop != "unrolled"
        return self.model(params["params"], x, routers[0] if stacked else routers)


@st.composite
def architectures(draw: Any) -> Architecture:
    """Draw an architecture."""
    experts = draw(st.integers(2, 5))
    embed = draw(st.sampled_from([4, 6, 8]))
    return Architecture(
        depth=draw(st.integers(1, 3)),
        embed=embed,
        # Square matrices, and halves that are square, are among them.
        mlp=draw(st.sampled_from([embed, embed // 2, 5, 2 * embed])),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        bias=draw(st.booleans()),
        gating=draw(st.sampled_from(["none", "two", "fused"])),
        layout=draw(st.sampled_from(["plain", "transposed", "flat", "vector"])),
        loop=draw(st.sampled_from(["unrolled", "scan", "remat"])),
        parallel=draw(st.booleans()),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
    )
