"""Lowerings of operations; importing this package registers all of them."""

from moecc_backends.xla.lower import (  # noqa: F401
    attention,
    collectives,
    contract,
    elementwise,
    routing,
    scan,
)
