"""The pass ``roll-layers``: equal layers as one layer that is repeated."""
