"""Devices: specs of arrays, exchanges between devices, loading sharded parameters."""
