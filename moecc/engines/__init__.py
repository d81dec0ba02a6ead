"""What inference engines read of the checkpoints that moecc writes, as a table and as verdicts."""
