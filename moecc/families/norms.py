"""The norms of decoders: RMS norms, of one parameter or one more than it, and layer norms."""

from __future__ import annotations

from moecc.families.configs import DecoderConfig
from moecc.ir.builder import Builder
from moecc.ir.graph import Value


def emit_rms_norm(
    builder: Builder,
    x: Value,
    scale: Value,
    axis: str,
    config: DecoderConfig,
    *,
    name: str | None = None,
) -> Value:
    """Emit the norm of `x` along `axis` with the parameter `scale`."""
    if config.norm_offset:
        # The parameter stays as it is on disk; one more than it, rounded, would not come back.
        one = builder.constant(value=1.0, name="one")
        scale = builder.add(scale, one, name="gain")
    return builder.rms_norm(x, scale, axis=axis, eps=config.rms_norm_eps, name=name)
