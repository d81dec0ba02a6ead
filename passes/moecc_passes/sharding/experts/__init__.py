"""Expert parallelism: how rows come to the devices of their experts, and back."""
