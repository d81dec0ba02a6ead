"""Run folders of ``moecc train`` as checkpoints: their layout, and the state that they hold."""
