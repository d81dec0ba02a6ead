"""The training step: loss, gradients, optimiser, and where all of it is sharded."""
