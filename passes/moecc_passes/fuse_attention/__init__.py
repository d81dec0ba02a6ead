"""The pass ``fuse-attention``."""
