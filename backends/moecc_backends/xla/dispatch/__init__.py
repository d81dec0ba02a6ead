"""The strategies that bring tokens to their experts and back, and which is chosen where."""
